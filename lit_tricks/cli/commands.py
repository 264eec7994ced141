"""Convert a command line to the call of a function, by its signature."""

from __future__ import annotations

import argparse
import inspect
import itertools
import re
import tempfile
import typing
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lit_tricks.commands.checkpoints import checkpoint_at, data_settings
from lit_tricks.commands.predicting.loading import accelerator_of
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.config_files import among, nearest
from lit_tricks.utils.config_files import given as given_value

__all__ = ["find_command", "own_arguments", "run_command", "summary"]

Build = Callable[[str, list[str]], dict[str, Any]]
OPTIONS = ("config", "output")  # arguments that are options also where they have no default
PARTS = ("data", "model", "trainer")  # of a fit or a prediction


def find_command(commands: ModuleType, words: list[str], name: str = "") -> tuple[Callable[..., Any] | None, str]:
    """Return the function that a command line calls, and the arguments that name it.

    Args:
        commands: package with a function for each command, and a package for each group of them, in ``__all__``.
        words: of the command line.
        name: of the group that the package is.

    Returns:
        None where the first word is neither, and the package no group: it is for another parser then.

    Raises:
        argparse.ArgumentError: where a group has no such command.
    """
    if words and words[0] in commands.__all__:
        found = getattr(commands, words[0])
        name = f"{name} {words[0]}".lstrip()
        return find_command(found, words[1:], name) if inspect.ismodule(found) else (found, name)
    if name:
        _reject(commands, words, name)
    return None, ""


def _reject(group: ModuleType, words: list[str], name: str) -> None:
    known = [*group.__all__]
    if not words:
        text = f"choose a command: {', '.join(f'{name} {each}' for each in known)}."
        raise argparse.ArgumentError(None, f"{text} `lit-tricks {name} --help` explains them.")
    close = nearest(words[0], known) or among([f"{name} {each}" for each in known])
    raise argparse.ArgumentError(None, f"there is no command {words[0]!r}{close}")


def run_command(function: Callable[..., Any], words: list[str], name: str, build: Build) -> None:
    """Call a command with the arguments after its name.

    Arguments without a default are positional, unless they are keyword-only. A list takes several values, and
    ``output`` is ``-o``. Flags with the default False need no value. A ``--config`` may have settings that the command
    lacks, such as the configuration of a run: these are ignored. A function with an argument ``config`` gets the paths.
    Arguments after ``--`` are passed as ``fit_args``. A function with ``ckpt`` and ``data`` gets the data of the
    checkpoint by default. A function with an argument ``trainer`` gets the parts of a fit, ``data``, ``model`` and
    ``trainer``, which are built from all remaining arguments. If it also has an argument ``ckpt``, these are the parts
    of a prediction with this checkpoint, and are built only from given arguments.

    Args:
        function: typed and documented function. Its arguments become flags.
        words: arguments of the command line, with configurations as paths.
        name: name of the command.
        build: makes the parts of a subcommand, such as fit, from the arguments after its name.

    Raises:
        argparse.ArgumentError: for invalid arguments.
    """
    parser = _parser(function, name)
    parameters = inspect.signature(function).parameters
    given: dict[str, Any] = {}
    if "fit_args" in parameters and "--" in words:
        end = words.index("--")
        words, given = words[:end], {"fit_args": words[end + 1 :]}
    words = [_underscored(word) for word in words]
    if {"ckpt", "images"} <= parameters.keys():
        words = _renamed(words)
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.default is False}
    parts: list[str] = []
    if "trainer" in parameters:
        words, parts = _split(words, own_arguments(function), flags, "images" if "images" in parameters else "")
    with tempfile.TemporaryDirectory() as folder:
        if not {"config", "trainer"} & set(parameters):
            words = _reduced(words, set(parameters), folder)
        if {"ckpt", "data"} <= parameters.keys() and "trainer" not in parameters:
            words = [*_settings_of(given_value(words, "--ckpt"), folder), *words]
        config = _parsed(parser, function, [f"{word}=true" if word in flags else word for word in words], name)
    if {"ckpt", "trainer"} <= parameters.keys():
        on = [f"--trainer.{name}={value}" for name, value in accelerator_of(config.device).items()]
        given |= build("predict", [*on, *parts, f"--ckpt_path={config.ckpt}"]) if parts else {}
    elif "trainer" in parameters:
        given |= build("fit", parts)
    values = parser.instantiate_classes(config).as_dict() | given
    function(**{name: values[name] for name in parameters if name in values})


def _parsed(parser: ArgumentParser, function: Callable[..., Any], words: list[str], name: str) -> Any:
    """Parse the words, and name missing arguments as they are on the command line."""
    try:
        return parser.parse_args(words)
    except argparse.ArgumentError as error:
        match = re.search(r"following arguments are required: (.*)", error.message)
        if match is None:
            raise
        parameters = inspect.signature(function).parameters
        flags = {each for each in match[1].split(", ") if parameters[each].kind is inspect.Parameter.KEYWORD_ONLY}
        names = [f"--{each}" if each in {*flags, *OPTIONS} else each.upper() for each in match[1].split(", ")]
        message = f"{name} needs {' and '.join(names)}. `lit-tricks {name} --help` explains them."
        raise argparse.ArgumentError(None, message) from error


def own_arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments, without those that are the parts of a fit."""
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in PARTS] if "trainer" in names else names


def summary(command: Callable[..., Any] | ModuleType) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(command) or "").partition("\n")[0]


def _split(words: list[str], own: list[str], flags: set[str], positional: str) -> tuple[list[str], list[str]]:
    """Split the command line into a command's own arguments and others.

    Args:
        words: arguments of the command line.
        own: names of the command's arguments.
        flags: options that take no value.
        positional: name of the argument for values without a flag; empty if there is none.
    """
    ours: list[str] = []
    theirs: list[str] = []
    free: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if positional and flag == f"--{positional}":  # as an option it takes several values too
            free += [value] if equals else []
            while not equals and words and _is_value(words[0]):
                free.append(words.pop(0))
        elif positional and _is_value(word):
            free.append(word)
        else:
            mine = flag.lstrip("-") in own or word in ("-h", "--help") or (positional and flag == "-o")
            (ours if mine else theirs).append(word)
            if not equals and flag not in flags and words and (mine or (positional and _is_value(words[0]))):
                (ours if mine else theirs).append(words.pop(0))
    return [*ours, *(["--", *free] if free else [])], theirs


def _is_value(word: str) -> bool:
    return word == "-" or not word.startswith("-")


def _renamed(words: list[str]) -> list[str]:
    """Return the arguments of a prediction with current names of its options."""
    return [
        f"--ckpt{word.removeprefix('--ckpt_path')}" if word.partition("=")[0] == "--ckpt_path" else word
        for word in words
    ]


def _underscored(word: str) -> str:
    """Return ``--as-sweep=x`` as ``--as_sweep=x``. Dotted flags are of a fit, and have no hyphens to replace."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or "." in flag:
        return word
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def _settings_of(checkpoint: str | None, folder: str) -> list[str]:
    """Words for the data settings of a checkpoint: a configuration below what is given."""
    settings = data_settings(checkpoint_at(checkpoint)) if checkpoint and Path(checkpoint).exists() else {}
    if not settings:
        return []
    path = Path(folder, "checkpoint.yaml")
    path.write_text(yaml.safe_dump({"data": settings}))
    return [f"--config={path}"]


_CONFIG = ("-c", "--config")


def _reduced(words: list[str], known: set[str], folder: str) -> list[str]:
    """Return the arguments, with configurations reduced to the settings of the command."""
    reduced: list[str] = []
    for word in words:
        flag, equals, path = word.partition("=")
        if flag in _CONFIG and equals:
            reduced += [flag, path]
        else:
            reduced.append(word)
    for i, (flag, path) in enumerate(itertools.pairwise(reduced)):
        if flag in _CONFIG:
            settings = read_yaml(path)
            part = Path(folder, f"{i}.yaml")
            part.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key in known}))
            reduced[i + 1] = str(part)
    return reduced


def _parser(function: Callable[..., Any], name: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"lit-tricks {name}", exit_on_error=False)
    types = typing.get_type_hints(function)
    parameters = {name: inspect.signature(function).parameters[name] for name in own_arguments(function)}
    if not {"trainer", "config"} & {*types, *parameters}:
        parser.add_argument("-c", "--config", action="config")
    simple = []
    for argument, parameter in parameters.items():
        required, item = parameter.default is parameter.empty, _item(types[argument])
        kind: dict[str, Any] = {"type": item or types[argument]}
        kind |= {"nargs": "+"} if item else {}
        flag = not required or parameter.kind is parameter.KEYWORD_ONLY
        if argument == "config":
            parser.add_argument("-c", "--config", action="append", required=required)
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
    parser.add_function_arguments(function, skip={*simple, *(set(types) - set(parameters))})
    return parser


def _item(kind: Any) -> type | None:
    """Return the type of what a list holds, also of one that may be None."""
    for part in (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is list:
            [item] = typing.get_args(part)
            return item  # type: ignore[no-any-return]
    return None
