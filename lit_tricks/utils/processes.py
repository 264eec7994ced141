"""The processes of a distributed run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from lit_tricks._compat import Trainer

__all__ = ["broadcasts_buffers", "world_size"]


def world_size() -> int:
    """Return the number of processes that torch communicates between, 1 without communication."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcasts_buffers(trainer: Trainer) -> bool:
    """Return whether DDP copies the buffers of the first process to the others in its next forward pass."""
    ddp: Any = trainer.strategy.model
    is_ddp = isinstance(ddp, DistributedDataParallel)
    return is_ddp and bool(ddp.broadcast_buffers and ddp.require_forward_param_sync)
