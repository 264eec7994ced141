"""The launch that the distributed tests share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 400  # seconds


def two_processes(scripts: Sequence[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run the scripts as two ranks, see ``_two.py``; return what each rank left, of each script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, str(Path(__file__).with_name("_two.py")), str(folder), *scripts]
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
    return {
        script: [torch.load(folder / script / f"{rank}.pt", weights_only=True) for rank in range(2)]
        for script in scripts
    }
