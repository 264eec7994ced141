"""The progress bar of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

__all__ = ["progress"]


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar, where there is a terminal and no other bar. It gives the function that advances it."""
    console = Console(stderr=True)
    if not console.is_terminal or _bars:
        yield lambda done: None
        return
    _bars.append(what)
    try:
        with Progress(console=console) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda done: bar.advance(task, done)
    finally:
        _bars.remove(what)


_bars: list[str] = []
