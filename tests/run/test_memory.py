"""Peak memory: of the run, not of what was there before, nor of the process that started this one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from lit_tricks.run import memory
from lit_tricks.run.memory import PeakMemory

MIB = 1 << 20
# Imports the file alone, without torch, which is large itself.
ONLY_THE_FILE = (
    "import importlib.util, sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
    "sys.modules['torch'].cuda = types.SimpleNamespace(is_initialized=lambda: False, max_memory_allocated=None); "
    f"spec = importlib.util.spec_from_file_location('memory', {memory.__file__!r}); "
    "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be forgotten")
def test_peak_leaves_out_memory_from_before() -> None:
    """In its own process, whose memory no other test has left room in."""
    script = f"""
import numpy as np
{ONLY_THE_FILE}
kept = np.ones(64 << 20, np.uint8)
freed = np.ones(128 << 20, np.uint8)
del freed
memory = module.PeakMemory()
print(memory.read())
held = np.ones(96 << 20, np.uint8)
del held  # a peak that is over
print(memory.read())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, peak = map(int, found.split())
    assert 0 <= first < 16 * MIB
    assert 90 * MIB < peak < 120 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="Linux hands the peak of a parent down")
def test_peak_leaves_out_the_parent_process() -> None:
    script = f"{ONLY_THE_FILE}; print(module._resident())"
    large = np.ones(256 * MIB, np.uint8)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(found) < 64 * MIB < large.nbytes


def test_a_gpu_counts_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that took most, and from now on."""
    reset: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: [0, 5000][device])
    assert PeakMemory().read() == 5000
    assert reset == [0, 1]


def test_a_peak_that_reads_less_than_what_was_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100 * MIB, 100 * MIB - 24_576])
    monkeypatch.setattr(memory, "_resident", lambda: next(readings))
    assert PeakMemory().read() == 0
