"""Count the steps of a run: steps per epoch, in the whole run, and done so far.

A step is an optimizer step. Under manual optimization a step is a batch, because a batch can have any number of
optimizer steps. A step that a gradient scaler skips counts, as in ``max_steps``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lit_tricks._compat import callbacks_of, lightning_classes

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["TrainingLength", "is_fast_dev_run", "steps_done"]


def steps_done(trainer: Trainer, pl_module: LightningModule) -> int:
    """Return the number of finished steps, in this run and the runs it resumes."""
    if pl_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[union-attr, no-any-return]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether the run only tries a few batches, so that warnings of its length are of no use."""
    return bool(trainer.fast_dev_run)  # type: ignore[union-attr]  # a connector sets it


class TrainingLength:
    """Measures a run in steps, from ``on_train_start`` on. Earlier, loaders and restored checkpoints are missing.

    Args:
        trick: name of the trick, for messages.
        epoch_remedy: argument to set if the length of an epoch is unknown.
        run_remedy: argument to set if the length of the run is unknown.
        total_steps: steps of the run, if they were given.
    """

    def __init__(self, trick: str, epoch_remedy: str, run_remedy: str = "", total_steps: int | None = None) -> None:
        self.trick = trick
        self.epoch_remedy = epoch_remedy
        self.run_remedy = run_remedy
        self.total_steps = total_steps
        self._epoch: float | None = None
        self._run: int | None = None
        self._first_global_step: int | None = None  # compared with the value at the end of the first batch

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps of an epoch and of the run, if they are known."""
        batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
        # if accumulation differs between epochs, no epoch represents the others
        schedulers = lightning_classes("callbacks.GradientAccumulationScheduler")
        uneven = any(isinstance(callback, schedulers) for callback in callbacks_of(trainer))
        self._epoch = None
        if math.isfinite(batches) and not uneven:
            self._epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        by_epochs = self._epoch * epochs if self._epoch and epochs > 0 else math.inf
        by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
        if not pl_module.automatic_optimization:
            by_steps /= len(trainer.optimizers)  # if each one steps once in a batch, see ``check``
        run = self.total_steps or min(by_epochs, by_steps)
        self._run = math.ceil(run) if math.isfinite(run) else None
        if self._epoch is None and self.total_steps and epochs > 0:
            self._epoch = self.total_steps / epochs
        guessed = not pl_module.automatic_optimization and self.total_steps is None and by_steps < by_epochs
        self._first_global_step = trainer.global_step if guessed else None

    def check(self, trainer: Trainer) -> None:
        """Check once, after a batch, that it made the number of steps that converts ``max_steps`` to batches.

        Raises:
            RuntimeError: if it made more or fewer.
        """
        if self._first_global_step is None:
            return
        made, self._first_global_step = trainer.global_step - self._first_global_step, None
        if made != len(trainer.optimizers):
            raise RuntimeError(
                f"max_steps={trainer.max_steps} counts the steps of all optimizers, and a batch made {made} of them, "
                f"not one for each of {len(trainer.optimizers)} optimizers: how many batches the run has is unknown. "
                f"Give {self.run_remedy}, in batches."
            )

    @property
    def epoch(self) -> float:
        """Return the steps of an epoch.

        Raises:
            RuntimeError: if the length of an epoch is unknown.
        """
        if self._epoch is None:
            raise RuntimeError(
                f"{self.trick} counts in epochs, and an epoch has no known number of steps here (a loader without "
                f"length, or a GradientAccumulationScheduler). Give {self.epoch_remedy}."
            )
        return self._epoch

    @property
    def run(self) -> int:
        """Return the steps of the run.

        Raises:
            RuntimeError: if the length of the run is unknown.
        """
        if self._run is None:
            raise RuntimeError(
                f"{self.trick} needs the length of the run, and neither max_steps nor max_epochs with the length of "
                f"the loader gives it. Set {self.run_remedy}."
            )
        return self._run

    @property
    def knows_run(self) -> bool:
        """Return whether the length of the run is known."""
        return self._run is not None
