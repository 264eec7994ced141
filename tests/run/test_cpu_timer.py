"""The CPU time of a training, which resumed runs add up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_tricks.run.cpu_timer import CPUTimer


def on(device: str) -> Any:
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


def test_seconds_of_a_resumed_run_are_of_both_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lit_tricks.run.cpu_timer.cpu_seconds", lambda: now[0])
    first: Any = CPUTimer()
    first.on_train_start(on("cpu"), None)
    now[0] += 7
    state = first.state_dict()
    now[0] += 100  # it is killed, and another process starts later
    second: Any = CPUTimer()
    second.load_state_dict(state)
    second.on_train_start(on("cpu"), None)
    now[0] += 5
    second.on_train_end(on("cpu"), None)
    now[0] += 3  # a test of the best checkpoint
    assert (state, second.seconds) == ({"seconds": 7.0}, 12.0)


def test_a_gpu_has_no_cpu_time() -> None:
    timer: Any = CPUTimer()
    timer.on_train_start(on("cuda"), None)
    timer.on_train_end(on("cuda"), None)
    assert timer.seconds is None
    timer.load_state_dict(timer.state_dict())
    assert timer.seconds is None
