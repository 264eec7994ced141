"""Focal loss: cross entropy with less weight for well-classified samples (Lin et al., 2017).

One caveat: gamma handles easy and hard samples, alpha handles rare and frequent classes, and both are tuned together.
The paper trains sigmoids. For a softmax, the factor uses the probability of the true class.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying
from lit_tricks.utils.arguments import number, numbers
from lit_tricks.utils.batch import Path

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["FocalLoss", "class_weights", "focal_factor", "focal_target"]


def focal_factor(p: Tensor, gamma: float) -> Tensor:
    """Return ``(1 - p) ** gamma``, the factor of the focal loss. Its gradient is finite at p = 1.

    Args:
        p: probability that the network gives to the target, in [0, 1].
        gamma: exponent, 0 or more. 0 gives a factor of 1; the larger, the less certain items count.

    Example:
        >>> focal_factor(torch.tensor([0.1, 0.5, 0.9]), gamma=2.0)
        tensor([0.8100, 0.2500, 0.0100])
    """
    return (1 - p).clamp(min=torch.finfo(p.dtype).eps) ** gamma


def focal_target(target: Tensor, gamma: float) -> SoftTarget:
    """Return labels of a batch whose cross entropy is the focal loss, for a module that has it as its own.

    Args:
        target: integer labels, or what other tricks made of them.
        gamma: see ``FocalLoss``.

    Raises:
        RuntimeError: if ``FocalLoss`` acts on them, too.
    """
    if not isinstance(target, SoftTarget):
        target = carrying(target, LossSpec(("the focal loss",)))
    if target.spec.factor is not None:
        raise RuntimeError(
            "FocalLoss: the module's own loss is focal, too. Leave the callback out, or set the module's loss to "
            "'cross_entropy'."
        )
    target.spec.factor = partial(focal_factor, gamma=gamma)
    return target


def class_weights(num_classes: int, alpha: float | Tensor) -> Tensor:
    """Return the weight per class in a softmax: a list's numbers, or one number for class 1 of two.

    Raises:
        RuntimeError: if the number of classes and weights differ.
    """
    weights = alpha if isinstance(alpha, Tensor) else torch.tensor([1 - alpha, alpha])
    if len(weights) != num_classes:
        given = (
            f"a list of {len(weights)}" if isinstance(alpha, Tensor) else f"{alpha}, which weighs one of two classes"
        )
        raise RuntimeError(
            f"FocalLoss: alpha is {given}, and the loss has {num_classes} classes: give a list of {num_classes}."
        )
    return weights


def positive_weight(alpha: float | Tensor) -> float:
    """Weight of the positives of a binary loss.

    Raises:
        RuntimeError: if alpha is a list.
    """
    if isinstance(alpha, Tensor):
        raise RuntimeError(
            "FocalLoss: alpha is a list, and the loss is binary: pass one number, the weight of the positives."
        )
    return alpha


class FocalLoss(LossTrick):
    """Reduce the loss of images that are already classified well ([Lin et al., 2017](https://arxiv.org/abs/1708.02002)).

    Cross entropy becomes ``-alpha_t (1 - p_t)^gamma log(p_t)``, with the softmax probability ``p_t`` of the true
    class. For mixed or smoothed targets it is the mean over the target distribution. Binary cross entropy of one-hot
    or binary targets becomes the paper's sigmoid loss. ``ignore_index``, class weights and reductions keep their
    meaning: the mean divides by the same number as without this trick.

    Cost: a few operations on the logits. Use it where easy examples dominate the loss, such as background. For plain
    class imbalance prefer class weights. The probabilities become less calibrated, so check them.

    Args:
        gamma: exponent, 0 or more. 0 is cross entropy. 2 is the paper's value. From 5 on, well-classified images
            hardly contribute to the loss.
        alpha: class weights in the loss. None uses none. A number in (0, 1) is the weight of the positives in a binary
            loss, or of class 1 of two. The other class gets 1 minus this number. A list has a positive number per
            class.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: in the first training step, if no loss used the target, or ``alpha`` does not fit its classes.

    Example:
        ``- {class_path: FocalLoss, init_args: {gamma: 2.0}}``
    """

    def __init__(self, gamma: float = 2.0, alpha: float | Sequence[float] | None = None) -> None:
        self.gamma: float = number(self, "gamma", gamma, "[0, 100]", "2 is usual, and 0 is cross entropy.")
        self.alpha: float | list[float] | None
        if hasattr(alpha, "__len__"):
            self.alpha = numbers(self, "alpha", alpha, "(0, 1e6]", "Give one number per class.")
        else:
            fix = "A list of positive numbers, one per class, is legal too."
            self.alpha = number(self, "alpha", alpha, "(0, 1)", fix, or_none="no weights")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trick, and announce it."""
        super().on_fit_start(trainer, pl_module)
        weights = "" if self.alpha is None else f", classes weighed by alpha={self.alpha}"
        self.announce(f"the loss times (1 - p)^{self.gamma:g}{weights}")

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Put the factors on the loss."""
        if self.gamma:
            target.spec.factor = partial(focal_factor, gamma=self.gamma)
        if self.alpha is not None:
            alpha = torch.tensor(self.alpha, device=target.device) if isinstance(self.alpha, list) else self.alpha
            target.spec.weigh_classes("FocalLoss(alpha=...)", partial(class_weights, alpha=alpha))
            target.spec.positive_weight = partial(positive_weight, alpha)
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the mean factor: near 1 nothing is easy, near 0 almost all is."""
        return {"focal_loss/factor": 1.0 if spec.mean_factor is None else spec.mean_factor}
