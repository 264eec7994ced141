"""Separate processes for the parts of a benchmark."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["context", "write_result"]


def context(device: str) -> Any:
    """Return the start method: fork, which keeps imports, or spawn if forks cannot use the GPU."""
    fork = multiprocessing.get_context("fork")
    if device != "cuda":
        return fork
    probe = fork.Process(target=_see_gpu)
    probe.start()
    probe.join(60)
    if probe.exitcode == 0:
        return fork
    probe.kill()
    print("forks do not reach the GPU: each part imports anew", flush=True)
    return multiprocessing.get_context("spawn")


def write_result(out: Path, make: Callable[[], Any]) -> None:
    """Write the result to a file and the output to a log of the same name, and end this process."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        text = json.dumps(make())
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    part = out.with_suffix(".part")
    part.write_text(text)
    part.replace(out)
    os._exit(0)  # do not wait for threads of CUDA and Lightning


def _see_gpu() -> None:
    torch.zeros(1, device="cuda")
