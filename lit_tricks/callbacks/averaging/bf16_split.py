"""An fp32 tensor in two halves, its bf16 rounding and the 16 bits that this lacks: saved as both, it is there once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join", "rest_of", "round_to"]


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type. From fp32 to bf16 halves are rounded up, so that the rest has a place in 16 bits."""
    if (tensor.dtype, dtype) != (torch.float32, torch.bfloat16):
        return tensor.to(dtype)  # itself, if it is of it
    return torch.where(tensor.isfinite(), _upper(tensor).to(torch.int16).view(dtype), tensor.to(dtype))


def rest_of(tensor: Tensor) -> Tensor:
    """What ``round_to`` bf16 leaves out of a finite fp32 tensor, in int16."""
    return (tensor.view(torch.int32) - (_upper(tensor) << 16)).to(torch.int16)


def join(rounded: Tensor, rest: Tensor) -> Tensor:
    """The fp32 tensor, from its rounding and the rest."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def _upper(tensor: Tensor) -> Tensor:
    return (tensor.view(torch.int32) + (1 << 15)) >> 16
