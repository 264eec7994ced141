"""Set-up of all tests, and the launch that the distributed tests share."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # sums in one order, for comparisons bit by bit; and the tests share the cores of the machine

SCRIPT = Path(__file__).parent / "_distributed.py"
TIMEOUT = 300  # seconds


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


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ended with: ``ranks[rank][strategy][trick]``. One launch for all tests."""
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, str(SCRIPT), str(folder)]
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + TIMEOUT
    try:
        # a rank that fails leaves the other one waiting for it
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0, 0]:
        output = "\n".join(f"--- rank {rank}\n{log.read_text()[-5000:]}" for rank, log in enumerate(logs))
        pytest.fail(f"exit codes {codes} (None: still running after {TIMEOUT} s)\n{output}", pytrace=False)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
