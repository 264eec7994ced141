"""The folder of an ablation: used by one process at a time, and judged by what its files hold."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_tricks.utils.files import read_regular

__all__ = ["alone_in", "read_object"]

MOST_BYTES = 2**28


@contextlib.contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Keep other processes out of a folder. The lock ends with the process, however that ends.

    Args:
        folder: is made if it is not there.
        command: that uses it, for messages.

    Raises:
        RuntimeError: if another process uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"another lit-tricks {command} uses {folder}: wait until it has ended, or choose another folder with --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if it is not there, cut off, or not an object."""
    try:
        content = json.loads(read_regular(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
