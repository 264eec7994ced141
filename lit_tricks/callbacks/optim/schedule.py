"""Base of the learning rate schedules: count steps, and set the learning rates of the optimizers."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.optim.lr_override import configured_rates, rates_of
from lit_tricks.utils.arguments import integer, invalid, number
from lit_tricks.utils.training_length import TrainingLength, is_fast_dev_run, steps_done

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["DecaySchedule", "Schedule", "decay", "warmup"]


def warmup(step: int, lr: float, warmup_steps: int) -> float:
    """Return the learning rate of a step of the linear warm-up from 0: ``i * lr / m`` for step i of m.

    Args:
        step: number of earlier steps, so that ``i = step + 1``.
        lr: learning rate at the end of the warm-up.
        warmup_steps: steps of the warm-up, ``m``.

    Example:
        >>> [warmup(step, 0.4, 4) for step in range(4)]
        [0.1, 0.2, 0.30000000000000004, 0.4]
    """
    return (step + 1) * lr / warmup_steps


def decay(step: int, lr: float, start: int, end: int, min_lr: float, shape: Callable[[float], float]) -> float:
    """Return the learning rate of a step of a decay: ``lr`` before it, ``min_lr`` after it.

    Args:
        step: number of earlier steps.
        lr: the full learning rate.
        start: first step of the decay.
        end: first step after the decay.
        min_lr: learning rate at the end.
        shape: share of the fall that is left, from 1 to 0, at a share of the decay, from 0 to 1.

    Example:
        >>> [decay(step, 0.5, 1, 3, 0.0, lambda share: 1 - share) for step in range(4)]
        [0.5, 0.5, 0.25, 0.0]
    """
    if step >= end:
        return min_lr
    if step < start:
        return lr
    return min_lr + (lr - min_lr) * shape((step - start) / (end - start))


class Schedule(Trick):
    """Sets the learning rate of every parameter group before each step, as a closed form of the step's number.

    No state is saved or can drift: the learning rate depends only on the step and on the configured learning rates.
    """

    def __init__(self, warmup_epochs: float, total_steps: int | None) -> None:
        fix = "0 starts at the full learning rate."
        self.warmup_epochs: float = number(self, "warmup_epochs", warmup_epochs, "[0, 1e6]", fix)
        fix = "Give the number of steps of the whole run."
        self.total_steps: int | None = integer(self, "total_steps", total_steps, 1, fix, or_none="the Trainer's number")
        self._base_lrs: list[list[float]] = []
        self._warmup_steps = 0
        run_remedy = f"{type(self).__name__}(total_steps=...)"
        epoch_remedy = (
            f"{run_remedy} with Trainer(max_epochs=...), or Trainer(limit_train_batches=...), the batches of an epoch"
        )
        self._length = TrainingLength(type(self).__name__, epoch_remedy, run_remedy, self.total_steps)

    @abstractmethod
    def lr(self, step: int, base_lr: float) -> float:
        """Return the learning rate of a step.

        Args:
            step: steps done before it, in this run and the runs it resumes.
            base_lr: learning rate that the parameter group was configured with.
        """

    @abstractmethod
    def plan(self) -> str:
        """Convert epochs to steps, when the run's length is known. Describe the part after the warm-up, for the log."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the configured learning rates, before a resumed checkpoint replaces them by scheduled ones.

        Raises:
            RuntimeError: if something else also schedules the learning rate, or no optimizer has one.
        """
        name, module = type(self).__name__, type(pl_module).__name__
        conflicting = [type(c).__name__ for c in callbacks_of(trainer) if isinstance(c, Schedule) and c is not self]
        if conflicting:
            raise RuntimeError(
                f"{name} and {conflicting[0]} both set the learning rate: remove one of the two callbacks."
            )
        if trainer.lr_scheduler_configs:
            other = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise RuntimeError(
                f"{name} sets the learning rate, and so does the {other} that configure_optimizers of {module} "
                f"returns: return only the optimizers, or remove {name}."
            )
        self._base_lrs = configured_rates(name, trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the run in steps."""
        self._length.measure(trainer, pl_module)
        self._warmup_steps = round(self.warmup_epochs * self._length.epoch) if self.warmup_epochs else 0
        what_follows = self.plan()
        for optimizer, lrs in zip(trainer.optimizers, self._base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=False):
                group["initial_lr"] = lr  # torch's name; a checkpoint may contain the value of another run
        is_whole = not self._length.knows_run or self._warmup_steps <= self._length.run
        if not is_whole and not is_fast_dev_run(trainer):
            warnings.warn(
                f"{type(self).__name__}: the run ends after {self._length.run} of {self._warmup_steps} warm-up "
                f"steps, before its full learning rate; lower warmup_epochs={self.warmup_epochs}.",
                stacklevel=2,
            )
        rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(lr for lrs in self._base_lrs for lr in lrs))
        rise = f"0 -> {rates} in {self._warmup_steps} steps" if self._warmup_steps else f"{rates} without warm-up"
        self.announce(f"{rise}, then {what_follows}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set and log the learning rates of the step that this batch belongs to."""
        step = steps_done(trainer, pl_module)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # a group that appears later (finetuning callbacks add them) is scheduled from its first learning rate
                lr = self.lr(step, group.setdefault("initial_lr", float(group["lr"])))
                if isinstance(group["lr"], torch.Tensor):  # compiled and capturable optimizers keep this tensor
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        if self.should_log(trainer):
            self.log_step(pl_module, rates_of(trainer.optimizers))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise if a batch makes another number of steps than assumed."""
        self._length.check(trainer)


class DecaySchedule(Schedule):
    """A schedule that ends at ``min_lr`` at the end of the run."""

    def __init__(self, warmup_epochs: float, min_lr: float, total_steps: int | None) -> None:
        super().__init__(warmup_epochs, total_steps)
        self.min_lr: float = number(self, "min_lr", min_lr, "[0, 1e6]", "Give the learning rate at the end of the run.")

    @abstractmethod
    def plan_decay(self) -> str:
        """Describe the decay, for the log, when the run's length is known."""

    def plan(self) -> str:
        """Check that no parameter group ends with a higher learning rate than it is configured with.

        Raises:
            ValueError: if ``min_lr`` is above the lowest of the configured learning rates.
        """
        lowest = min(lr for lrs in self._base_lrs for lr in lrs)
        if self.min_lr > lowest:
            fault = f"the run starts at learning rate {lowest:g}, and ends higher. Lower min_lr."
            raise invalid(self, fault, min_lr=self.min_lr)
        return f"{self.plan_decay()} to {self.min_lr:g} at step {self._length.run}"
