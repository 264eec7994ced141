"""Report a killed loading process as one clear error."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import Any

from torch.utils.data import DataLoader

from lit_tricks._compat import stop_workers, workers_of

__all__ = ["EvalLoader", "explain_death", "guarded"]


SECONDS = 30  # in which a killed process ends, on a machine that has much else to do


def guarded(loader: DataLoader[Any], begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield the batches of a loader.

    Args:
        loader: the loader.
        begin: starts an epoch. Persistent workers answer at this point, so that they can fail here, too.

    Raises:
        RuntimeError: if one of its workers was killed; the message names the remedy.
    """
    try:
        yield from begin()
    except (RuntimeError, OSError, EOFError) as error:  # a closed connection, or torch's own message
        message = _death_of_worker(loader, error) or explain_death(error)
        if message is None:
            raise
        raise RuntimeError(message) from error


def explain_death(error: BaseException) -> str | None:
    """Return a clearer error for torch's errors about a dead worker, or None for other errors."""
    match = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited)", str(error))
    return _message(match[1], match[2] or "") if match else None


class EvalLoader(DataLoader[Any]):
    """A loader whose error names the remedy when a worker was killed."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return guarded(self, super().__iter__)


def _death_of_worker(loader: DataLoader[Any], error: Exception) -> str | None:
    workers = workers_of(loader)
    if isinstance(error, OSError | EOFError):  # a connection breaks some time before the process is gone
        broken = isinstance(error, ConnectionError | EOFError)  # other errors mostly come from a file
        connection.wait([worker.sentinel for worker in workers], timeout=SECONDS if broken else 1)
        for worker in workers:
            worker.join(0.1)
    dead = [worker for worker in workers if worker.exitcode]
    if not dead:
        return None
    stop_workers(loader)
    code = dead[0].exitcode or 0
    return _message(str(dead[0].pid), signal.strsignal(-code) or "" if code < 0 else "")


def _message(pid: str, how: str) -> str:
    if how.startswith("Bus"):
        cause = "the shared memory, /dev/shm, is full: give it more (docker run --shm-size=8g)"
    else:
        cause = "if you did not do that, the machine or the container ran out of memory: give it more"
    return (
        f"a process that loads images (pid {pid}) was killed{f' ({how})' if how else ''}; {cause}, or use fewer such "
        "processes (num_workers) or smaller batches (batch_size). A run resumes from its last checkpoint."
    )
