"""The norm layers that a network may be built with, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from timm.layers.norm import GroupNorm, GroupNorm1
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

__all__ = ["NORMS", "Norm"]

Norm = Literal["batch", "group", "instance", "layer", "frozen_batch"]

GROUPS = 32  # of channels, as in https://arxiv.org/abs/1803.08494


def group_norm(channels: int, **kwargs: Any) -> nn.Module:
    """Group norm with 32 groups, or as many as divide a smaller number of channels."""
    norm: nn.Module = GroupNorm(channels, num_groups=math.gcd(channels, GROUPS), **kwargs)
    return norm


def frozen_batch_norm(channels: int, **kwargs: Any) -> nn.Module:
    """Batch norm whose statistics and affine never change; timm hands a device and a type to all, these are CPU's."""
    norm: nn.Module = FrozenBatchNorm2d(channels)
    return norm


NORMS: dict[Norm, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,  # over (N, H, W) of each channel
    "group": group_norm,  # over (C / groups, H, W) of each image
    "instance": partial(nn.InstanceNorm2d, affine=True),  # over (H, W) of each channel of each image
    "layer": GroupNorm1,  # over (C, H, W) of each image
    "frozen_batch": frozen_batch_norm,
}
