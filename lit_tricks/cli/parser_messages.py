"""Messages of jsonargparse in one line: what is wrong, and the nearest valid name where a name is unknown.

``RULES`` is tried from the top. ``tests/cli/test_parser_messages.py`` produces each message with the installed
jsonargparse. A message that no rule matches is shown as it is.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from lit_tricks.cli.catalog import configs
from lit_tricks.cli.parameters import parameter_names
from lit_tricks.tasks import TASKS
from lit_tricks.utils.config_files import among, nearest

__all__ = ["RULES", "shorten"]

CONTAINERS = {"list": "a list", "collections.abc.Sequence": "a list", "dict": "a dictionary"}


@dataclass
class Problem:
    """A message of jsonargparse, taken apart.

    Args:
        message: the message.
        known: arguments of the command; empty for the arguments that all commands share.
    """

    message: str
    known: list[str]

    def __post_init__(self) -> None:
        # jsonargparse tries a flag of a callback with the base class of all callbacks too, which has no arguments
        base = r"- Problem with given class_path 'lightning[\w.]*\.Callback':\n.*is not accepted"
        rest = re.sub(base, "", self.message)
        if "given class_path" in rest:
            self.message = rest
        self.keys, self.detail = _innermost(self.message)

    @property
    def argument(self) -> str:
        """The flag of the innermost value that does not fit."""
        return f"--{'.'.join(self.keys)}"

    @cached_property
    def types(self) -> list[str]:
        """The types that the value could have, in words."""
        pattern = r"Expected (?!a path but|a dot import|')(?:an? )?(.+?)(?:\. Got value: .*)?$"
        found = re.findall(pattern, self.detail.partition("Given value type")[0], re.MULTILINE)
        names = [re.sub(r"^<class '(.+)'>$|^typing\.(.+)$", r"\1\2", name) for name in found]
        words = [re.sub(r"^Literal\[(.+)\]$", r"one of \1", name.replace("NoneType", "null")) for name in names]
        return [CONTAINERS.get(word, word) for word in words]

    @property
    def class_path(self) -> str | None:
        """The class that was named."""
        first = r"dot import path string: (\S+)|a path but (\S+) either|class_path(?:=|': | )'([\w.]+)'"
        match = re.search(first, self.detail) or re.search(r"value: ([A-Za-z_][\w.]*)$", self.detail, re.MULTILINE)
        return match and next(filter(None, match.groups()))

    @property
    def base(self) -> str | None:
        """The first class whose subclasses the value could be of."""
        match = re.search(r"Subtypes: .*?<class '[\w.]*?(\w+)'>", self.detail)
        return match and match[1]


def shorten(message: str, known: Iterable[str] = ()) -> str:
    """Return a message of jsonargparse in one line.

    Args:
        message: the message.
        known: names of the arguments that the command has.
    """
    problem = Problem(message, list(known))
    for rule in RULES:
        match = re.search(rule.pattern, problem.detail if rule.in_detail else problem.message, re.MULTILINE)
        if match and (text := rule.format(problem, match)):
            return text
    return problem.message.strip()


def _no_command(problem: Problem, match: re.Match[str]) -> str:
    return "choose a command, such as fit; `lit-tricks --help` lists the commands."


def _unknown_command(problem: Problem, match: re.Match[str]) -> str:
    known = re.findall(r"\w+", match[2])
    return f"there is no command {match[1]!r}{nearest(match[1], known) or among(known)}"


def _unknown_argument_of_class(problem: Problem, match: re.Match[str]) -> str:
    owner = match[2] or re.findall(r"class_path '([\w.]+)'", problem.message[: match.start()])[-1]
    known = _parameters(owner)
    return f"{owner.rpartition('.')[2]} has no argument {match[1]!r}{nearest(match[1], known) or among(known)}"


def _missing_argument_of_class(problem: Problem, match: re.Match[str]) -> str:
    return f"{problem.argument}: {match[1]} needs {match[2]}."


def _unknown_argument(problem: Problem, match: re.Match[str]) -> str:
    name = match[1] or match[2]
    return f"there is no argument {name!r}{nearest(name, problem.known or _arguments())}"


def _extra_word(problem: Problem, match: re.Match[str]) -> str:
    word = match[1]
    remedy = f"; did you mean --config {word}?" if word in configs() else ". Options start with --."
    return f"{word!r} is not an option{remedy}"


def _missing_argument(problem: Problem, match: re.Match[str]) -> str:
    command, argument = match.groups()
    has_checkpoint = command != "fit" and argument == "data"
    remedy = ", or --ckpt_path, the checkpoint of a run on such data" if has_checkpoint else ""
    if (command, argument) == ("fit", "data"):
        remedy = ", or a configuration that has it, such as --config quickstart"
    return f"{command} needs --{argument}{remedy}."


def _other_class(problem: Problem, match: re.Match[str]) -> str | None:
    return problem.class_path and f"{problem.argument}: {problem.class_path!r} is no {match[1]}."


def _unknown_class(problem: Problem, match: re.Match[str]) -> str | None:
    """Return the message for a class that cannot be imported; None for text where another type is expected."""
    path = problem.class_path
    if path is None:
        return None
    missing = re.search(r"No module named '([\w.]+)'", problem.detail)
    if missing and not f"{path}.".startswith(f"{missing[1]}."):
        return None  # a module that this class needs
    known = _class_names()
    if path in known and problem.base:
        return f"{problem.argument}: {path!r} is no {problem.base}."
    close = nearest(path.rpartition(".")[2], known)
    is_absent = missing or "has no attribute" in problem.detail
    if close or is_absent or (problem.types in ([], ["null"]) and "given class_path" not in problem.detail):
        return f"{problem.argument}: {path!r} is unknown{close or '.'}"
    return None


def _failed_import(problem: Problem, match: re.Match[str]) -> str:
    return f"{problem.argument}: {match[1]!r} cannot be imported: {match[2]}"


def _other_type(problem: Problem, match: re.Match[str]) -> str | None:
    if not problem.keys or not problem.types:
        return None
    text = f"{problem.argument}: {match[1]!r} is not {' or '.join(problem.types)}."
    if {*problem.types} <= {"a list", "null"} and re.fullmatch(r"[^\s\[\]{}]+", match[1]):
        return f"{text} Write [{match[1]}]."
    return f"{text} Write '{{name: value}}'." if "a dictionary" in problem.types else text


class Rule(NamedTuple):
    """One kind of message, and its short form.

    Args:
        pattern: a regular expression that finds the kind.
        example: a message of the kind, or the part of it that matters.
        format: makes the line from the message and the match, or returns None to let a later rule try.
        in_detail: the pattern is searched in the lines about the innermost value only.
    """

    pattern: str
    example: str
    format: Callable[[Problem, re.Match[str]], str | None]
    in_detail: bool = False


RULES = (
    Rule(
        'expected "subcommand"',
        'expected "subcommand" to be one of {fit,test}, but it was not provided.',
        _no_command,
    ),
    Rule(
        r"subcommand: invalid choice: '([^']+)'.*\(choose from (.*)\)",
        "argument subcommand: invalid choice: 'fitt' (choose from 'fit', 'test')",
        _unknown_command,
    ),
    Rule(
        r"Option '([\w.]+)' is not accepted(?:\. Got value: Namespace\(class_path='([\w.]+)')?",
        "Option 'momentun' is not accepted. Got value: Namespace(class_path='torch.optim.SGD'",
        _unknown_argument_of_class,
    ),
    Rule(
        r"class_path '[\w.]*?(\w+)':\s+the following arguments are required: (.*)",
        "Problem with given class_path 'lit_tricks.data.ImageFolder':\n  the following arguments are required: root",
        _missing_argument_of_class,
    ),
    Rule(
        r"nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'",
        "unrecognized arguments: --trainr.max_epochs=1",
        _unknown_argument,
    ),
    Rule(
        r"nrecognized arguments: (?!-)(\S+)",
        "unrecognized arguments: quickstart",
        _extra_word,
    ),
    Rule(
        r"following arguments are required: (\w+)\.([\w.]+)",
        "the following arguments are required: fit.data",
        _missing_argument,
    ),
    Rule(
        r"(?:correspond to|to be) a subclass of (?:<class ')?(\w+)",
        "Import path torch.nn.Linear does not correspond to a subclass of Callback",
        _other_class,
        in_detail=True,
    ),
    Rule(
        "dot import path string: |a path but |has no attribute|No module named",
        "Expected a dot import path string: WarmupCosin",
        _unknown_class,
        in_detail=True,
    ),
    Rule(
        r"Problem with given class_path '([\w.]+)':\n\s+(.+)$",
        "Problem with given class_path 'needy.Net':\n  No module named 'absent'",
        _failed_import,
        in_detail=True,
    ),
    Rule(
        r"(?:Got|Given) value: (.*?)(?:\. Got value: .*)?$",
        "Expected a <class 'int'>. Got value: 3.5",
        _other_type,
        in_detail=True,
    ),
)


def _innermost(message: str) -> tuple[list[str], str]:
    """Return the keys of the last value that does not fit, and the lines about this value, which are indented more."""
    lines = message.splitlines()
    path: list[tuple[int, str]] = []
    start = 0
    for number, line in enumerate(lines, start=1):
        if match := re.search(r'Parser key "([\w.]+)"(?: element \d+)?:', line):
            path = [step for step in path if step[0] < _indent(line)] + [(_indent(line), match[1])]
            start = number
    outer = path[-1][0] if path else -1
    detail = itertools.takewhile(lambda line: not line.strip() or _indent(line) > outer, lines[start:])
    return [key for _, key in path], "\n".join(detail)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    return parameter_names(cls)


def _arguments() -> list[str]:
    """Return the arguments that every command has."""
    trainer = [f"trainer.{name}" for name in _parameters("lightning.pytorch.Trainer")]
    return ["ckpt_path", "config", "data", "images", "model", "name", "output", "seed_everything", *trainer]


def _class_names() -> list[str]:
    """Return the short class names of configurations: ours, Lightning's callbacks and loggers, torch's optimizers."""
    import lightning.pytorch.callbacks
    import lightning.pytorch.loggers
    import torch

    import lit_tricks.callbacks
    import lit_tricks.data

    modules = (lit_tricks.callbacks, lit_tricks.data, lightning.pytorch.callbacks, lightning.pytorch.loggers)
    optimizers = [name for name, value in vars(torch.optim).items() if isinstance(value, type)]
    return [*TASKS, *optimizers, *(name for module in modules for name in module.__all__)]
