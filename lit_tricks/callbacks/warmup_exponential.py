"""Linear warm-up, then a constant factor every few epochs: the decay of the Inception and MobileNet recipes.

One caveat: the epochs of the decay are counted from the end of the warm-up, so that the warm-up reaches the full rate.
"""

from __future__ import annotations

from lit_tricks.callbacks.optim.schedule import Schedule, warmup
from lit_tricks.utils.arguments import number

__all__ = ["WarmupExponential", "warmup_exponential"]


def warmup_exponential(step: int, lr: float, every_n_steps: float, gamma: float = 0.94, warmup_steps: int = 0) -> float:
    """Return the learning rate of a step: linear from 0 to ``lr``, then times ``gamma`` after every ``every_n_steps``.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        every_n_steps: steps between two falls, counted from the end of the warm-up.
        gamma: factor of each fall, in (0, 1].
        warmup_steps: steps of the warm-up. The last of them has the full rate.

    Example:
        >>> [round(warmup_exponential(step, 0.1, every_n_steps=4, gamma=0.5), 3) for step in (0, 3, 4, 8)]
        [0.1, 0.1, 0.05, 0.025]
    """
    if step < warmup_steps:
        return warmup(step, lr, warmup_steps)
    falls = int((step - warmup_steps) // every_n_steps)
    return lr * gamma**falls


class WarmupExponential(Schedule):
    """Warm the learning rate up, then multiply it by ``gamma`` every few epochs ([Szegedy et al., 2016](https://arxiv.org/abs/1512.00567)).

    The warm-up is the same as in ``WarmupCosine``. Afterwards the learning rate is multiplied by ``gamma`` after every
    ``every_n_epochs`` epochs, and constant in between. Inception was trained with 0.94 every two epochs. "Bag of
    Tricks" compares this schedule with a cosine in section 5.1.

    Cost: none measurable. Use it for recipes that need it. A cosine keeps the learning rate high for longer, and
    usually reaches a better accuracy.

    Args:
        gamma: factor per interval, in (0, 1]. 1 is a constant learning rate.
        every_n_epochs: epochs per interval, above 0, also fractions.
        warmup_epochs: length of the warm-up in epochs, 0 or more, also fractions. 0 starts at the full learning rate.
        total_steps: optimizer steps of the run (batches under manual optimization). Give it only if an epoch has no
            length. Together with ``max_epochs`` it defines one.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the module has its own scheduler, or an epoch's length is unknown.

    Example:
        ``- {class_path: WarmupExponential, init_args: {gamma: 0.94, every_n_epochs: 2}}``
    """

    def __init__(
        self,
        gamma: float = 0.94,
        every_n_epochs: float = 2,
        warmup_epochs: float = 5,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(warmup_epochs, total_steps)
        fix = "The learning rate is multiplied by it, and 1 keeps it constant."
        self.gamma: float = number(self, "gamma", gamma, "(0, 1]", fix)
        fix = "Give the number of epochs between two falls."
        self.every_n_epochs: float = number(self, "every_n_epochs", every_n_epochs, "[0.001, 1e6]", fix)
        self._every_n_steps = 1.0

    def plan(self) -> str:
        """Turn the epochs between two falls into steps."""
        self._every_n_steps = self.every_n_epochs * self._length.epoch
        return f"times {self.gamma:g} every {self._every_n_steps:g} steps"

    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step, see ``warmup_exponential``."""
        return warmup_exponential(step, base_lr, self._every_n_steps, self.gamma, self._warmup_steps)
