"""Sharded tensors (DTensor, of FSDP2): the part of this process, the whole, and checkpoints written part by part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_tensor", "is_sharded", "part_for", "read", "reshard", "shard_like", "to_local", "write"]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process has a part of the tensor."""
    return hasattr(tensor, "to_local")


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of this process; of a tensor that is not sharded, all of it."""
    with torch.no_grad():
        local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def shard_like(tensor: Any, local: Tensor) -> Tensor:
    """The tensor that the parts make together, if they are sharded as another one is."""
    if not is_sharded(tensor):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def full_tensor(tensor: Any) -> Tensor:
    """Return the whole of it, on the CPU if it was sharded."""
    whole: Tensor = tensor.full_tensor().cpu() if is_sharded(tensor) else tensor
    return whole


def part_for(tensor: Any, value: Tensor) -> Tensor:
    """Return the part of a value that belongs to this process's part of a tensor."""
    if is_sharded(tensor) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return to_local(value)


def reshard(module: nn.Module) -> None:
    """Drop the gathered weights that FSDP2 keeps for the next forward pass, since they are outdated."""
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            part.reshard()  # type: ignore[operator]


def write(state: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """Write tensors, each process its shards."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, checkpoint_id=folder)


def read(folder: Path, like: Callable[[dict[str, list[str]]], dict[str, dict[str, Tensor]]]) -> Any:
    """Read what ``write`` has written.

    Args:
        folder: where.
        like: makes empty tensors of that form, from their names.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if not folder.is_dir():
        raise RuntimeError(f"{folder} is missing: the checkpoint was saved after the fit, to be tested only.")
    names: dict[str, list[str]] = {"raw": [], "average": []}
    for key in FileSystemReader(folder).read_metadata().state_dict_metadata:
        kind, _, name = key.partition(".")
        names[kind].append(name)
    state = like(names)
    load(state, checkpoint_id=folder)
    return state
