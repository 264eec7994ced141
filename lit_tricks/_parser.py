"""What a user types: configurations by name, and errors in one line that names the culprit and the remedy."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lit_tricks.data.io.worker_errors import explain_death

__all__ = ["CONFIGS", "config_name", "explain", "find_config", "given", "model_in", "resolve_configs"]

_INSTALLED = Path(__file__).parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


def given(args: list[str], flag: str) -> str | None:
    """Last value of a flag among the words of a command line."""
    values = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == flag]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]
    return values[-1] if values else None


def resolve_configs(args: list[str]) -> tuple[list[str], list[Path]]:
    """Find the configurations that are given by name among those installed with the package.

    Args:
        args: words of a command line. A ``--config`` that is no file but a bare name ("quickstart", "tricks/ema") is
            looked up. One that begins with a brace is JSON, and holds the settings themselves; so does ``--row``, for
            sweeps: of a parameter "config" W&B would show the value in the place of the run's resolved configuration.

    Returns:
        The words with paths in place of names, and the paths.

    Raises:
        FileNotFoundError: for a name that is neither; it tells the nearest names.
        ValueError: for a file that is no YAML, or holds no settings.
    """
    args = ["--config" + arg[5:] if arg.startswith("--row={") else arg for arg in args]
    words, paths = list(args), []
    for i, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if flag not in ("-c", "--config") or not (equals or i + 1 < len(args)):
            continue
        if (value if equals else args[i + 1]).startswith("{"):
            continue
        path = find_config(value if equals else args[i + 1])
        _check_yaml(path)
        paths.append(path)
        words[i if equals else i + 1] = f"{flag}={path}" if equals else str(path)
    return words, paths


def model_in(args: list[str]) -> str:
    """Name of the model's class among the words of a command line and in their configurations, or nothing."""
    files = [word for flag, word in itertools.pairwise(args) if flag in ("-c", "--config")]
    files += [word.partition("=")[2] for word in args if word.startswith(("-c=", "--config="))]
    named: list[Any] = []
    for file in files:
        text = file if file.startswith("{") else Path(file).read_text(encoding="utf-8")
        model = yaml.safe_load(text).get("model") or {}
        named.append(model.get("class_path") if isinstance(model, dict) else model)
    named += [given(args, "--model"), given(args, "--model.class_path")]
    return next((str(name).rpartition(".")[2] for name in reversed(named) if name), "")


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


def find_config(name: str) -> Path:
    """The file of a configuration that is given by name or path.

    Raises:
        FileNotFoundError: if there is none; it tells the nearest names.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml", CONFIGS.parent / name):
        if path.is_file():
            return path
    names = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml"))
    known = sorted(str(name) for name in names if name.parts[0] != "sweeps")  # those are for `wandb sweep`
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    raise FileNotFoundError(f"--config {name}: there is no such file{_nearest(wanted, known) or _among(known)}")


def config_name(path: Path) -> str | None:
    """The name of a configuration that is installed with the package."""
    path = path.resolve()
    return path.relative_to(CONFIGS).with_suffix("").as_posix() if CONFIGS in path.parents else None


def _check_yaml(path: Path) -> None:
    """The parser would not say which file it can not read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        raise ValueError(f"--config {path}{where} is not YAML: {getattr(error, 'problem', error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no settings, but {content!r}.")


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
        return f"there is no command {match[1]!r}{_nearest(match[1], known) or _among(known)}"
    if match := re.search(
        r"Option '([\w.]+)' is not accepted(?:\. Got value: Namespace\(class_path='([\w.]+)')?", message
    ):
        owner = match[2] or re.findall(r"class_path '([\w.]+)'", message[: match.start()])[-1]
        known = _parameters(owner)
        name = owner.rpartition(".")[2]
        return f"{name} has no argument {match[1]!r}{_nearest(match[1], known) or _among(known)}"
    if match := re.search(r"class_path '[\w.]*?(\w+)':\s+the following arguments are required: (.*)", message):
        return f"{argument}: {match[1]} needs {match[2]}."
    if match := re.search(r"nrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message):
        name = match[1] or match[2]
        return f"there is no argument {name!r}{_nearest(name, list(arguments) or _arguments())}"
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
        nearest = _nearest(name.rpartition(".")[2], _class_names())
        if nearest or kinds in ([], ["null"]) or re.search("No module named|has no attribute", heart):
            return f"{argument}: {name!r} is unknown{nearest or '.'}"
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
    return [*lit_tricks._MODULES, *optimizers, *(name for module in modules for name in module.__all__)]


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _among(known: list[str]) -> str:
    return f"; there are {', '.join(known)}." if known else "."
