"""The progress bar of what takes more than a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

__all__ = ["progress"]

_bars: list[str] = []


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, where there is a terminal and no other bar."""
    console = Console(stderr=True)
    if not console.is_terminal or _bars:
        yield lambda done: None
        return
    _bars.append(what)
    try:
        with Progress(console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.advance(task, done)
    finally:
        _bars.remove(what)
