"""``lit-tricks completion``: a script that lets the shell complete commands, options and names."""

from __future__ import annotations

import argparse
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from lit_tricks.cli.catalog import LIGHT_COMMANDS, TRAINER_COMMANDS, configs, public_names
from lit_tricks.cli.discovery import KINDS, LightParser
from lit_tricks.cli.parameters import parameter_names
from lit_tricks.tasks import TASKS

__all__ = ["show_script"]

CONFIG = "_lit_tricks_config"  # shell function that completes names of configurations, and files
SHELLS = ("bash", "zsh")
PREAMBLES = {
    "bash": '{config}() {{ compgen -W \'{names}\' -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "{config}() {{ _alternative 'names:configuration:({names})' 'files:file:_files' }}",
}
# bash treats the "=" of --option=value as a separate word
UNSPLIT = """
_lit_tricks() {
  local words=() count=$COMP_CWORD i
  for i in "${!COMP_WORDS[@]}"; do
    if [[ "${COMP_WORDS[$i]}" != "=" ]]; then
      words+=("${COMP_WORDS[$i]}")
    elif (( i < COMP_CWORD )); then
      (( count -= 1 ))
    else
      words+=("")
    fi
  done
  local COMP_WORDS=("${words[@]}") COMP_CWORD=$count
  _shtab_lit_tricks
}

complete -o bashdefault -F _lit_tricks lit-tricks"""
HINT = 'Load it in your shell\'s start-up file: eval "$(lit-tricks completion bash)", or zsh instead of bash.'


def show_script(words: list[str]) -> None:
    """Run ``lit-tricks completion``."""
    import shtab

    parser = LightParser("lit-tricks completion", description=LIGHT_COMMANDS["completion"], epilog=HINT)
    parser.add_argument("shell", choices=SHELLS, help="Shell to write the script for.")
    shell = parser.parse_args(words).shell
    preamble = PREAMBLES[shell].format(config=CONFIG, names=" ".join(configs()))
    script = shtab.complete(_all_commands(), shell, preamble=preamble)
    if shell == "bash":
        script += UNSPLIT
    else:  # "=" allows --option=value; and zsh would take a sign for its own syntax where it is the last character
        script = re.sub(r'((?:"|,)--[\w.]+[+-]?)(?=\}?"?\[[^\]]*\]:)', r"\1=", script)
    print(script)  # noqa: T201


def _all_commands() -> argparse.ArgumentParser:
    """Make a plain parser with the options of all commands. It is not for parsing: there are no types."""
    from lit_tricks import commands

    parser = argparse.ArgumentParser("lit-tricks")
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers()
    for name, text in TRAINER_COMMANDS.items():
        _add_trainer_options(subparsers.add_parser(name, help=text, description=text), name)
    _add_group(subparsers, commands)
    for name, text in LIGHT_COMMANDS.items():
        _add_light(subparsers.add_parser(name, help=text, description=text), name)
    return parser


def _add_group(subparsers: Any, group: ModuleType) -> None:
    for name in group.__all__:
        command = getattr(group, name)
        text = (inspect.getdoc(command) or "").partition("\n")[0]
        parser = subparsers.add_parser(name, help=text, description=text)
        if inspect.ismodule(command):
            _add_group(parser.add_subparsers(), command)
        else:
            _add_function(parser, command)


def _add_function(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    """Add the arguments of a command that is a function, and the options of a fit where it takes parts of one."""
    from lit_tricks.cli.commands import own_arguments

    types, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    for name in own_arguments(function):
        parameter = parameters[name]
        if name in ("config", "fit_args"):
            continue
        if name == "stack":
            _complete_configs(_add(parser, name, nargs="*"))
            continue
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            _complete_files(parser.add_argument(name, nargs="*"))
        elif parameter.default is False:
            _add(parser, name, action="store_true")
        else:
            _complete_files(_add(parser, name, choices=_choices(types[name])))
    if "trainer" in parameters:
        _add_trainer_options(parser, "fit")
    else:
        _add_config(parser)


def _add_trainer_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of a command that LightningCLI runs."""
    from lightning.pytorch import Trainer

    import lit_tricks

    tricks, data = public_names("callbacks"), public_names("data")
    tasks = {name: getattr(lit_tricks, name) for name in TASKS}
    _add_config(parser)
    for name in ("seed_everything", "print_config", "name", "watch")[: None if command == "fit" else 2]:
        _add(parser, name)
    _complete_files(_add(parser, "ckpt_path"))
    for name in inspect.signature(Trainer).parameters:
        _add(parser, f"trainer.{name}")
    for sign in ("+", "-"):
        _add(parser, f"trainer.callbacks{sign}", choices=[*tricks])
    for name in tricks:
        for argument in inspect.signature(getattr(lit_tricks, name)).parameters:
            _add(parser, f"trainer.callbacks.{name}.{argument}")
    _add(parser, "model", choices=[*tasks])
    for argument in _arguments(tasks.values()):
        _add(parser, f"model.{argument}")
    _add(parser, "model.optimizer.lr")
    _add(parser, "model.optimizer.weight_decay")
    _add(parser, "data", choices=[*data])
    for argument in _arguments(getattr(lit_tricks.data, name) for name in data):
        _complete_files(_add(parser, f"data.{argument}"))


def _add_config(parser: argparse.ArgumentParser) -> None:
    _complete_configs(parser.add_argument("-c", "--config"))


def _add_light(parser: argparse.ArgumentParser, name: str) -> None:
    choices = {"list": [*KINDS], "completion": [*SHELLS]}.get(name)
    parser.add_argument("name", choices=choices or [*public_names("callbacks"), *public_names("data"), *configs()])


def _add(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> argparse.Action:
    flags = [f"--{name}"] + [f"--{name.replace('_', '-')}"] * ("." not in name and "_" in name)
    return parser.add_argument(*flags, **kwargs)


def _complete_configs(action: argparse.Action) -> None:
    action.complete = dict.fromkeys(SHELLS, CONFIG)  # type: ignore[attr-defined]


def _complete_files(action: argparse.Action) -> None:
    import shtab

    if not action.choices:
        action.complete = shtab.FILE  # type: ignore[attr-defined]


def _choices(kind: Any) -> list[str] | None:
    """Return the values of a Literal."""
    kinds = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
    return [str(value) for each in kinds for value in get_args(each)] or None


def _arguments(classes: Iterable[type]) -> list[str]:
    """Return the names of the arguments of classes, each once."""
    found = (name for cls in classes for name in parameter_names(cls))
    return list(dict.fromkeys(found))
