"""Set-up of all tests."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import once as _once  # noqa: F401
from helpers.launch import two_processes

torch.set_num_threads(1)  # sums in one order, for comparisons bit by bit; and the tests share the cores of the machine


@pytest.fixture
def restored_interrupts() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files in the format of CIFAR, whose checksums are of course not the real ones."""
    from lit_tricks.data import CIFAR10, CIFAR100

    rng = np.random.RandomState(0)

    def write(path: Path, count: int, key: str, labels: int) -> None:
        path.parent.mkdir(exist_ok=True)
        data = rng.randint(0, 256, (count, 3072), dtype=np.uint8)
        path.write_bytes(pickle.dumps({"data": data, key: [index % labels for index in range(count)]}))

    for number in range(1, 6):
        write(tmp_path / "cifar-10-batches-py" / f"data_batch_{number}", 20, "labels", 10)
    write(tmp_path / "cifar-10-batches-py" / "test_batch", 30, "labels", 10)
    write(tmp_path / "cifar-100-python" / "train", 300, "fine_labels", 100)
    write(tmp_path / "cifar-100-python" / "test", 100, "fine_labels", 100)
    names = {"label_names": CIFAR10().classes}
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names))
    names = {"fine_label_names": CIFAR100().classes}
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return tmp_path


# What is run by two processes, by the fixture that has what they ended with. Starting them takes longer than any.
SCRIPTS = {"ranks": "distributed", "weights_ranks": "weights_distributed", "bn_ranks": "precise_bn_distributed"}


@pytest.fixture(scope="session")
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes ended with, by script: one launch for all of those that this session needs."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    scripts = [script for fixture, script in SCRIPTS.items() if fixture in needed]
    return two_processes(scripts, tmp_path_factory.mktemp("distributed"))


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
