"""Errors of the command line in one line that names the culprit and the remedy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from lit_tricks.cli.parser_messages import shorten
from lit_tricks.data.io.worker_errors import explain_death

__all__ = ["explain"]


def explain(error: Exception, arguments: Iterable[str] = ()) -> tuple[str, int]:
    """Return a message of one line and the exit code for an error.

    Args:
        error: what a command raised.
        arguments: names of the arguments that the command has.
    """
    if str(error).startswith("Error(s) in loading state_dict for "):
        key = re.search(r'"([\w.]+)"|size mismatch for ([\w.]+)', str(error))
        first = f"; they differ in {key[1] or key[2]!r} first" if key else ""
        text = f"the checkpoint is of another architecture than the model{first}. Give the settings it was made with."
        return text, 1
    if isinstance(error, argparse.ArgumentError):
        return shorten(error.message, arguments), 2
    while error.__cause__ and "Does not validate against any of the Union subtypes" in str(error):
        error = error.__cause__  # type: ignore[assignment]  # message of a class about its arguments
    text = str(error).strip() or type(error).__name__
    if match := re.match(r"Found more than one stateful callback of type `(\w+)`", text):
        text = f"{match[1]} is in the list of callbacks twice; --print_config shows where: leave one out."
    if "Original Traceback" in text:  # a loader's worker wraps its error in the text of the traceback
        text = re.split(r"\n\w+(?:\.\w+)*: ", text)[-1].strip()
    text = explain_death(error) or text
    if isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | NameError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"  # such an error does not explain itself
    return text, 1
