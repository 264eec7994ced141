"""Logit-adjusted loss: cross entropy of logits shifted by the log frequency of their class (Menon et al., 2021).

One caveat: the network then scores classes as if all were equally frequent. Where validation images have the class
frequencies of training, its accuracy and its log-likelihood there get worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_tricks.callbacks.soft_targets.counted import CountedClasses, table_of
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import number
from lit_tricks.utils.batch import Path

__all__ = ["LogitAdjustment", "logit_adjustment"]


def logit_adjustment(counts: Tensor, tau: float) -> Tensor:
    """Return ``tau * log(prior)``, the shift of each class's logit in training.

    Args:
        counts: number of images of each class, (K,), above 0. The prior is the share of a class.
        tau: factor, 0 or more.

    Example:
        >>> logit_adjustment(torch.tensor([90.0, 9.0, 1.0]), tau=1.0)
        tensor([-0.1054, -2.4079, -4.6052])
    """
    return tau * torch.log(counts / counts.sum())


class LogitAdjustment(CountedClasses):
    """Shift logits by the log frequency of their class, in training ([Menon et al., 2021](https://arxiv.org/abs/2007.07314)).

    The cross entropy of training gets the logits ``z + tau * log(prior)``. The prior of a class is its share of the
    training set. The shift accounts for the class frequencies, so the network's own logits ``z`` do not have to learn
    them. Evaluation uses ``z``. With ``tau=1``, training then aims at the smallest balanced error, which is the mean of
    the error rates of the classes. The trick acts on ``F.cross_entropy``, ``nn.CrossEntropyLoss`` and ``F.nll_loss``.
    Mixing, smoothing, class weights, focal factors and ``ignore_index`` keep their meaning for the shifted logits. A
    teacher's logits are compared with the logits without the shift: train the teacher with LogitAdjustment, too. Binary
    losses and BinaryCrossEntropy are rejected.

    The whole training set is counted, on several devices and with ``limit_train_batches``, too. If the data set lists
    its labels (``targets``, ``labels``, ``samples``), no image is loaded for this. Otherwise all samples are loaded
    once, in the first training step. Checkpoints store the counts. For segmentation, pixels are counted after the
    training transforms.

    Cost: a few operations on the logits. Use it for classes of different frequency, if each class matters as much as
    any other. Leave it out if the test images have the class frequencies of training and you report plain accuracy, or
    if a sampler balances the classes.

    Args:
        tau: factor, in [0, 100]. 0 is cross entropy. 1 is the optimum for the balanced error. Larger values favor rare
            classes.
        counts: number of training images of each class, at least 1, in the order of the labels. None counts them.

    Raises:
        ValueError: for an argument out of its range; on resume, if other counts are given than in the checkpoint.
        RuntimeError: in the first training step, if the labels cannot be counted, a sampler draws by weights, a class
            has no image, the loss is binary, or no loss used the target; if both tricks for class frequencies are used.

    Example:
        ``- {class_path: LogitAdjustment, init_args: {tau: 1.0}}``
    """

    def __init__(self, tau: float = 1.0, counts: Sequence[int] | None = None) -> None:
        self.tau: float = number(self, "tau", tau, "[0, 100]", "1 is usual, and 0 is cross entropy.")
        super().__init__(counts)

    def numbers(self, counts: Tensor) -> Tensor:
        """Return the shifts, of which classes without images have minus infinity."""
        return logit_adjustment(counts, self.tau) if self.tau else torch.zeros_like(counts)

    def summary(self, counts: Tensor) -> str:
        """Return the range of the shifts."""
        span = self.tau * float(torch.log(counts.max() / counts.min()))
        return f"logits in training plus {self.tau:g} x log frequency, which differs by {span:.3g}"

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Put the shift on the logits of the loss."""
        target.spec.logit_shift = partial(table_of, **self.of_classes(target))
        target.spec.softmax_only = type(self).__name__
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the factor of the log frequency."""
        return {"logit_adjustment/tau": self.tau}
