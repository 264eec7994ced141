"""The launch that the distributed tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 300  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def two_processes(script: Path, folder: Path, nodes: bool = False) -> list[dict[str, Any]]:
    """Run ``python SCRIPT FOLDER`` as two ranks; return what each left in ``FOLDER/<rank>.pt``.

    Either as two processes of one machine, or as two machines of one process each, by torchrun.
    """
    port = free_port()
    shared = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    commands, envs = [], []
    for rank in range(2):
        place = ["--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1", *place] if nodes else []
        commands.append([sys.executable, *torchrun, str(script), str(folder)])
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        envs.append(shared | ({} if nodes else rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for command, env, log in zip(commands, envs, logs, strict=True):
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            )
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
            process.wait()
    if codes != [0, 0]:
        output = "\n".join(f"--- rank {rank}\n{log.read_text()[-5000:]}" for rank, log in enumerate(logs))
        pytest.fail(f"exit codes {codes} (None: still running after {TIMEOUT} s)\n{output}", pytrace=False)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
