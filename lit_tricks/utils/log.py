"""The library's log lines in a terminal, for programs that have not set up logging."""

from __future__ import annotations

import logging
import sys

__all__ = ["log", "show_lines"]

log: logging.Logger = logging.getLogger("lit_tricks")


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 cannot subscript it
    """Writes lines to stderr while the program has no handler, as ``logging.lastResort`` does for warnings.

    Handlers of the program and of pytest's ``caplog`` get the lines as usual.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if any(handler is not self for handler in (*log.handlers, *logging.getLogger().handlers)):
            return
        self.setStream(sys.stderr)  # as it is now: a progress bar replaces it, to keep lines apart
        super().emit(record)


def show_lines() -> None:
    """Show the library's lines of level INFO, unless the program has set the level or a handler."""
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(_Fallback())
