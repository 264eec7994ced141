"""Configurations that are given by name or path, and near misses of names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lit_tricks.utils.bounded import parse_yaml, read_yaml

__all__ = [
    "CONFIGS",
    "among",
    "check_yaml",
    "class_in",
    "config_name",
    "find_config",
    "given",
    "model_in",
    "nearest",
    "resolve_configs",
    "strings_in",
]

_INSTALLED = Path(__file__).parents[1] / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "configs"


def given(args: list[str], flag: str) -> str | None:
    """Return the last value of a flag of a command line."""
    values = [args[i + 1] for i, arg in enumerate(args[:-1]) if arg == flag]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]
    return values[-1] if values else None


def resolve_configs(args: list[str]) -> tuple[list[str], list[Path]]:
    """Find the configurations that are given by name among those installed with the package.

    Args:
        args: arguments of a command line. A ``--config`` that is a bare name ("quickstart", "tricks/ema") and no file
            is searched. A ``--config`` that begins with a brace is JSON with the settings. ``--row`` is the same for
            sweeps, because W&B would show the value of a parameter "config" instead of the run's resolved
            configuration.

    Returns:
        The arguments with paths instead of names, and the paths.

    Raises:
        FileNotFoundError: for a name that is neither; the message lists the nearest names.
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
        check_yaml(path)
        paths.append(path)
        words[i if equals else i + 1] = f"{flag}={path}" if equals else str(path)
    return words, paths


def model_in(args: list[str]) -> str:
    """Return the name of the model's class, see ``class_in``."""
    return class_in(args, "model")


def class_in(args: list[str], part: str) -> str:
    """Return the class name of the model or the data, from the words of a command line and their configurations.

    Args:
        args: words of a command line, configurations as paths.
        part: "model" or "data".

    Returns:
        The name without its package; empty if none is given.
    """
    named: list[Any] = []
    for file in _configs_in(args):
        settings = (parse_yaml(file) if file.startswith("{") else read_yaml(file)).get(part) or {}
        named.append(settings.get("class_path") if isinstance(settings, dict) else settings)
    named += [given(args, f"--{part}"), given(args, f"--{part}.class_path")]
    return next((str(name).rpartition(".")[2] for name in reversed(named) if name), "")


def strings_in(args: list[str]) -> set[str]:
    """Return all text of the user: arguments of a command line, and values in its configurations."""
    found = {word.partition("=")[2] if word.startswith("-") and "=" in word else word for word in args}

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.add(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)

    for file in _configs_in(args):
        collect(parse_yaml(file) if file.startswith("{") else read_yaml(file))
    return found


def find_config(name: str) -> Path:
    """Return the file of a configuration by its name or path.

    Raises:
        FileNotFoundError: if there is none; the message lists the nearest names.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml", CONFIGS.parent / name):
        if path.is_file():
            return path
    names = (path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml"))
    known = sorted(str(name) for name in names if name.parts[0] != "sweeps")  # those are for `wandb sweep`
    wanted = name.removesuffix(".yaml").removeprefix("configs/")
    raise FileNotFoundError(f"--config {name}: there is no such file{nearest(wanted, known) or among(known)}")


def config_name(path: Path) -> str | None:
    """Return the name of a configuration that is installed with the package."""
    path = path.resolve()
    return path.relative_to(CONFIGS).with_suffix("").as_posix() if CONFIGS in path.parents else None


def _configs_in(args: list[str]) -> list[str]:
    """Return what follows ``--config``: files, or settings in braces."""
    files = [word for flag, word in itertools.pairwise(args) if flag in ("-c", "--config")]
    return files + [word.partition("=")[2] for word in args if word.startswith(("-c=", "--config="))]


def check_yaml(path: Path, option: str = "--config") -> None:
    """Raise ValueError, with the name of the file, unless a configuration is YAML that holds settings."""
    try:
        content = read_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        raise ValueError(f"{option} {path}{where} is not YAML: {getattr(error, 'problem', error)}.") from error
    except ValueError as error:
        raise ValueError(f"{option} {path}: {error}. Write the values out.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option} {path} holds no settings, but {content!r}.")


FORMER = {"off_epochs": "end"}  # arguments of earlier versions, and what to write instead


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question with the known name that is nearest, or nothing. Case matters only between equal names."""
    names = list(known)
    name = FORMER[name] if FORMER.get(name) in names else name
    lower = {each.lower(): each for each in reversed(names)}  # the first of several stays
    found = [name] if name in names else [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=1)]
    return f"; did you mean {found[0]!r}?" if found else ""


def among(known: list[str]) -> str:
    """Return the known names as the end of a sentence."""
    return f"; there are {', '.join(known)}." if known else "."
