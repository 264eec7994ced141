"""The launch that the distributed tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import warm

TIMEOUT = 400  # seconds


def two_processes(scripts: Sequence[str], folder: Path, nodes: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Run the scripts as two ranks, see ``process.py``; return what each rank left, of each script.

    Either as two processes of one machine, or as two machines of one process each, by torchrun.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    shared["PYTHONPATH"] = os.pathsep.join(sys.path)
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        place = ["--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1", *place] if nodes else []
        words = [*torchrun, str(Path(__file__).with_name("process.py")), str(folder), *scripts]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        env = shared | ({} if nodes else rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        processes.append(warm.start(words, log, env=env))
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.kill()
            process.wait()
    if codes != [0, 0]:
        output = "\n".join(f"--- rank {rank}\n{log.read_text()[-5000:]}" for rank, log in enumerate(logs))
        pytest.fail(f"exit codes {codes} (None: still running after {TIMEOUT} s)\n{output}", pytrace=False)
    return {script: results_of(script, folder) for script in scripts}


def results_of(script: str, folder: Path) -> list[dict[str, Any]]:
    """Return what each rank of a script left in the folder of its launch."""
    return [torch.load(folder / script / f"{rank}.pt", weights_only=True) for rank in range(2)]
