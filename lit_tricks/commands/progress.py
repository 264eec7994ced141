"""A progress bar for commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

__all__ = ["progress"]

_bars: list[str] = []


@contextmanager
def progress(what: str, total: float, done: int = 0) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on a terminal without another bar. Call the result to report progress."""
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
