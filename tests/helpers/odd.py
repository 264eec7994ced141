"""Odd values for arguments: rejected by name, or legal by a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lit_tricks.cli.errors import explain

__all__ = ["ODD", "accepted", "legal", "message_of"]

# The values, and how they are written in YAML
ODD: dict[str, Any] = {
    "null": None,
    '""': "",
    '"nan"': "nan",
    "true": True,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "1000000000000000000000000000000": 10**30,
    "1.0e+308": 1e308,
    ".inf": math.inf,
    ".nan": math.nan,
    "[]": [],
    "{}": {},
}


def legal(table: dict[str, dict[str, str]], owner: str, argument: str) -> set[str]:
    return set(table[owner].get(argument, "").split())


def message_of(make: Callable[[], Any], *errors: type[Exception]) -> str | None:
    """The message of the error, in one line as the command line prints it. None where there is no error."""
    try:
        make()
    except errors as error:
        return explain(error)[0]
    return None


def accepted(make: Callable[[Any], Any], argument: str) -> set[str]:
    """The odd values that are taken. Every other one must be rejected with an error that names the argument."""
    messages = {
        written: message_of(lambda v=value: make(v), ValueError, TypeError, FileNotFoundError)
        for written, value in ODD.items()
    }
    rejected = {written: message for written, message in messages.items() if message is not None}
    names = (f"{argument}=", "name=", "'nan/", "/nan'")  # also the name of a network, and a file or folder
    wrong = [each for each in rejected.values() if not any(name in each for name in names) or "\n" in each]
    assert not wrong, wrong
    return set(ODD) - set(rejected)
