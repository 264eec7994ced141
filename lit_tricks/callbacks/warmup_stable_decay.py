"""Linear warm-up, a constant learning rate, and a decay in the last part of the run: a trapezoid.

One caveat: to train longer later, you need a checkpoint from before the decay. Keep one, for example with
``ModelCheckpoint(every_n_epochs=1, save_top_k=-1)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from lit_tricks.callbacks.optim.schedule import DecaySchedule, decay, warmup
from lit_tricks.utils.arguments import choice, number

__all__ = ["WarmupStableDecay", "warmup_stable_decay"]

SHAPES: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda share: 1 - math.sqrt(share),
    "linear": lambda share: 1 - share,
}


def warmup_stable_decay(
    step: int,
    lr: float,
    total_steps: int,
    decay_steps: int,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    shape: Literal["1-sqrt", "linear"] = "1-sqrt",
) -> float:
    """Return the learning rate of a step: linear from 0 to ``lr``, constant, then down to ``min_lr``.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        total_steps: steps of the run, with warm-up and decay. From here on the rate is ``min_lr``.
        decay_steps: steps of the decay. The first of them still has the full rate.
        warmup_steps: steps of the warm-up. The last of them has the full rate.
        min_lr: rate at the end of the decay.
        shape: of the decay at the share ``p`` of it: ``1 - sqrt(p)``, or ``1 - p`` for "linear".

    Example:
        >>> [round(warmup_stable_decay(step, 0.1, 12, 4, warmup_steps=4), 4) for step in (0, 3, 8, 9, 12)]
        [0.025, 0.1, 0.1, 0.05, 0.0]
    """
    if step < warmup_steps:
        return warmup(step, lr, warmup_steps)
    start = total_steps - decay_steps
    return decay(step, lr, start, total_steps, min_lr, SHAPES[shape])


class WarmupStableDecay(DecaySchedule):
    """Hold the learning rate, and decay it in the last part of the run ([Hägele et al., 2024](https://arxiv.org/abs/2405.18392)).

    After the warm-up the learning rate is constant. In the last part of the run it falls from ``lr`` to ``min_lr``.
    Before the decay, the learning rate does not depend on the length of the run. So a checkpoint from before the decay
    can be resumed with more epochs, and the result is the same as if the run had been longer from the start.

    Cost: none measurable. Use it if the length of the run is not decided yet, or to branch runs of several lengths off
    one run. Leave it out for a run of known length: a cosine has nothing to tune, and is about as good.

    Args:
        decay: share of the run in which the learning rate falls, in (0, 1]. Near 0 the learning rate drops in a few
            steps. At 1 there is no constant part. The decay begins after the warm-up at the earliest.
        shape: "1-sqrt" falls fast at first and was better in the paper. "linear" falls along a line.
        warmup_epochs: length of the warm-up in epochs, 0 or more, also fractions. 0 starts at the full learning rate.
        min_lr: learning rate at the end of the run, from 0 to the smallest learning rate of the optimizer. At this
            upper limit, the learning rate does not fall.
        total_steps: optimizer steps of the run (batches under manual optimization). Set it only if the Trainer has no
            length: a loader without length and no ``max_steps``, or a ``GradientAccumulationScheduler``.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the module has its own scheduler, or the run's length is unknown.

    Example:
        ``- {class_path: WarmupStableDecay, init_args: {decay: 0.2}}``
    """

    def __init__(
        self,
        decay: float = 0.2,
        shape: Literal["1-sqrt", "linear"] = "1-sqrt",
        warmup_epochs: float = 5,
        min_lr: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(warmup_epochs, min_lr, total_steps)
        self.decay: float = number(self, "decay", decay, "(0, 1]", "Give a share of the run: for 20 % write 0.2.")
        self.shape: Literal["1-sqrt", "linear"] = choice(self, "shape", shape, ("1-sqrt", "linear"))
        self._decay_steps = 1

    def plan_decay(self) -> str:
        """Find the first step of the decay."""
        run = self._length.run
        self._decay_steps = max(1, min(round(self.decay * run), run - self._warmup_steps))
        return f"constant to step {run - self._decay_steps}, then {self.shape}"

    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, see ``warmup_stable_decay``."""
        return warmup_stable_decay(
            step, base_lr, self._length.run, self._decay_steps, self._warmup_steps, self.min_lr, self.shape
        )
