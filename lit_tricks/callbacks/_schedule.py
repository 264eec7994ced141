"""What the learning rate schedules share: which step of the run a batch is, and how a rate reaches the optimizers."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from lit_tricks.callbacks._base import Trick

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["Schedule", "warmup"]


def warmup(step: int, lr: float, warmup_steps: int) -> float:
    """Learning rate of a step of the linear warm-up from 0: ``i * lr / m`` for the ``i``-th of ``m`` steps.

    Args:
        step: steps done before this one, so that ``i = step + 1``.
        lr: rate at the end of the warm-up.
        warmup_steps: steps of the warm-up, ``m``.
    """
    return (step + 1) * lr / warmup_steps


class Schedule(Trick):
    """Sets the learning rate of every parameter group before each step, as a closed form of the step's number.

    A step is an optimizer step. Under manual optimization, where only the module knows how many of them a batch makes,
    it is a batch. A step that a gradient scaler skips counts, as it does for ``max_steps``. Nothing is saved, so
    nothing can drift: the number of the step and the rates that the optimizers were configured with say it all.
    """

    def __init__(self, warmup_epochs: float, total_steps: int | None) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={warmup_epochs} is below 0; give 0 for no warm-up.")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps} is below 1; give the steps of the whole run, or None.")
        self.warmup_epochs = warmup_epochs
        self.total_steps = total_steps
        self._base_lrs: list[list[float]] = []
        self._warmup_steps = 0
        self._steps_per_epoch: float | None = None
        self._steps_of_run: int | None = None
        self._first_global_step: int | None = None

    @abstractmethod
    def lr(self, step: int, base_lr: float) -> float:
        """Learning rate of a step.

        Args:
            step: steps done before it, in this run and the runs it resumes.
            base_lr: learning rate that the parameter group was configured with.
        """

    @abstractmethod
    def plan(self) -> str:
        """Turn epochs into steps, once the run's length is known; return what follows the warm-up, in words."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the configured rates, before a resumed checkpoint puts its scheduled ones in their place.

        Raises:
            RuntimeError: if something else schedules the learning rate too, or there is none.
        """
        name, module = type(self).__name__, type(pl_module).__name__
        rivals = [c.__class__.__name__ for c in _callbacks(trainer) if isinstance(c, Schedule) and c is not self]
        if rivals:
            raise RuntimeError(f"{name} and {rivals[0]} both set the learning rate: remove one of the two callbacks.")
        if trainer.lr_scheduler_configs:
            other = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise RuntimeError(
                f"{name} sets the learning rate, and so does the {other} that configure_optimizers of {module} "
                f"returns: return the optimizers alone, or remove {name}."
            )
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not groups or not all("lr" in group for group in groups):
            raise RuntimeError(f"{name} found no learning rate to set: {module} is trained without an optimizer.")
        self._base_lrs = [[float(group["lr"]) for group in opt.param_groups] for opt in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the run in steps: earlier, its loaders are not there and its checkpoint is not restored."""
        self._measure(trainer, pl_module)
        self._warmup_steps = round(self.warmup_epochs * self._epoch_in_steps()) if self.warmup_epochs else 0
        what_follows = self.plan()
        for optimizer, lrs in zip(trainer.optimizers, self._base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=False):
                group["initial_lr"] = lr  # torch's name for it; a checkpoint may have brought that of another run
        if self._steps_of_run and self._warmup_steps > self._steps_of_run and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warnings.warn(
                f"{type(self).__name__}: the run ends after {self._steps_of_run} of {self._warmup_steps} warm-up "
                f"steps, before its full learning rate; lower warmup_epochs={self.warmup_epochs}.",
                stacklevel=2,
            )
        rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(lr for lrs in self._base_lrs for lr in lrs))
        rise = f"0 -> {rates} in {self._warmup_steps} steps" if self._warmup_steps else f"{rates} without warm-up"
        self._say(f"{rise}, then {what_follows}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set and log the learning rates of the step that this batch belongs to."""
        step = _steps_done(trainer, pl_module, batch_idx)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # a group that appears later (finetuning callbacks add them) is scheduled from the rate it came with
                lr = self.lr(step, group.setdefault("initial_lr", float(group["lr"])))
                if isinstance(group["lr"], torch.Tensor):  # compiled and capturable optimizers hold on to this tensor
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        pl_module.log_dict(_rates(trainer.optimizers), on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See, once, that a batch makes the steps by which ``max_steps`` was turned into batches.

        Raises:
            RuntimeError: if it makes more or fewer.
        """
        if self._first_global_step is None:
            return
        made, self._first_global_step = trainer.global_step - self._first_global_step, None
        if made != len(trainer.optimizers):
            raise RuntimeError(
                f"max_steps={trainer.max_steps} counts the steps of all optimizers, and a batch made {made} of them, "
                f"not one for each of {len(trainer.optimizers)} optimizers: how many batches the run has is unknown. "
                f"Give {type(self).__name__}(total_steps=...), in batches."
            )

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        automatic = pl_module.automatic_optimization
        batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
        # where accumulation differs from epoch to epoch, no epoch stands for the others
        uneven = any(type(c).__name__ == "GradientAccumulationScheduler" for c in _callbacks(trainer))
        self._steps_per_epoch = None
        if math.isfinite(batches) and not uneven:
            self._steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        by_epochs = self._steps_per_epoch * epochs if self._steps_per_epoch and epochs > 0 else math.inf
        by_steps = trainer.max_steps if trainer.max_steps >= 0 else math.inf
        if not automatic:
            by_steps /= len(trainer.optimizers)  # if each one steps once in a batch; on_train_batch_end checks it
        run = self.total_steps or min(by_epochs, by_steps)
        self._steps_of_run = math.ceil(run) if math.isfinite(run) else None
        if self._steps_per_epoch is None and self.total_steps and epochs > 0:
            self._steps_per_epoch = self.total_steps / epochs
        guessed = not automatic and self.total_steps is None and by_steps < by_epochs
        self._first_global_step = trainer.global_step if guessed else None

    def _epoch_in_steps(self) -> float:
        if self._steps_per_epoch is None:
            raise RuntimeError(
                f"{type(self).__name__} counts in epochs, and an epoch has no known number of steps here (a loader "
                f"without length, or a GradientAccumulationScheduler). Give {type(self).__name__}(total_steps=...) "
                "with Trainer(max_epochs=...), or Trainer(limit_train_batches=...), the batches of an epoch."
            )
        return self._steps_per_epoch

    def _run_in_steps(self) -> int:
        if self._steps_of_run is None:
            raise RuntimeError(
                f"{type(self).__name__} must know where the run ends, and neither max_steps nor max_epochs with the "
                f"length of the loader says it. Give {type(self).__name__}(total_steps=...)."
            )
        return self._steps_of_run


def _steps_done(trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> int:
    if pl_module.automatic_optimization:
        return trainer.global_step
    if math.isfinite(trainer.num_training_batches):
        return trainer.current_epoch * int(trainer.num_training_batches) + batch_idx
    return trainer.fit_loop.epoch_loop.total_batch_idx


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # a connector of the Trainer sets it


def _rates(optimizers: list[Optimizer]) -> dict[str, float]:
    """Learning rates under the names that Lightning's LearningRateMonitor gives them: lr-SGD, lr-SGD-1/pg2, ..."""
    rates = {}
    seen: list[type] = []
    for optimizer in optimizers:
        same = seen.count(type(optimizer))
        seen.append(type(optimizer))
        name = f"lr-{type(optimizer).__name__}" + (f"-{same}" if same else "")
        several = len(optimizer.param_groups) > 1
        for j, group in enumerate(optimizer.param_groups, start=1):
            part = group.get("name", f"pg{j}" if several else None)
            rates[f"{name}/{part}" if part else name] = float(group["lr"])
    return rates
