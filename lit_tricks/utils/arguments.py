"""Checks of arguments by type and range, with one form of message for the whole package.

A check returns the value as a plain Python object: a NumPy scalar becomes a number, an array a list, a tuple a list.
Arguments are stored in checkpoints, and only plain objects load with ``weights_only=True``.

The checks reject what Python converts without a word: ``True`` for a number, 1.5 for an integer, a string for a list.
NaN and infinity are in no interval.

    self.alpha = number(self, "alpha", alpha, "(0, 1000]", "0.2 and 1 are usual.")
    MixUp(alpha=nan): alpha must be a number in (0, 1000]. 0.2 and 1 are usual.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

__all__ = [
    "MAX_INTEGER",
    "MAX_SEED",
    "MAX_SIDE",
    "choice",
    "flag",
    "integer",
    "integers",
    "invalid",
    "mapping",
    "names",
    "number",
    "numbers",
    "numbers_by_name",
    "path",
    "text",
    "texts",
]

MAX_INTEGER = 2**31 - 1  # no count here comes near it, and every library takes it
MAX_SIDE = 2**14  # pixels: a batch of a single such image takes gigabytes
MAX_SEED = 2**32 - 1  # the largest seed that `seed_everything` and NumPy take

_Float = TypeVar("_Float", float, float | None)
_Int = TypeVar("_Int", int, int | None)
_Str = TypeVar("_Str", str, str | None)
_Dict = TypeVar("_Dict", dict[str, Any], dict[str, Any] | None)
_Value = TypeVar("_Value")


class _UnfitError(Exception):
    """A value breaks its rule."""


def invalid(owner: object, message: str, **arguments: object) -> ValueError:
    """Return the error for arguments that break a rule.

    Args:
        owner: object whose arguments they are, or the name of a function.
        message: the rule and the fix, one sentence each.
        arguments: the values by name.
    """
    name = owner if isinstance(owner, str) else type(owner).__name__
    return ValueError(f"{name}({', '.join(f'{key}={_shown(value)}' for key, value in arguments.items())}): {message}")


def number(owner: object, name: str, value: _Float, interval: str, fix: str, or_none: str = "") -> _Float:
    """Return a number as a float, an integer as an int, or raise.

    Args:
        owner: object with the argument, or the name of a function.
        name: name of the argument.
        value: value of the argument.
        interval: the legal values, as "[0, 1)". NaN and infinity are in none.
        fix: sentence that helps to choose a value.
        or_none: meaning of None; empty if None is not legal.

    Raises:
        ValueError: if the value is no number of the interval.
    """
    return _checked(owner, name, value, lambda v: _number(v, interval), f"a number in {interval}", fix, or_none)


def integer(
    owner: object, name: str, value: _Int, least: int, fix: str, most: int = MAX_INTEGER, or_none: str = ""
) -> _Int:
    """Return a whole number as an int, or raise.

    Args:
        owner: object with the argument, or the name of a function.
        name: name of the argument.
        value: value of the argument.
        least: smallest legal value.
        fix: sentence that helps to choose a value.
        most: largest legal value.
        or_none: meaning of None; empty if None is not legal.

    Raises:
        ValueError: if the value is no integer of this range.
    """
    rule = f"an integer {_range(value, least, most)}"
    return _checked(owner, name, value, lambda v: _integer(v, least, most), rule, fix, or_none)


def flag(owner: object, name: str, value: bool) -> bool:
    """Return a truth value, or raise.

    Raises:
        ValueError: if the value is not True or False.
    """
    rule = "True or False"
    return _checked(owner, name, value, lambda v: _one_of(v, (True, False)), rule, "Write one of the two.")


def choice(owner: object, name: str, value: _Value, options: Sequence[object], fix: str = "") -> _Value:
    """Return one of several values, or raise. ``True`` is not 1 here, and 1.0 is not either.

    Args:
        owner: object with the argument, or the name of a function.
        name: name of the argument.
        value: value of the argument.
        options: the legal values.
        fix: sentence that helps to choose one.

    Raises:
        ValueError: if the value is none of them.
    """
    rule = f"one of {', '.join(map(repr, options))}"
    return _checked(owner, name, value, lambda v: _one_of(v, options), rule, fix or "Write one of these.")


def text(owner: object, name: str, value: _Str, fix: str, or_none: str = "") -> _Str:
    """Return a string, or raise.

    Raises:
        ValueError: if the value is no string, or has only spaces.
    """
    return _checked(owner, name, value, _text, "a string that is not empty", fix, or_none)


def path(owner: object, name: str, value: _Str, fix: str, or_none: str = "") -> _Str:
    """Return a path as a string, or raise. A ``Path`` in a checkpoint would keep it from loading safely.

    Raises:
        ValueError: if the value is no path, or an empty one.
    """
    return _checked(
        owner, name, value, lambda v: _text(os.fspath(v) if isinstance(v, os.PathLike) else v), "a path", fix, or_none
    )


def numbers(
    owner: object,
    name: str,
    value: object,
    interval: str,
    fix: str,
    length: int | None = None,
    or_none: str = "",
) -> Any:
    """Return a list of numbers as floats, or raise.

    Args:
        owner: object with the argument, or the name of a function.
        name: name of the argument.
        value: value of the argument.
        interval: the legal numbers, as "[0, 1)".
        fix: sentence that helps to choose them.
        length: required number of values; None is any number above 0.
        or_none: meaning of None; empty if None is not legal.

    Raises:
        ValueError: if the value is no such list.
    """
    rule = f"a list of {length or 'one or more'} numbers in {interval}"
    return _checked(owner, name, value, lambda v: _list(v, lambda x: _number(x, interval), length), rule, fix, or_none)


def integers(
    owner: object,
    name: str,
    value: object,
    least: int,
    fix: str,
    most: int = MAX_INTEGER,
    length: int | None = None,
    or_none: str = "",
    empty: bool = False,
) -> Any:
    """Return a list of whole numbers as ints, or raise. ``empty`` makes the empty list legal; see ``numbers``.

    Raises:
        ValueError: if the value is no such list.
    """
    rule = f"a list of {length or 'one or more'} integers {_range(None, least, most)}"
    return _checked(
        owner, name, value, lambda v: _list(v, lambda x: _integer(x, least, most), length, empty), rule, fix, or_none
    )


def texts(owner: object, name: str, value: object, fix: str, or_none: str = "") -> Any:
    """Return a list of strings, or raise. A single string is no list of its letters.

    Raises:
        ValueError: if the value is no list of one or more strings.
    """
    return _checked(owner, name, value, lambda v: _list(v, _text), "a list of one or more strings", fix, or_none)


def names(owner: object, name: str, value: object, fix: str, or_none: str = "") -> Any:
    """Return a list of strings and integers from 0 on, such as the keys and places of a batch, or raise.

    Raises:
        ValueError: if the value is no list of one or more of them.
    """

    def read(item: Any) -> str | int:
        return _text(item) if isinstance(item, str) else _integer(item, 0, MAX_INTEGER)

    rule = "a list of one or more names or indices"
    return _checked(owner, name, value, lambda v: _list(v, read), rule, fix, or_none)


def mapping(owner: object, name: str, value: _Dict, fix: str, or_none: str = "") -> _Dict:
    """Return a dictionary with strings as keys, or raise.

    Raises:
        ValueError: if the value is something else.
    """
    return _checked(owner, name, value, _mapping, "a dictionary of keyword arguments", fix, or_none)


def numbers_by_name(owner: object, name: str, value: object, interval: str, fix: str, or_none: str = "") -> Any:
    """Return a dictionary of floats by strings, or raise.

    Raises:
        ValueError: if the value is no such dictionary, or has no entry.
    """

    def read(found: Any) -> dict[str, float]:
        if not isinstance(found, Mapping) or not found:
            raise _UnfitError
        return {_text(key): _number(item, interval) for key, item in found.items()}

    rule = f"a dictionary of names and numbers in {interval}"
    return _checked(owner, name, value, read, rule, fix, or_none)


def _checked(
    owner: object, name: str, value: _Value, read: Callable[[Any], Any], rule: str, fix: str, or_none: str = ""
) -> _Value:
    if value is None and or_none:
        return value
    try:
        found: _Value = read(value)
        return found
    except _UnfitError:
        none = f", or None for {or_none}" if or_none else ""
        raise invalid(owner, f"{name} must be {rule}{none}. {fix}", **{name: value}) from None


def _plain(value: Any) -> Any:
    """Return a NumPy scalar or array, or a tensor, as Python's numbers and lists."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _number(value: Any, interval: str) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _UnfitError
    [parts] = re.findall(r"^([\[(])(\S+), (\S+)([])])$", interval)
    opening, low, high, closing = parts
    above, below = float(low), float(high)
    try:
        found = float(value)
    except OverflowError:
        raise _UnfitError from None
    is_in = (found > above or (found == above and opening == "[")) and (
        found < below or (found == below and closing == "]")
    )
    if not is_in or not math.isfinite(found):
        raise _UnfitError
    return int(value) if isinstance(value, Integral) else found


def _integer(value: Any, least: int, most: int) -> int:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise _UnfitError
    return int(value)


def _one_of(value: Any, options: Sequence[object]) -> Any:
    value = _plain(value)
    for option in options:
        if type(option) is type(value) and option == value:
            return option
    raise _UnfitError


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _UnfitError
    return str(value)


def _list(value: Any, read: Callable[[Any], Any], length: int | None = None, empty: bool = False) -> list[Any]:
    value = _plain(value)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _UnfitError
    if (not value and not empty) or (length is not None and len(value) != length):
        raise _UnfitError
    return [read(item) for item in value]


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _UnfitError
    return dict(value)


def _range(value: object, least: int, most: int) -> str:
    is_bounded = most != MAX_INTEGER or (isinstance(value, Integral) and int(value) > most)
    return f"from {least} to {most}" if is_bounded else f"of at least {least}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
