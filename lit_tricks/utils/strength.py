"""Strength of a trick over the run: full in a part of it, rising, or falling.

The strength is a closed form of the optimizer step. So nothing is saved, a resumed run continues as it was, and all
batches of an accumulated step and all ranks have the same strength.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lit_tricks.utils.arguments import choice, invalid, number
from lit_tricks.utils.training_length import TrainingLength, is_fast_dev_run, steps_done

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["RunStrength", "strength_at"]


def strength_at(
    progress: float, start: float = 0.0, end: float = 1.0, schedule: Literal["constant", "rise", "fall"] = "constant"
) -> float:
    """Return the share of the full strength at a point of the run, in [0, 1].

    Args:
        progress: share of the run that is done, in [0, 1].
        start: progress where the change begins, in [0, ``end``).
        end: progress where the change ends, in (``start``, 1].
        schedule: "constant" is 1 from ``start`` to ``end``, and 0 elsewhere. "rise" is 0 until ``start``, and rises
            linearly to 1 at ``end``. "fall" is 1 until ``start``, and falls linearly to 0 at ``end``.

    Example:
        >>> [strength_at(done, 0.0, 0.75) for done in (0.0, 0.5, 0.75)]
        [1.0, 1.0, 0.0]
        >>> [strength_at(done, 0.5, 1.0, "fall") for done in (0.0, 0.5, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    if schedule == "constant":
        return float(start <= progress and (progress < end or end == 1))
    risen = min(max((progress - start) / (end - start), 0.0), 1.0)
    return risen if schedule == "rise" else 1 - risen


class RunStrength:
    """The strength of one trick in the course of a run.

    Args:
        owner: the trick, for messages.
        start: share of the run, see ``strength_at``.
        end: share of the run.
        schedule: "constant", "rise" or "fall".

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(self, owner: object, start: float, end: float, schedule: Literal["constant", "rise", "fall"]) -> None:
        fix = "Give a share of the run, such as 0.8."
        self.start: float = number(owner, "start", start, "[0, 1)", fix)
        self.end: float = number(owner, "end", end, "(0, 1]", fix)
        if not self.start < self.end:
            raise invalid(owner, "start must be below end, in shares of the run. Raise end.", start=start, end=end)
        self.schedule: Literal["constant", "rise", "fall"] = choice(
            owner, "schedule", schedule, ("constant", "rise", "fall")
        )
        self._length = TrainingLength(type(owner).__name__, "", "Trainer(max_steps=...)")
        self._is_trial = False

    @property
    def varies(self) -> bool:
        """Return whether the strength is not the same in the whole run."""
        return self.schedule != "constant" or self.start > 0 or self.end < 1

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the run in steps, in ``on_train_start``.

        Raises:
            RuntimeError: if the strength varies, and the length of the run is unknown, or no step has a strength.
        """
        self._is_trial = is_fast_dev_run(trainer)
        if not self.varies or self._is_trial:
            return
        self._length.measure(trainer, pl_module)
        run = self._length.run
        first = int(self.start * run)
        if not any(self._at(min(step, run - 1)) for step in (0, first, first + 1, run)):
            raise RuntimeError(
                f"{self._length.trick}(start={self.start:g}, end={self.end:g}) has no effect in a run of {run} steps. "
                "Lower start, raise end, or train longer."
            )

    def check(self, trainer: Trainer) -> None:
        """Check after a batch that the length of the run was measured correctly.

        Raises:
            RuntimeError: if a batch makes another number of steps than assumed.
        """
        self._length.check(trainer)

    def now(self, trainer: Trainer) -> float:
        """Return the share of the full strength in this step. A ``fast_dev_run`` has full strength."""
        if not self.varies or self._is_trial:
            return 1.0
        return self._at(steps_done(trainer, trainer.lightning_module))

    def shown(self) -> str:
        """Return the end of the line that a trick announces. Empty if the strength does not vary."""
        if not self.varies:
            return ""
        what = {"constant": "only", "rise": "rising", "fall": "falling to 0"}[self.schedule]
        return f", {what} from {self.start:g} to {self.end:g} of the run"

    def _at(self, step: int) -> float:
        return strength_at(step / self._length.run, self.start, self.end, self.schedule)
