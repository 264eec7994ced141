"""The command line, ``lit-tricks``.

``main`` imports torch and Lightning only for the commands that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_tricks.cli.entry import main

if TYPE_CHECKING:
    from lit_tricks.cli.app import TricksCLI

__all__ = ["TricksCLI", "main"]


def __getattr__(name: str) -> Any:
    if name == "TricksCLI":
        from lit_tricks.cli.app import TricksCLI

        return TricksCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
