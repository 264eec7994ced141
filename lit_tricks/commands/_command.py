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

    What has no default is positional, several values where it is a list; ``output`` is ``-o``. What is False by default
    needs no value. A ``--config`` may hold more than the command knows, such as that of a run: the rest is ignored.

    Args:
        function: typed and documented. Its arguments become flags.
        words: of the command line, configurations as paths.

    Raises:
        argparse.ArgumentError: for words that can not be understood.
    """
    parser = _parser(function)
    parameters = inspect.signature(function).parameters
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.default is False}
    with tempfile.TemporaryDirectory() as folder:
        words = [f"{word}=true" if word in flags else word for word in _reduced(words, set(parameters), folder)]
        config = parser.parse_args(words)
    values = parser.instantiate_classes(config).as_dict()
    function(**{name: values[name] for name in parameters})


def summary(function: Callable[..., Any]) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


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
    parser.add_argument(
        "-c", "--config", action="config", help="Configuration, by name or file; what else it holds is ignored."
    )
    types = typing.get_type_hints(function)
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    for argument in required:
        if argument == "output":
            parser.add_argument("-o", "--output", type=types[argument], required=True, help=helps[argument])
        elif typing.get_origin(types[argument]) is list:
            [item] = typing.get_args(types[argument])
            parser.add_argument(argument, type=item, nargs="+", help=helps[argument])
        else:
            parser.add_argument(argument, type=types[argument], help=helps[argument])
    parser.add_function_arguments(function, skip=set(required))
    return parser
