"""Generalized cross entropy: between cross entropy and absolute error, for wrong labels (Zhang & Sabuncu, 2018).

One caveat: the loss also learns less from rare and hard images, whose labels are right. The paper's truncated variant,
which drops images below a probability, is not included.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import number
from lit_tricks.utils.batch import Path

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["GeneralizedCrossEntropy", "box_cox"]


def box_cox(log_p: Tensor, q: float) -> Tensor:
    """Return ``(p ** q - 1) / q``, the Box-Cox transform of a probability, from its logarithm.

    Its limit for q -> 0 is ``log(p)``. Value and gradient are finite for p -> 0.

    Args:
        log_p: logarithm of a probability, 0 or less.
        q: exponent, in (0, 1]. 1 gives ``p - 1``.

    Example:
        >>> box_cox(torch.tensor([0.25, 1.0]).log(), q=0.5)
        tensor([-1.,  0.])
    """
    return torch.expm1(q * log_p) / q


class GeneralizedCrossEntropy(LossTrick):
    """Learn less from labels that contradict the network ([Zhang & Sabuncu, 2018](https://arxiv.org/abs/1805.07836)).

    Cross entropy ``-log(p)`` becomes ``(1 - p^q) / q``, with the softmax probability ``p`` of the true class. Its
    gradient is the gradient of cross entropy times ``p^q``, so wrong labels, which have a low ``p``, count less. For
    mixed or smoothed targets the loss is the mean over the target distribution. A focal factor multiplies the loss.
    ``ignore_index``, class weights and reductions keep their meaning. The logged ``generalized_cross_entropy/weight``
    is the mean of ``p^q`` over the batch.

    Cost: a few operations on the logits. Use it where many labels are wrong, such as labels from the web. Leave it out
    for clean labels and for many classes: at the start ``p^q`` is about ``K^-q``, so learning starts slowly. Gradients
    are smaller, so a larger learning rate may help. Expect no gain in short runs on few images, as
    ``benchmarks/results/noisy_labels.md`` has it. FocalLoss does the opposite.

    Args:
        q: exponent, in (0, 1]. Near 0 the loss is cross entropy. 1 is the mean absolute error, which is robust to
            symmetric noise, but often fails to learn. 0.7 is the paper's value.

    Raises:
        ValueError: for a q out of its range.
        RuntimeError: in the first training step, if no loss used the target, the loss is binary, or the list has
            BinaryCrossEntropy, too.

    Example:
        ``- {class_path: GeneralizedCrossEntropy, init_args: {q: 0.7}}``
    """

    def __init__(self, q: float = 0.7) -> None:
        self.q: float = number(self, "q", q, "(0, 1]", "0.7 is usual. For cross entropy leave the callback out.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trick, and announce it."""
        super().on_fit_start(trainer, pl_module)
        self.announce(f"the loss is (1 - p^{self.q:g}) / {self.q:g}")

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Replace the logarithm of the loss."""
        target.spec.link = partial(box_cox, q=self.q)
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the mean of ``p^q``: the gradient of the loss as a share of cross entropy's gradient."""
        if spec.mean_link is None:
            return {}
        return {"generalized_cross_entropy/weight": 1 + self.q * spec.mean_link}
