"""Base of the loss tricks that need the number of training images per class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import integers, invalid
from lit_tricks.utils.class_counts import Counts, count_classes, training_items
from lit_tricks.utils.log import log

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["CountedClasses", "table_of"]

SHOWN = 5  # classes in a message


def table_of(num_classes: int, table: Tensor, counts: Sequence[int], owner: str, given: bool) -> Tensor:
    """Return the numbers of the classes of a loss, (K,), from the numbers of all labels that were counted.

    Args:
        num_classes: number of classes of the loss, ``K``.
        table: a number per label, (L,). Labels from ``K`` on are the loss's ``ignore_index``.
        counts: number of images of each label.
        owner: name of the trick, for messages.
        given: whether the user has given the counts.

    Raises:
        RuntimeError: if a class has no image, or the number of given counts is not ``K``.
    """
    if given and len(counts) != num_classes:
        raise RuntimeError(
            f"{owner}(counts=[...]): there are {len(counts)} counts, and the loss has {num_classes} classes. Give one "
            "count per class."
        )
    empty = [label for label in range(num_classes) if label >= len(counts) or not counts[label]]
    if empty:
        shown = ", ".join(map(str, empty[:SHOWN])) + (" and more" if len(empty) > SHOWN else "")
        raise RuntimeError(
            f"{owner}: {len(empty)} of the {num_classes} classes of the loss have no training image (label {shown}), "
            f"so {owner} is not defined for them. Add images, leave these classes out of the network, or give counts "
            "of at least 1: counts=[...]."
        )
    return table[:num_classes]


class CountedClasses(LossTrick):
    """Counts the training images (or pixels) of each class once, in the first batch.

    Args:
        counts: numbers of training images by class, or None, which counts them.
    """

    transient: ClassVar[tuple[str, ...]] = (*LossTrick.transient, "_table")

    _counted: Counts | None = None
    _table: Tensor | None = None  # a number per class, on the device of the target

    def __init__(self, counts: Sequence[int] | None) -> None:
        fix = "Give one number per class, in the order of the labels."
        self.counts: list[int] | None = integers(
            self, "counts", counts, 1, fix, 2**53, or_none="the counts of the training set"
        )

    @abstractmethod
    def numbers(self, counts: Tensor) -> Tensor:
        """Return a number per class, (L,), from counts of float64, (L,), some of which may be 0."""

    @abstractmethod
    def summary(self, counts: Tensor) -> str:
        """Return what the trick does with the counts of classes that have images."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the counts of another fit. A checkpoint restores its own afterwards."""
        if stage == "fit":
            self._counted = self._table = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trick.

        Raises:
            RuntimeError: if another trick corrects the class frequencies.
        """
        super().on_fit_start(trainer, pl_module)
        names = sorted(type(each).__name__ for each in callbacks_of(trainer) if isinstance(each, CountedClasses))
        if len(names) > 1:
            raise RuntimeError(f"{' and '.join(names)} both correct the frequencies of the classes. Keep one of them.")

    def of_classes(self, target: SoftTarget) -> dict[str, Any]:
        """Return the arguments of ``table_of`` for a batch. In the first batch, count the classes, and announce it.

        They are counted then and not before, since the batch shows whether it has labels of classes at all.

        Raises:
            RuntimeError: if the classes cannot be counted.
        """
        if self._table is None:
            self._begin(target)
        assert self._counted is not None
        return {
            "table": self._table,
            "counts": self._counted.classes,
            "owner": type(self).__name__,
            "given": self.counts is not None,
        }

    def _begin(self, target: SoftTarget) -> None:
        name, source = type(self).__name__, "given"
        if target.kind == "binary":
            raise RuntimeError(
                f"{name} is made for a softmax over classes, and the target has several labels per item, of shape "
                f"{tuple(target.shape)}: leave it out."
            )
        if self.counts is not None:
            self._counted = Counts(self.counts, 0)
        elif self._counted is None:
            assert self._trainer is not None
            self._counted = count_classes(self._trainer, name, lambda line: rank_zero_only(log.info)(f"{name}: {line}"))
            source = f"{self._counted.items:,} training items"
        else:
            source = "the checkpoint"
            items = None if self._trainer is None else training_items(self._trainer)
            if items is not None and items != self._counted.items:
                rank_zero_warn(
                    f"{name}: the run was started with {self._counted.items:,} training items and continues with "
                    f"{items:,}. It keeps the class counts of the checkpoint. Start a new run to count again."
                )
        counts = torch.tensor(self._counted.classes, dtype=torch.float64)
        self._table = self.numbers(counts).float().to(target.device)
        there = counts[counts > 0]
        # of pixels, one of the labels may be the ignore_index
        range_of = "" if self._counted.is_dense else f", {there.min():,.0f} to {there.max():,.0f} images per class"
        self.announce(f"{self.summary(there)}; counts: {source}{range_of}")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        counted = self._counted
        if counted is None:
            return {}
        return {"classes": counted.classes, "items": counted.items, "is_dense": counted.is_dense}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts.

        Raises:
            ValueError: if other counts are given.
        """
        if not state_dict:
            return
        if self.counts is not None and self.counts != state_dict["classes"]:
            raise invalid(
                self,
                "the run of the checkpoint has other counts. Leave counts out, which continues with them, or start a "
                "new run.",
                counts=self.counts,
            )
        self._counted = Counts(**state_dict)
