"""Linear warm-up, then half a cosine: the schedule of "Bag of Tricks" (He et al., CVPR 2019), sections 3.1 and 5.1.

One caveat: a cosine depends on the length of the run. A run that is resumed to train longer continues on the longer
cosine, with a higher learning rate than before.
"""

from __future__ import annotations

import math

from lit_tricks.callbacks.optim.schedule import DecaySchedule, decay, warmup

__all__ = ["WarmupCosine", "warmup_cosine"]


def warmup_cosine(step: int, lr: float, total_steps: int, warmup_steps: int = 0, min_lr: float = 0.0) -> float:
    """Return the learning rate of a step: linear from 0 to ``lr``, then half a cosine from ``lr`` to ``min_lr``.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        total_steps: steps of the run, the warm-up included. From here on the rate is ``min_lr``.
        warmup_steps: steps of the warm-up. The last of them has the full rate, and so has the first of the cosine.
        min_lr: rate at the end of the cosine.

    Example:
        >>> [round(warmup_cosine(step, 0.1, total_steps=12, warmup_steps=4), 3) for step in (0, 3, 4, 8, 12)]
        [0.025, 0.1, 0.1, 0.05, 0.0]
    """
    if step < warmup_steps:
        return warmup(step, lr, warmup_steps)
    return decay(step, lr, warmup_steps, total_steps, min_lr, lambda share: (1 + math.cos(math.pi * share)) / 2)


class WarmupCosine(DecaySchedule):
    """Warm the learning rate up, then decay it along half a cosine ([He et al., 2019](https://arxiv.org/abs/1812.01187)).

    Step ``i`` of the ``m`` warm-up steps has the learning rate ``i * lr / m``. Step ``t`` (from 0) of the ``T`` later
    steps has ``min_lr + (lr - min_lr) * (1 + cos(pi * t / T)) / 2``. Every parameter group uses its own ``lr``. Steps
    are optimizer steps, so accumulated batches share one learning rate.

    Cost: none measurable. It is the default choice, without milestones to tune. Leave it out if the end of the run is
    unknown. Set ``warmup_epochs`` to 0 if the learning rate needs no warm-up (small batches, fine-tuning).

    Args:
        warmup_epochs: length of the warm-up in epochs, 0 or more, also fractions. 0 starts at the full learning rate.
        min_lr: learning rate at the end of the run, from 0 to the smallest learning rate of the optimizer. At this
            upper limit, the learning rate does not fall.
        total_steps: optimizer steps of the run (batches under manual optimization). Set it only if the Trainer has no
            length: a loader without length and no ``max_steps``, or a ``GradientAccumulationScheduler``.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the module has its own scheduler, or the run's length is unknown.

    Example:
        ``- {class_path: WarmupCosine, init_args: {warmup_epochs: 5}}``
    """

    def __init__(self, warmup_epochs: float = 5, min_lr: float = 0.0, total_steps: int | None = None) -> None:
        super().__init__(warmup_epochs, min_lr, total_steps)

    def plan_decay(self) -> str:
        """Describe the decay, for the log."""
        return "half a cosine"

    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, see ``warmup_cosine``."""
        return warmup_cosine(step, base_lr, self._length.run, self._warmup_steps, self.min_lr)
