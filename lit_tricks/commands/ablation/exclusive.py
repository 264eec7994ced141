"""The folder of an ablation or a race: used by one process at a time, and judged by the content of its files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_tricks.utils.files import MOST_RESULTS, locked, read_regular

__all__ = ["alone_in", "read_object"]


@contextlib.contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Keep other ablations and races out of a folder. The lock ends with the process, even at SIGKILL.

    Args:
        folder: created if it does not exist.
        command: name of the command that uses the folder, for messages.

    Raises:
        RuntimeError: if another process uses the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", timeout=0))
        except TimeoutError:
            raise RuntimeError(
                f"{command}: another ablation or race uses {folder}. Wait for its end, or choose another folder with "
                "--out."
            ) from None
        yield


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if it is not there, cut off, or not an object."""
    try:
        content = json.loads(read_regular(path, MOST_RESULTS))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
