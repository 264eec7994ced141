"""Linear warm-up, then a power of the share of the run that is left: the schedule of segmentation recipes.

One caveat: the decay depends on the length of the run. A run that is resumed to train longer continues on the longer
decay, with a higher learning rate than before.
"""

from __future__ import annotations

import math

from lit_tricks.callbacks.optim.schedule import DecaySchedule, decay, warmup
from lit_tricks.utils.arguments import number

__all__ = ["WarmupPoly", "warmup_poly"]


def warmup_poly(
    step: int, lr: float, total_steps: int, power: float = 0.9, warmup_steps: int = 0, min_lr: float = 0.0
) -> float:
    """Return the learning rate of a step: linear from 0 to ``lr``, then a power of the share of the run that is left.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        total_steps: steps of the run, the warm-up included. From here on the rate is ``min_lr``.
        power: of the share that is left, above 0. 1 is a line.
        warmup_steps: steps of the warm-up. The last of them has the full rate, and so has the first of the decay.
        min_lr: rate at the end of the decay.

    Example:
        >>> [round(warmup_poly(step, 0.1, total_steps=12, power=2, warmup_steps=4), 4) for step in (0, 3, 4, 8, 12)]
        [0.025, 0.1, 0.1, 0.025, 0.0]
    """
    if step < warmup_steps:
        return warmup(step, lr, warmup_steps)
    return decay(step, lr, warmup_steps, total_steps, min_lr, lambda share: math.pow(1 - share, power))


class WarmupPoly(DecaySchedule):
    """Warm the learning rate up, then decay it by a power ([Chen et al., 2016](https://arxiv.org/abs/1606.00915)).

    Step ``i`` of the ``m`` warm-up steps has the learning rate ``i * lr / m``. Step ``t`` (from 0) of the ``T`` later
    steps has ``min_lr + (lr - min_lr) * (1 - t / T) ** power``. Every parameter group uses its own ``lr``.

    Cost: none measurable. Use it for segmentation, where power 0.9 without warm-up is usual. For
    classification a cosine or a line is the usual choice. Leave it out if the end of the run is unknown.

    Args:
        power: exponent of the share of the run that is left, in (0, 10]. Below 1 the learning rate falls late, at 1
            along a line, and above 1 early.
        warmup_epochs: length of the warm-up in epochs, 0 or more, also fractions. 0 starts at the full learning rate.
        min_lr: learning rate at the end of the run, from 0 to the smallest learning rate of the optimizer. At this
            upper limit, the learning rate does not fall.
        total_steps: optimizer steps of the run (batches under manual optimization). Set it only if the Trainer has no
            length: a loader without length and no ``max_steps``, or a ``GradientAccumulationScheduler``.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the module has its own scheduler, or the run's length is unknown.

    Example:
        ``- {class_path: WarmupPoly, init_args: {power: 0.9}}``
    """

    def __init__(
        self, power: float = 0.9, warmup_epochs: float = 0, min_lr: float = 0.0, total_steps: int | None = None
    ) -> None:
        super().__init__(warmup_epochs, min_lr, total_steps)
        self.power: float = number(self, "power", power, "(0, 10]", "0.9 is usual, and 1 is a line.")

    def plan_decay(self) -> str:
        """Describe the decay, for the log."""
        return f"to the power {self.power:g} down"

    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, see ``warmup_poly``."""
        return warmup_poly(step, base_lr, self._length.run, self.power, self._warmup_steps, self.min_lr)
