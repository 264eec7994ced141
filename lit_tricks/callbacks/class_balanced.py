"""Class-balanced loss: cross entropy weighed by the effective number of images of each class (Cui et al., 2019).

One caveat: beta must fit the size of the data set. Classes with many more than ``1 / (1 - beta)`` images all have the
same effective number, and the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lit_tricks.callbacks.soft_targets.counted import CountedClasses, table_of
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import number
from lit_tricks.utils.batch import Path

__all__ = ["ClassBalanced", "class_balanced_weights"]


def class_balanced_weights(counts: Tensor, beta: float) -> Tensor:
    """Return the weight of each class, ``(1 - beta) / (1 - beta ** n)``, scaled so that the weights sum to K.

    Args:
        counts: number of images of each class, (K,), at least 1 each.
        beta: in [0, 1). 0 gives each class the weight 1. Near 1 the weights are inverse to the counts.

    Example:
        >>> class_balanced_weights(torch.tensor([1000.0, 100.0, 10.0]), beta=0.999)
        tensor([0.0422, 0.2800, 2.6778])
    """
    log_beta = torch.log(torch.tensor(beta, dtype=torch.float64))
    weights = 1 / -torch.expm1(counts.double() * log_beta)  # exact for beta near 1
    return (weights * len(counts) / weights.sum()).to(counts.dtype)


class ClassBalanced(CountedClasses):
    """Weight the loss of each class by its inverse effective number of images ([Cui et al., 2019](https://arxiv.org/abs/1901.05555)).

    The loss of an image of a class with ``n`` training images gets the weight ``(1 - beta) / (1 - beta ** n)``. The
    weights are scaled so that they sum to the number of classes. The mean divides by the number of images, as in the
    paper's code. For mixed or smoothed targets, each class's part of the loss gets the weight of the class. It applies
    to ``F.cross_entropy``, ``nn.CrossEntropyLoss`` and ``F.nll_loss`` in training. Class weights of the module multiply
    these. With FocalLoss it is the class-balanced focal loss. With BinaryCrossEntropy it is the paper's class-balanced
    sigmoid loss. Binary losses of the module itself are rejected.

    The counts are of the whole training set: not of the share of a process, nor of ``limit_train_batches``. Data sets
    that list their labels (``targets``, ``labels``, ``samples``) are not loaded. Others are loaded once, in the
    first training step. Checkpoints have the counts. For segmentation, pixels are counted as the training transforms
    give them.

    Cost: a few operations on the logits. Use it for few classes with a moderate imbalance.
    LogitAdjustment is the stronger correction for long tails. Leave it out if a sampler balances the classes.

    Args:
        beta: in [0, 1). 0 weights all classes alike. Near 1, weights are inverse to the counts. ``1 - 1 / n`` for about
            the mean number ``n`` of images per class is a good first value. The paper uses 0.9 to 0.9999.
        counts: number of training images of each class, at least 1, in the order of the labels. None counts them.

    Raises:
        ValueError: for an argument out of its range; on resume, if other counts are given than in the checkpoint.
        RuntimeError: in the first training step, if the labels cannot be counted, a sampler draws by weights, a class
            has no image, the loss is binary, or no loss used the target; if both tricks for class frequencies are used.

    Example:
        ``- {class_path: ClassBalanced, init_args: {beta: 0.999}}``
    """

    def __init__(self, beta: float = 0.999, counts: Sequence[int] | None = None) -> None:
        fix = "0.99, 0.999 and 0.9999 are usual."
        self.beta: float = number(self, "beta", beta, "[0, 1)", fix)
        super().__init__(counts)

    def numbers(self, counts: Tensor) -> Tensor:
        """Return the weights, of which classes without images have 0."""
        found = torch.zeros_like(counts)
        there = counts > 0
        found[there] = class_balanced_weights(counts[there], self.beta)
        return found

    def summary(self, counts: Tensor) -> str:
        """Return the range of the weights, and warn if all are the same, though the counts are not."""
        weights = class_balanced_weights(counts, self.beta)
        if self.beta and counts.max() > counts.min() and weights.max() < 1.001 * weights.min():
            rank_zero_warn(
                f"ClassBalanced(beta={self.beta:g}): all classes have far more than {1 / (1 - self.beta):,.0f} labels, "
                f"so their weights are equal. Take a larger beta, such as {1 - 1 / float(counts.mean()):.10g}."
            )
        return f"the loss of a class times {weights.min():.3g} to {weights.max():.3g}, by beta={self.beta:g}"

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Put the weights on the loss."""
        target.spec.weigh_classes("ClassBalanced", partial(_weights_of, **self.of_classes(target)))
        target.spec.softmax_only = type(self).__name__
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the largest weight."""
        assert self._table is not None
        return {"class_balanced/largest_weight": self._table.max()}


def _weights_of(num_classes: int, table: Tensor, **counted: Any) -> Tensor:
    """Return the weights of the classes of a loss, which sum to their number, (K,)."""
    weights = table_of(num_classes, table, **counted)
    return weights * num_classes / weights.sum()
