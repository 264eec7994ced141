"""Labels of imbalanced classes, and targets under tricks that count the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying

COUNTS = [60, 25, 10, 5]
N, K = 6, 4
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LABELS = torch.tensor([0, 3, 1, 2, 2, 3])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)


def under(*tricks: Any, labels: Tensor = LABELS, mixed: tuple[Tensor, ...] = ()) -> SoftTarget:
    """Labels of a batch as the tricks change them. Tricks that count classes have counts that were given."""
    target = carrying(labels.clone(), LossSpec(tuple(type(trick).__name__ for trick in tricks)), *mixed)
    for trick in tricks:
        _, target = trick.act({}, target)
    return target
