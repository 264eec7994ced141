"""What the tricks make of the loss of a batch: written by them, read by the losses of ``_loss.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LossSpec"]


@dataclass
class LossSpec:
    """What the tricks make of the loss of one batch. One for the target and all that is derived from it.

    The meaning does not depend on the order of the tricks: the labels are mixed, then smoothed; the loss under this
    distribution is modulated; what a teacher says comes on top, untouched by all that.
    """

    tricks: tuple[str, ...]
    smoothing: Callable[[int], float] | None = None  # label_smoothing of torch's cross entropy, for K classes
    factor: Callable[[Tensor], Tensor] | None = None  # of the loss, from the probability given to the target
    class_weight: Callable[[int], Tensor] | None = None  # factor of each of K classes, in the sum only
    positive_weight: Callable[[], float] | None = None  # binary: factor of positives; that of negatives is 1 minus it
    teacher: Tensor | None = None  # its logits, a row for each label of the batch
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None  # of a loss's logits from the teacher's, row by row
    weights: tuple[float, float] = (1.0, 1.0)  # of the loss of the labels, and of the divergence
    used: bool = False  # a loss has seen the target
    mean_factor: Tensor | None = None  # what the factor came to
    mean_divergence: Tensor | None = None

    @property
    def modulates(self) -> bool:
        """Whether the loss of the labels is more than cross entropy with a distribution of the target."""
        return any(part is not None for part in (self.factor, self.class_weight, self.positive_weight))

    def names(self) -> str:
        """The tricks, for messages."""
        return " and ".join(self.tricks)

    def require(self, kept: bool, function: str) -> None:
        """Refuse a function between the target of the batch and its loss that the recipe can not follow.

        Raises:
            RuntimeError: if it was not ``kept``.
        """
        if not kept:
            raise RuntimeError(
                f"{self.names()} can not follow the target of the batch through `{function}`. Give it to "
                "F.cross_entropy or nn.CrossEntropyLoss as it is, reshaped or indexed (for binary losses as "
                "F.one_hot(target, num_classes).float()), and change labels in the dataset or the collate_fn."
            )
