"""Runs end with the process that started them, even when SIGKILL ends this process.

The parent holds one end of a pipe, and the other end is the standard input of the run. The system closes the pipe when
the parent ends. This works on every platform. Linux has a signal for the death of a parent, other systems do not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

__all__ = ["PIPE", "end_with_parent", "held_pipe"]

PIPE = "LIT_TRICKS_PARENT_PIPE"  # the environment variable that identifies the pipe


@contextlib.contextmanager
def held_pipe() -> Iterator[tuple[int, dict[str, str]]]:
    """Hold a pipe open for a process that calls ``end_with_parent``.

    Yields:
        The standard input of the process, and the variable for its environment.
    """
    read, write = os.pipe()
    try:
        yield read, {PIPE: _identity(read)}
    finally:
        os.close(read)
        os.close(write)


def end_with_parent() -> None:
    """Send SIGTERM to this process when the holder of its pipe ends. Do nothing without such a pipe."""
    try:
        is_held = os.environ.get(PIPE) == _identity(0)
    except OSError:  # standard input is closed
        return
    if is_held:  # a process that inherits the variable, and not the pipe, has another parent
        threading.Thread(target=_wait, name="end with parent", daemon=True).start()


def _wait() -> None:
    try:
        while os.read(0, 1):
            pass
    except OSError:  # the run has closed its standard input
        return
    os.kill(os.getpid(), signal.SIGTERM)


def _identity(file: int) -> str:
    found = os.fstat(file)
    return f"{found.st_dev}:{found.st_ino}"
