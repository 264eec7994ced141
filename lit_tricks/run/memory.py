"""Measure the memory of a run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """The most memory that this process takes from now on.

    On GPUs: the most that torch had allocated at once, on the one where that was most. Without: by how much the memory
    of the process grew, at most, over what it has now; so that made before model and data it counts these and their
    training, and not Python and its libraries, some 600 MB. Workers of a loader and other ranks are processes of their
    own, and not counted.
    """

    def __init__(self) -> None:
        for device in _gpus():
            torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(OSError):  # not on Linux
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = _resident()

    def read(self) -> int | None:
        """Return bytes, or None if the system does not report them."""
        if allocated := max(map(torch.cuda.max_memory_allocated, _gpus()), default=0):
            return allocated
        now = _resident()
        if now is None or self._before is None:
            return None
        return max(0, now - self._before)  # Linux counts pages by the batch, so that a peak may read less than before


def _gpus() -> range:
    """Return the GPUs that this process uses."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


def _resident() -> int | None:
    """Peak of the resident memory, in bytes."""
    with contextlib.suppress(OSError):
        # and not `ru_maxrss`, which on Linux starts with the peak of the process that started this one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
