"""Linear warm-up, then linear decay to the end of the run.

One caveat: a line depends on the length of the run. A run that is resumed to train longer continues on the longer line,
with a higher learning rate than before.
"""

from __future__ import annotations

from lit_tricks.callbacks.optim.schedule import DecaySchedule, decay, warmup

__all__ = ["WarmupLinear", "warmup_linear"]


def warmup_linear(step: int, lr: float, total_steps: int, warmup_steps: int = 0, min_lr: float = 0.0) -> float:
    """Return the learning rate of a step: linear from 0 to ``lr``, then linear from ``lr`` to ``min_lr``.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        total_steps: steps of the run, the warm-up included. From here on the rate is ``min_lr``.
        warmup_steps: steps of the warm-up. The last of them has the full rate, and so has the first of the decay.
        min_lr: rate at the end of the decay.

    Example:
        >>> [round(warmup_linear(step, 0.1, total_steps=12, warmup_steps=4), 4) for step in (0, 3, 4, 8, 12)]
        [0.025, 0.1, 0.1, 0.05, 0.0]
    """
    if step < warmup_steps:
        return warmup(step, lr, warmup_steps)
    return decay(step, lr, warmup_steps, total_steps, min_lr, lambda share: 1 - share)


class WarmupLinear(DecaySchedule):
    """Warm the learning rate up, then decay it along a line ([Li et al., 2020](https://arxiv.org/abs/1905.04753)).

    Step ``i`` of the ``m`` warm-up steps has the learning rate ``i * lr / m``. Step ``t`` (from 0) of the ``T`` later
    steps has ``min_lr + (lr - min_lr) * (1 - t / T)``. Every parameter group uses its own ``lr``.

    Cost: none measurable. Use it for short runs, in which a line is robust, and for recipes that need it. In long
    runs a cosine keeps the learning rate high for longer, and is as good or better. Leave it out if the end of the run
    is unknown.

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
        ``- {class_path: WarmupLinear, init_args: {warmup_epochs: 2}}``
    """

    def __init__(self, warmup_epochs: float = 5, min_lr: float = 0.0, total_steps: int | None = None) -> None:
        super().__init__(warmup_epochs, min_lr, total_steps)

    def plan_decay(self) -> str:
        """Describe the decay, for the log."""
        return "linear"

    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, see ``warmup_linear``."""
        return warmup_linear(step, base_lr, self._length.run, self._warmup_steps, self.min_lr)
