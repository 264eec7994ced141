"""Errors of the command line in one line that names the culprit and the remedy."""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import re
from collections.abc import Iterable
from typing import Any

from lit_tricks.data.io.worker_errors import explain_death
from lit_tricks.tasks import TASKS
from lit_tricks.utils.config_files import among, nearest

__all__ = ["explain"]


def explain(error: Exception, arguments: Iterable[str] = ()) -> tuple[str, int]:
    """One message, and the exit code, for whatever a command raised that takes these arguments."""
    if str(error).startswith("Error(s) in loading state_dict for "):
        key = re.search(r'"([\w.]+)"|size mismatch for ([\w.]+)', str(error))
        first = f"; they differ in {key[1] or key[2]!r} first" if key else ""
        text = f"the checkpoint is of another architecture than the model{first}. Give the settings it was made with."
        return text, 1
    if isinstance(error, argparse.ArgumentError):
        return _shorten(error.message, arguments), 2
    while error.__cause__ and "Does not validate against any of the Union subtypes" in str(error):
        error = error.__cause__  # type: ignore[assignment]  # what a class said of its arguments
    text = str(error).strip() or type(error).__name__
    if match := re.match(r"Found more than one stateful callback of type `(\w+)`", text):
        text = f"{match[1]} is in the list of callbacks twice; --print_config shows where: leave one out."
    if "Original Traceback" in text:  # a loader's worker wraps its error in the text of the traceback
        text = re.split(r"\n\w+(?:\.\w+)*: ", text)[-1].strip()
    text = explain_death(error) or text
    if isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | NameError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"  # such an error does not explain itself
    return text, 1


def _shorten(message: str, arguments: Iterable[str]) -> str:
    """The heart of one of jsonargparse's messages, and the nearest valid name where one is unknown."""
    # a flag of a callback is tried on the base of all callbacks as well, which takes none
    shorter = re.sub(r"- Problem with given class_path 'lightning[\w.]*\.Callback':\n.*is not accepted", "", message)
    message = shorter if "given class_path" in shorter else message
    keys, heart = _innermost(message)
    argument = f"--{'.'.join(keys)}"
    if 'expected "subcommand"' in message:
        return "say what to do, such as fit; `lit-tricks --help` lists the commands."
    if match := re.search(r"subcommand: invalid choice: '([^']+)'.*\(choose from (.*)\)", message):
        known = re.findall(r"\w+", match[2])
        return f"there is no command {match[1]!r}{nearest(match[1], known) or among(known)}"
    if match := re.search(
        r"Option '([\w.]+)' is not accepted(?:\. Got value: Namespace\(class_path='([\w.]+)')?", message
    ):
        owner = match[2] or re.findall(r"class_path '([\w.]+)'", message[: match.start()])[-1]
        known = _parameters(owner)
        name = owner.rpartition(".")[2]
        return f"{name} has no argument {match[1]!r}{nearest(match[1], known) or among(known)}"
    if match := re.search(r"class_path '[\w.]*?(\w+)':\s+the following arguments are required: (.*)", message):
        return f"{argument}: {match[1]} needs {match[2]}."
    if match := re.search(r"nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message):
        name = match[1] or match[2]
        return f"there is no argument {name!r}{nearest(name, list(arguments) or _arguments())}"
    if match := re.search(r"following arguments are required: (\w+)\.([\w.]+)", message):
        remedy = (
            "" if match[1] == "fit" or match[2] != "data" else ", or --ckpt_path, the checkpoint of a run on such data"
        )
        return f"{match[1]} needs --{match[2]}{remedy}."
    kinds = re.findall(
        r"Expected (?!a path but|a dot import|')(?:an? )?(.+?)(?:\. Got value: .*)?$",
        heart.partition("Given value type")[0],
        re.MULTILINE,
    )
    kinds = [re.sub(r"^<class '(.+)'>$|^typing\.(.+)$", r"\1\2", kind).replace("NoneType", "null") for kind in kinds]
    kinds = [re.sub(r"^Literal\[(.+)\]$", r"one of \1", kind) for kind in kinds]
    if match := re.search(
        r"dot import path string: (\S+)|a path but (\S+) either|class_path(?:=|': | )'([\w.]+)'", heart
    ):
        name = match[1] or match[2] or match[3]
        if base := re.search(r"(?:correspond to|to be) a subclass of (?:<class ')?(\w+)", heart):
            return f"{argument}: {name!r} is no {base[1]}."
        close = nearest(name.rpartition(".")[2], _class_names())
        if close or kinds in ([], ["null"]) or re.search("No module named|has no attribute", heart):
            return f"{argument}: {name!r} is unknown{close or '.'}"
    value = re.search(r"(?:Got|Given) value: (.*?)(?:\. Got value: .*)?$", heart, re.MULTILINE)
    if keys and kinds and value:
        return f"{argument}: {value[1]!r} is not {' or '.join(kinds)}."
    return message.strip()


def _innermost(message: str) -> tuple[list[str], str]:
    """The keys that lead to the last value that did not fit, and the lines about it, which are indented below it."""
    lines = message.splitlines()
    path: list[tuple[int, str]] = []
    start = 0
    for number, line in enumerate(lines, start=1):
        if match := re.search(r'Parser key "([\w.]+)"(?: element \d+)?:', line):
            path = [step for step in path if step[0] < _indent(line)] + [(_indent(line), match[1])]
            start = number
    outer = path[-1][0] if path else -1
    heart = itertools.takewhile(lambda line: not line.strip() or _indent(line) > outer, lines[start:])
    return [key for _, key in path], "\n".join(heart)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    return [p for p in inspect.signature(cls).parameters if p not in ("args", "kwargs")]


def _arguments() -> list[str]:
    """Arguments that every command has."""
    trainer = [f"trainer.{name}" for name in _parameters("lightning.pytorch.Trainer")]
    return ["ckpt_path", "config", "data", "images", "model", "name", "output", "seed_everything", *trainer]


def _class_names() -> list[str]:
    """Short names that a configuration can use: ours, Lightning's callbacks and loggers, torch's optimizers."""
    import lightning.pytorch.callbacks
    import lightning.pytorch.loggers
    import torch

    import lit_tricks.callbacks
    import lit_tricks.data

    modules = (lit_tricks.callbacks, lit_tricks.data, lightning.pytorch.callbacks, lightning.pytorch.loggers)
    optimizers = [name for name, value in vars(torch.optim).items() if isinstance(value, type)]
    return [*TASKS, *optimizers, *(name for module in modules for name in module.__all__)]
