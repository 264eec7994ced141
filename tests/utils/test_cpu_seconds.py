"""CPU time of this process and its workers."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from lit_tricks.utils.cpu_seconds import cpu_seconds


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_process_that_waits_costs_nothing_and_one_that_works_costs_its_time() -> None:
    start = cpu_seconds()
    time.sleep(0.3)
    waited = cpu_seconds() - start
    spin(0.3)
    assert waited < 0.1
    assert 0.25 < cpu_seconds() - start - waited < 0.5


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_count_while_they_run_and_after_their_end() -> None:
    start = cpu_seconds()
    worker = multiprocessing.get_context("fork").Process(target=spin, args=(0.4,))
    worker.start()
    worker.join(0.3)
    running = cpu_seconds() - start
    worker.join()
    assert 0 < running <= cpu_seconds() - start
    assert 0.35 < cpu_seconds() - start < 1
