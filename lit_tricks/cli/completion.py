"""``lit-tricks completion``: a script that lets the shell complete commands, options and names."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lit_tricks.cli.catalog import LIGHT_COMMANDS, TRAINER_COMMANDS, Entry, configs, definition, public_names
from lit_tricks.cli.discovery import KINDS, LightParser
from lit_tricks.cli.pages import Option
from lit_tricks.cli.trainer_options import EVALUATION, FIT
from lit_tricks.tasks import TASKS

__all__ = ["show_script"]

CONFIG = "_lit_tricks_config"  # shell function that completes names of configurations, and files
SHELLS = ("bash", "zsh")
PLACEHOLDERS = ("--model.NAME", "--data.NAME", "--trainer.callbacks")
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
    parser = argparse.ArgumentParser("lit-tricks")
    parser.add_argument("--version", action="store_true", help="show the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers()
    for name, text in TRAINER_COMMANDS.items():
        _add_trainer_options(
            subparsers.add_parser(name, help=text, description=text), FIT if name == "fit" else EVALUATION
        )
    _add_group(subparsers, "commands")
    for name, text in LIGHT_COMMANDS.items():
        _add_light(subparsers.add_parser(name, help=text, description=text), name)
    return parser


def _add_group(subparsers: Any, package: str) -> None:
    for name, entry in public_names(package).items():
        parser = subparsers.add_parser(name, help=entry.summary, description=entry.summary)
        if entry.file.name == "__init__.py":
            _add_group(parser.add_subparsers(), f"{package}/{name}")
        else:
            _add_function(parser, entry)


def _add_function(parser: argparse.ArgumentParser, entry: Entry) -> None:
    """Add the arguments of a command that is a function, and the options of a fit where it takes parts of one."""
    for argument in entry.own_arguments:
        if argument.name in ("config", "fit_args"):
            continue
        if argument.name in ("stack", "candidates"):
            _complete_configs(_add(parser, argument.name, nargs="*"))
        elif argument.default is None and not argument.keyword_only:
            _complete_files(parser.add_argument(argument.name, nargs="*"))
        elif argument.is_switch:
            _add(parser, argument.name, action="store_true")
        else:
            _complete_files(_add(parser, argument.name, choices=argument.choices or None))
    if entry.takes_fit:
        _add_trainer_options(parser, FIT)
    else:
        _add_config(parser)


def _add_trainer_options(parser: argparse.ArgumentParser, groups: Mapping[str, Iterable[Option]]) -> None:
    """Add the options of a command that LightningCLI runs, and the arguments of all classes of ours."""
    tricks, data = public_names("callbacks"), public_names("data")
    tasks = {name: entry for name, module in TASKS.items() if (entry := definition(name, module))}
    _add_config(parser)
    for option in itertools.chain(*groups.values()):
        flag, _, value = option.flag.rpartition(", ")[2].partition(" ")
        if flag in ("--config", "--help", "--model", "--data") or flag.startswith(PLACEHOLDERS):
            continue
        choices = value.strip("{}").split(",") if value.startswith("{") else None
        action = parser.add_argument(flag, choices=choices) if value else parser.add_argument(flag, action="store_true")
        if value in ("PATH", "DIR"):
            _complete_files(action)
    for sign in ("+", "-"):
        _add(parser, f"trainer.callbacks{sign}", choices=[*tricks])
    for name, trick in tricks.items():
        for argument in trick.arguments:
            _add(parser, f"trainer.callbacks.{name}.{argument.name}")
    _add(parser, "model", choices=[*tasks])
    for name in _arguments(tasks.values()):
        _add(parser, f"model.{name}")
    _add(parser, "model.optimizer.lr")
    _add(parser, "model.optimizer.weight_decay")
    _add(parser, "data", choices=[*data])
    for name in _arguments(data.values()):
        _complete_files(_add(parser, f"data.{name}"))


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


def _arguments(classes: Iterable[Entry]) -> list[str]:
    """Return the names of the arguments of classes, each once."""
    return list(dict.fromkeys(argument.name for entry in classes for argument in entry.arguments))
