"""Separate processes for the parts of a benchmark."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch

__all__ = ["context"]


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


def _see_gpu() -> None:
    torch.zeros(1, device="cuda")
