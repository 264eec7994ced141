"""Spatial pyramid pooling: a vector of fixed length from a feature map of any size.

Paper: https://arxiv.org/abs/1406.4729. One caveat: PSPNet's pyramid pooling is something else, a feature map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tricks.utils.arguments import integers

__all__ = ["SpatialPyramidPool2d"]


class SpatialPyramidPool2d(nn.Module):
    """Maxima over the bins of 1x1, 2x2, ... grids ([He et al., 2014](https://arxiv.org/abs/1406.4729)).

    Of ``(N, C, H, W)`` it makes ``(N, C * sum(b * b for b in bins))``, the coarsest grid first, in each of them channel
    by channel. Bin ``i`` of ``b`` reaches from ``floor(i * H / b)`` to ``ceil((i + 1) * H / b)``, so that bins overlap
    where they do not divide the map, and no map is too small.

    Args:
        bins: side of each grid, each at least 1.

    Raises:
        ValueError: if there is no bin, or one below 1.
    """

    def __init__(self, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        fix = "(1, 2, 3, 6) is usual."
        self.bins: tuple[int, ...] = tuple(integers(self, "bins", bins, 1, fix, 1000))

    def feat_mult(self) -> int:
        """Return the number of features per channel (timm's name for it)."""
        return sum(side * side for side in self.bins)

    def forward(self, features: Tensor) -> Tensor:
        """Pool a feature map."""
        return torch.cat([F.adaptive_max_pool2d(features, side).flatten(1) for side in self.bins], 1)

    def extra_repr(self) -> str:
        """Name the bins."""
        return f"bins={self.bins}"
