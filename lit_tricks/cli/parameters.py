"""Names of the arguments that a class takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["parameter_names"]


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments, with those that a class passes on to its base class as ``**kwargs``."""
    names: list[str] = []
    for owner in inspect.getmro(function)[:-1] if isinstance(function, type) else (function,):
        parameters = inspect.signature(owner).parameters.values()
        names += [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    return list(dict.fromkeys(names))
