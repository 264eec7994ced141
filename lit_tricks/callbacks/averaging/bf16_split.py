"""An fp32 tensor as its rounding to bf16 and a remainder of 16 bits, so that a checkpoint need not save 48 bits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["join", "remainder_of", "round_to"]


def round_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another type, or the same tensor if it has the type.

    From fp32 to bf16, ties are rounded up, so that the remainder fits into 16 bits.
    """
    if (tensor.dtype, dtype) != (torch.float32, torch.bfloat16):
        return tensor.to(dtype)
    return torch.where(tensor.isfinite(), _upper(tensor).to(torch.int16).view(dtype), tensor.to(dtype))


def remainder_of(tensor: Tensor) -> Tensor:
    """Return the part of a finite fp32 tensor that ``round_to`` bf16 drops, in int16."""
    return (tensor.view(torch.int32) - (_upper(tensor) << 16)).to(torch.int16)


def join(rounded: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 tensor of a rounding to bf16 and its remainder."""
    return ((rounded.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def _upper(tensor: Tensor) -> Tensor:
    return (tensor.view(torch.int32) + (1 << 15)) >> 16
