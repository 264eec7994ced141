"""Set-up of all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import once as _once  # noqa: F401
from helpers.launch import results_of, two_processes
from helpers.shared import made_once

SHORT = "not slow and not full"  # the marks of a run without options, in pyproject.toml
MOST_WORKERS = 8

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in the background of a shell, where tests of Ctrl-C would hang
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # sums in one order, for comparisons bit by bit; and the tests share the cores of the machine


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return the number of processes for ``-n auto``: none for single files or tests, which start faster that way."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if all(".py" in argument for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    """Run a test that is named on the command line, whatever its marks."""
    if config.option.markexpr == SHORT and any("::" in argument for argument in config.args):
        config.option.markexpr = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that share a launch first, so that one worker runs most of them and the launch ends early."""
    items.sort(key=lambda item: "launched" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection, which Lightning and torch start. Collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


# What Lightning sets for good when it starts a group of processes, even of one: processes that are started later would
# wait for the others of the group.
OF_A_GROUP = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "OMP_NUM_THREADS", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    """Undo what Lightning does to the process when it starts a group of processes."""
    before = {name: os.environ.get(name) for name in OF_A_GROUP}
    yield
    changed = {name: value for name, value in before.items() if os.environ.get(name) != value}
    for name, value in changed.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if "OMP_NUM_THREADS" in changed:
        torch.set_num_threads(1)


@pytest.fixture
def restored_interrupts() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files in the format of CIFAR, whose checksums are of course not the real ones."""
    from helpers.datamodules import write_cifar

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return write_cifar(tmp_path)


# Scripts that two processes run, by the fixture that gives what they ended with. One launch for all of them is fastest.
SCRIPTS = {"ranks": "distributed", "weights_ranks": "weights_distributed", "bn_ranks": "precise_bn_distributed"}


@pytest.fixture(scope="session")
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each of two processes, by script, for the scripts that this session needs."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    scripts = [script for fixture, script in SCRIPTS.items() if fixture in needed]
    folder = made_once(tmp_path_factory, "distributed", lambda folder: two_processes(scripts, folder))
    return {script: results_of(script, folder) for script in scripts}


@pytest.fixture(scope="session")
def ranks(launched: dict[str, Any]) -> Any:
    """``ranks[rank][strategy][trick]``, for every trick."""
    return launched["distributed"]


@pytest.fixture(scope="session")
def weights_ranks(launched: dict[str, Any]) -> Any:
    """``weights_ranks[rank][case]``, of averages."""
    return launched["weights_distributed"]


@pytest.fixture(scope="session")
def bn_ranks(launched: dict[str, Any]) -> Any:
    """``bn_ranks[rank][plan]``, of statistics."""
    return launched["precise_bn_distributed"]
