"""CPU time of this process and of the processes that it started."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

__all__ = ["cpu_seconds"]


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its workers, with all their threads.

    Other work on the machine changes this time little, whereas a run that shares its cores takes longer by the clock.
    """
    total = time.process_time()
    if sys.platform != "win32":
        import resource  # not on Windows

        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        total += ended.ru_utime + ended.ru_stime
    for worker in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # not on Linux: the worker counts as busy all the time
            total += time.perf_counter()
        else:
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
