"""From the words of a command line to the call of a function, by its signature and docstring."""

from __future__ import annotations

import inspect
import itertools
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

__all__ = ["run_command", "summary"]


def run_command(function: Callable[..., Any], words: list[str]) -> None:
    """Call a command with the words after its name.

    What has no default is positional, unless it is keyword-only; a list takes several values; ``output`` is ``-o``.
    What is False by default needs no value. A ``--config`` may hold more than the command knows, such as that of a run:
    the rest is ignored; but a function with an argument ``config`` gets the paths. What follows ``--`` is for the
    argument ``fit_args``.

    Args:
        function: typed and documented. Its arguments become flags.
        words: of the command line, configurations as paths.

    Raises:
        argparse.ArgumentError: for words that can not be understood.
    """
    parser = _parser(function)
    parameters = inspect.signature(function).parameters
    given: dict[str, Any] = {}
    if "fit_args" in parameters and "--" in words:
        end = words.index("--")
        words, given = words[:end], {"fit_args": words[end + 1 :]}
    words = [_underscored(word) for word in words]
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.default is False}
    with tempfile.TemporaryDirectory() as folder:
        if "config" not in parameters:
            words = _reduced(words, set(parameters), folder)
        config = parser.parse_args([f"{word}=true" if word in flags else word for word in words])
    values = parser.instantiate_classes(config).as_dict() | given
    function(**{name: values[name] for name in parameters if name in values})


def summary(function: Callable[..., Any]) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _underscored(word: str) -> str:
    """``--as-sweep=x`` as ``--as_sweep=x``."""
    flag, equals, value = word.partition("=")
    return (flag[:2] + flag[2:].replace("-", "_") if flag.startswith("--") else flag) + equals + value


_CONFIG = ("-c", "--config")


def _reduced(words: list[str], known: set[str], folder: str) -> list[str]:
    """The words with configurations in which there is only what the command knows."""
    reduced: list[str] = []
    for word in words:
        flag, equals, path = word.partition("=")
        if flag in _CONFIG and equals:
            reduced += [flag, path]
        else:
            reduced.append(word)
    for i, (flag, path) in enumerate(itertools.pairwise(reduced)):
        if flag in _CONFIG:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            part = Path(folder, f"{i}.yaml")
            part.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key in known}))
            reduced[i + 1] = str(part)
    return reduced


def _parser(function: Callable[..., Any]) -> ArgumentParser:
    name = function.__name__
    docstring = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {param.arg_name: param.description for param in docstring.params}
    description = "\n\n".join(filter(None, (docstring.short_description, docstring.long_description)))
    parser = ArgumentParser(prog=f"lit-tricks {name}", description=description, exit_on_error=False)
    types = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    if "config" not in parameters:
        parser.add_argument(
            "-c", "--config", action="config", help="Configuration, by name or file; what else it holds is ignored."
        )
    simple = []
    for argument, parameter in parameters.items():
        required, item = parameter.default is parameter.empty, _item(types[argument])
        kind: dict[str, Any] = {"type": item or types[argument], "help": helps[argument]}
        kind |= {"nargs": "+"} if item else {}
        flag = not required or parameter.kind is parameter.KEYWORD_ONLY
        if argument == "config":
            parser.add_argument("-c", "--config", action="append", required=required, help=helps[argument])
        elif argument == "output":
            parser.add_argument(
                "-o", "--output", required=required, default=None if required else parameter.default, **kind
            )
        elif required and not flag:
            parser.add_argument(argument, **kind)
        elif item and argument != "fit_args":
            parser.add_argument(
                f"--{argument}", required=required, default=None if required else parameter.default, **kind
            )
        elif argument != "fit_args":
            continue
        simple.append(argument)
    parser.add_function_arguments(function, skip=set(simple))
    return parser


def _item(kind: Any) -> type | None:
    """The type of what a list holds, also of one that may be None."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is list:
            [item] = typing.get_args(part)
            return item  # type: ignore[no-any-return]
    return None
