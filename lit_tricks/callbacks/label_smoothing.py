"""Label smoothing: targets of cross entropy that leave some probability to the wrong classes (Szegedy et al., 2016).

One caveat: there are two conventions. The paper, torch and most libraries share the probability among all classes.
"Bag of Tricks" shares it among the other classes. At 1000 classes the difference is negligible. With a smoothing of 0.1
and 10 classes, the true class keeps 0.91 or 0.9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import choice, number
from lit_tricks.utils.batch import Path
from lit_tricks.utils.strength import RunStrength

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["LabelSmoothing", "label_smoothing_for_torch"]


def label_smoothing_for_torch(
    num_classes: int, smoothing: float, convention: Literal["torch", "paper"] = "torch"
) -> float:
    """Return the ``label_smoothing`` of torch's cross entropy that gives the targets of a convention.

    torch mixes the one-hot target with the uniform distribution: ``1 - s + s / K`` for the true class, ``s / K`` for
    each other one. ``1 - smoothing`` and ``smoothing / (K - 1)``, as in "Bag of Tricks", need
    ``s = smoothing * K / (K - 1)``.

    Args:
        num_classes: number of classes, ``K``.
        smoothing: probability taken from the true class, in [0, 1). 0 changes nothing.
        convention: classes that share this probability: all ("torch"), or all except the true class ("paper", which is
            "Bag of Tricks").

    Raises:
        RuntimeError: if the convention has no such target.

    Example:
        >>> label_smoothing_for_torch(10, 0.1)
        0.1
        >>> round(label_smoothing_for_torch(10, 0.1, "paper"), 4)
        0.1111
    """
    if convention == "torch":
        return smoothing
    if num_classes < 2 or smoothing * num_classes > num_classes - 1:
        raise RuntimeError(
            f"LabelSmoothing(smoothing={smoothing}, convention='paper') leaves the true one of {num_classes} classes "
            f"less than the others: take a smoothing below {1 - 1 / num_classes:g}, or convention='torch'."
        )
    return smoothing * num_classes / (num_classes - 1)


class LabelSmoothing(LossTrick):
    """Smooth the targets of cross entropy ([Szegedy et al., 2016](https://arxiv.org/abs/1512.00567)).

    The probability ``smoothing`` is taken from the true class. It is shared equally among all classes, or among all
    other classes (``convention``). The loss then has its minimum at a finite gap between the logits, so logits do not
    grow without bound. The trick acts in training on ``F.cross_entropy``, ``nn.CrossEntropyLoss``, ``F.nll_loss`` and
    binary losses, and on targets that the module makes by ``F.one_hot(target, num_classes).float()``. Validation and
    test use plain labels.

    Cost: a few operations on the logits. Use it to train from scratch, for many classes and long runs. Leave it out for
    a model that will be a teacher, since distillation needs the differences between its logits. Expect little gain with
    10 classes.

    Args:
        smoothing: probability that the true class loses, in [0, 1). 0 is plain cross entropy, near 1 is uniform.
        convention: classes that share this probability: all K classes ("torch", also in the paper), or the K - 1 others
            ("paper", which is "Bag of Tricks").
        start: share of the run after which targets are smoothed, in [0, ``end``). 0 is the first step.
        end: share of the run after which targets are not smoothed, in (``start``, 1]. 1 is the end of the run.
        schedule: "constant" smooths from ``start`` to ``end``. "rise" smooths by a probability that rises linearly from
            0 at ``start`` to ``smoothing`` at ``end``, and stays there. "fall" smooths by ``smoothing`` until
            ``start``, and by a probability that falls to 0 at ``end``.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when training starts, if the smoothing varies and the length of the run is unknown; in the first
            training step, if no loss used the target, or the module's own loss also smooths.

    Example:
        ``- {class_path: LabelSmoothing, init_args: {smoothing: 0.1}}``
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        convention: Literal["torch", "paper"] = "torch",
        start: float = 0.0,
        end: float = 1.0,
        schedule: Literal["constant", "rise", "fall"] = "constant",
    ) -> None:
        self.smoothing: float = number(self, "smoothing", smoothing, "[0, 1)", "Give a probability, such as 0.1.")
        self.convention: Literal["torch", "paper"] = choice(self, "convention", convention, ("torch", "paper"))
        self.strength: RunStrength = RunStrength(self, start, end, schedule)
        self.start: float = self.strength.start
        self.end: float = self.strength.end
        self.schedule: Literal["constant", "rise", "fall"] = self.strength.schedule
        self._now = 1.0  # share of the smoothing in the current batch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trick, and announce it."""
        super().on_fit_start(trainer, pl_module)
        shared = "all classes" if self.convention == "torch" else "the wrong classes"
        self.announce(f"{self.smoothing:g} of the target's probability shared by {shared}{self.strength.shown()}")

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Smooth the target's distribution."""
        if self.strength.varies:
            assert self._trainer is not None
            self._now = self.strength.now(self._trainer)
        if self.smoothing and self._now:
            target.spec.smoothing = self._for_torch
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the probability that is shared."""
        return {"label_smoothing/smoothing": self.smoothing * self._now}

    def _for_torch(self, num_classes: int) -> float:
        return self._now * label_smoothing_for_torch(num_classes, self.smoothing, self.convention)
