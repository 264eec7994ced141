"""The specification of a batch's loss: tricks write it, and the losses in ``losses.py`` read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LossSpec"]


@dataclass
class LossSpec:
    """The loss of one batch. The target of the batch and all targets derived from it share the spec.

    The meaning does not depend on the order of the tricks. The labels are mixed, then smoothed. The logits are shifted.
    The loss of the shifted logits under this distribution is modulated. The divergence of the logits, without the
    shift, from a teacher's is added last. With ``multi_hot`` the loss is a binary cross entropy per class, and its
    targets are smoothed.
    """

    tricks: tuple[str, ...]
    smoothing: Callable[[int], float] | None = None  # label_smoothing of torch's cross entropy, for K classes
    link: Callable[[Tensor], Tensor] | None = None  # replaces log(p) in the loss, from log(p)
    multi_hot: Callable[[Tensor, int], Tensor] | None = None  # binary targets, from the distribution over K classes
    sum_classes: bool = True  # with multi_hot: the sum over classes, not the mean
    factor: Callable[[Tensor], Tensor] | None = None  # factor of the loss, from the probability of the target
    class_weight: Callable[[int], Tensor] | None = None  # factor of each of K classes, in the sum only
    class_weight_by: str = ""  # the trick, or its argument, that has set class_weight
    logit_shift: Callable[[int], Tensor] | None = None  # added to the logits of K classes
    softmax_only: str = ""  # the trick that is not defined for a module's binary losses
    positive_weight: Callable[[], float] | None = None  # binary: factor of positives; 1 minus this for negatives
    teacher: Tensor | None = None  # the teacher's logits, a row per label of the batch
    # of a loss's logits from the teacher's, row by row, with the weights of the rows
    divergence: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    weights: tuple[float, float] = (1.0, 1.0)  # of the loss of the labels, and of the divergence
    used: bool = False  # whether a loss has used the target
    mean_factor: Tensor | None = None  # mean of the factor, for the log
    mean_divergence: Tensor | None = None
    mean_link: Tensor | None = None  # of the labels, before smoothing
    mean_positives: Tensor | None = None  # positive targets per item, before smoothing

    @property
    def modulates(self) -> bool:
        """Return whether the loss of the labels is more than cross entropy with a distribution."""
        parts = (self.link, self.multi_hot, self.factor, self.class_weight, self.positive_weight)
        return any(part is not None for part in parts)

    @property
    def needs_known_loss(self) -> bool:
        """Return whether a loss that the user has written out would lack something."""
        return self.modulates or self.logit_shift is not None or self.teacher is not None

    def weigh_classes(self, by: str, weight: Callable[[int], Tensor]) -> None:
        """Set ``class_weight``.

        Args:
            by: the trick, or its argument, for the message.
            weight: function from the number of classes to their weights.

        Raises:
            RuntimeError: if another trick has set it.
        """
        if self.class_weight is not None:
            raise RuntimeError(f"{self.class_weight_by} and {by} both weigh the classes. Leave one of them out.")
        self.class_weight, self.class_weight_by = weight, by

    def names(self) -> str:
        """Return the names of the tricks, for messages."""
        return " and ".join(self.tricks)

    def require(self, kept: bool, function: str) -> None:
        """Raise if a function between the target of the batch and its loss lost what the loss needs.

        Args:
            kept: whether the function kept everything.
            function: name of the function.

        Raises:
            RuntimeError: if not.
        """
        if not kept:
            raise self.unknown(function)

    def unknown(self, function: str) -> RuntimeError:
        """Return the error for a function that loses what the loss needs."""
        return RuntimeError(
            f"{self.names()} cannot follow the target of the batch through `{function}`. Give it to "
            "F.cross_entropy or nn.CrossEntropyLoss as it is, reshaped or indexed (for binary losses as "
            "F.one_hot(target, num_classes).float()), and change labels in the dataset or the collate_fn."
        )
