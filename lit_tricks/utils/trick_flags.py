"""Flags about one trick of a stack: ``--trainer.callbacks.MixUp.alpha 1``, ``--trainer.callbacks-=MixUp``."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import yaml

__all__ = ["CALLBACKS", "REMOVE", "TrickFlag", "apply_to_rows", "behind_configs", "find_trick_flags"]

CALLBACKS = "--trainer.callbacks"
REMOVE = f"{CALLBACKS}-"
CLASS = r"(?:[a-z_]\w*\.)*_*[A-Z]\w*"  # a class name starts with a capital; before it there may be a package


@dataclass(frozen=True)
class TrickFlag:
    """A flag about one callback.

    Args:
        flag: as it is written, without its value.
        name: name or import path of the callback's class; "" is the last callback of the list.
        argument: dotted name of the argument to set; "" takes the callback out of the list.
        value: as it is written; None where it is missing.
        place: of the flag among the words.
        words: how many words the flag and its value are.
    """

    flag: str
    name: str
    argument: str
    value: str | None
    place: int
    words: int

    @property
    def is_named(self) -> bool:
        """Return whether the flag names its callback."""
        return bool(self.name) or self.flag == REMOVE


def find_trick_flags(words: Sequence[str]) -> Iterator[TrickFlag]:
    """Yield the flags of a command line for one callback."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        parsed = _parse(flag)
        if parsed is None:
            continue
        following = words[place + 1] if place + 1 < len(words) else None
        yield TrickFlag(flag, *parsed, value if equals else following, place, 1 if equals or following is None else 2)


def behind_configs(words: Sequence[str]) -> list[str]:
    """Move the flags that name their callback behind the last configuration, which may add the callback."""
    configs = [place for place, word in enumerate(words) if re.match(r"(-c|--config)(=|$)", word)]
    if not configs:
        return list(words)
    last = configs[-1] + (1 if "=" in words[configs[-1]] else 2)
    moved = [flag for flag in find_trick_flags(words) if flag.is_named and flag.place < last]
    places = {place for flag in moved for place in range(flag.place, flag.place + flag.words)}
    stays = [word for place, word in enumerate(words[:last]) if place not in places]
    return [*stays, *(words[place] for place in sorted(places)), *words[last:]]


def apply_to_rows(words: Sequence[str], rows: Iterable[dict[str, Any]]) -> list[str]:
    """Apply flags that name a callback to the settings of several runs.

    Flags of a callback that a run lacks are dropped, because ``lit-tricks fit`` would reject them.

    Args:
        words: arguments of every run.
        rows: the settings that differ between the runs, changed in place.

    Returns:
        The arguments without the flags of callbacks in a row.
    """
    rows, done = list(rows), set()
    for flag in find_trick_flags(words):
        if not flag.is_named or flag.value is None or not (flag.argument or flag.flag == REMOVE):
            continue
        name = flag.value if flag.flag == REMOVE else flag.name
        for tricks in (tricks for row in rows for tricks in _callbacks_in(row)):
            place = _place_of(name, tricks)
            if place is None:
                continue
            done |= {*range(flag.place, flag.place + flag.words)}
            if flag.flag == REMOVE:
                del tricks[place]
            else:
                tricks[place] = _with_argument(tricks[place], flag.argument, flag.value)
    return [word for place, word in enumerate(words) if place not in done]


def _callbacks_in(row: dict[str, Any]) -> list[list[Any]]:
    """Return the lists of callbacks in the settings of a run."""
    return [value for key, value in row.get("trainer", {}).items() if key.rstrip("+") == "callbacks" and value]


def _place_of(name: str, tricks: Sequence[Any]) -> int | None:
    names = [str(trick.get("class_path") if isinstance(trick, dict) else trick).rpartition(".")[2] for trick in tricks]
    short = name.rpartition(".")[2]
    return names.index(short) if short in names else None


def _with_argument(trick: Any, argument: str, text: str) -> dict[str, Any]:
    """Return the settings of a trick with another value of an argument, given by its dotted name."""
    changed: dict[str, Any] = copy.deepcopy(trick) if isinstance(trick, dict) else {"class_path": trick}
    value = yaml.safe_load(text)
    with contextlib.suppress(TypeError, ValueError):  # YAML takes 1e-4 for text
        value = float(value) if isinstance(value, str) else value
    *groups, last = ["init_args", *argument.split(".")]
    reduce(lambda found, key: found.setdefault(key, {}), groups, changed)[last] = value
    return changed


def _parse(flag: str) -> tuple[str, str] | None:
    """Return name and argument; with the name "", the flag is about the last callback."""
    if flag == REMOVE:
        return "", ""
    if not flag.startswith(f"{CALLBACKS}.") or flag == f"{CALLBACKS}.help":
        return None
    rest = flag.removeprefix(f"{CALLBACKS}.")
    if match := re.fullmatch(rf"({CLASS})(?:\.(?:init_args\.)?(.+))?", rest):
        return match[1], match[2] or ""
    return "", rest
