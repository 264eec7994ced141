"""Linear warm-up, then steps down at milestones: the baseline schedule of "Bag of Tricks" (He et al., CVPR 2019).

One caveat: milestones fit one length of the run. Scale them with the length, or use a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_tricks.callbacks.optim.schedule import Schedule, warmup
from lit_tricks.utils.arguments import integers, invalid, number

__all__ = ["WarmupStep", "warmup_step"]


def warmup_step(step: int, lr: float, milestones: Sequence[int], gamma: float = 0.1, warmup_steps: int = 0) -> float:
    """Return the learning rate of a step: linear from 0 to ``lr``, then times ``gamma`` at each milestone.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        milestones: steps at which the rate falls, counted from the start of the run.
        gamma: factor of each fall, in (0, 1].
        warmup_steps: steps of the warm-up. The last of them has the full rate.

    Example:
        >>> [round(warmup_step(step, 0.1, milestones=[4, 8]), 4) for step in (3, 4, 8)]
        [0.1, 0.01, 0.001]
    """
    if step < warmup_steps:
        return warmup(step, lr, warmup_steps)
    return lr * gamma ** sum(step >= milestone for milestone in milestones)


class WarmupStep(Schedule):
    """Warm the learning rate up, then divide it at milestones ([He et al., 2019](https://arxiv.org/abs/1812.01187)).

    The warm-up is the same as in ``WarmupCosine``. From epoch ``milestones[k]`` on, the learning rate is
    ``lr * gamma ** (k + 1)``. Epochs are counted from 0, and warm-up epochs count.

    Cost: none measurable. It is the paper's baseline, and the schedule of most older recipes. Use it to compare with
    these. Otherwise a cosine is as good and has nothing to tune.

    Args:
        milestones: epochs at which the learning rate falls, increasing, none within the warm-up. Empty: constant after
            the warm-up.
        gamma: factor per milestone, in (0, 1]. 1 is a constant learning rate.
        warmup_epochs: length of the warm-up in epochs, 0 or more, also fractions. 0 starts at the full learning rate.
        total_steps: optimizer steps of the run (batches under manual optimization). Give it only if an epoch has no
            length. Together with ``max_epochs`` it defines one.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the module has its own scheduler, or an epoch's length is unknown.

    Example:
        ``- {class_path: WarmupStep, init_args: {milestones: [30, 60, 90], warmup_epochs: 5}}``
    """

    def __init__(
        self,
        milestones: Sequence[int] = (30, 60, 90),
        gamma: float = 0.1,
        warmup_epochs: float = 5,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(warmup_epochs, total_steps)
        fix = "The learning rate is multiplied by it, and 1 keeps it constant."
        self.gamma: float = number(self, "gamma", gamma, "(0, 1]", fix)
        fix = "Give epochs, in rising order."
        self.milestones: list[int] = integers(self, "milestones", milestones, 1, fix, empty=True)
        if self.milestones != sorted(set(self.milestones)):
            raise invalid(self, "milestones must rise. Give each epoch once, in order.", milestones=milestones)
        if self.milestones and self.milestones[0] < self.warmup_epochs:
            raise invalid(
                self,
                "all milestones must come after the warm-up. Lower warmup_epochs, or remove the early milestones.",
                milestones=milestones,
                warmup_epochs=warmup_epochs,
            )
        self._milestone_steps: list[int] = []

    def plan(self) -> str:
        """Turn the milestones into steps."""
        self._milestone_steps = [round(m * self._length.epoch) for m in self.milestones] if self.milestones else []
        if not self._milestone_steps:
            return "constant"
        return f"times {self.gamma:g} at steps {', '.join(map(str, self._milestone_steps))}"

    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, see ``warmup_step``."""
        return warmup_step(step, base_lr, self._milestone_steps, self.gamma, self._warmup_steps)
