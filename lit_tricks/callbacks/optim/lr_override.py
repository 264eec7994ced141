"""Learning rates of parameter groups: their names, and their temporary replacement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["TemporaryLRs", "configured_rates", "is_schedule_free", "rates_of"]


def is_schedule_free(optimizer: Any) -> bool:
    """Return whether an optimizer has the methods ``train`` and ``eval`` of schedule-free optimizers."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def configured_rates(trick: str, trainer: Trainer, pl_module: LightningModule) -> list[list[float]]:
    """Return the configured learning rates per optimizer and group, before a resumed checkpoint replaces them.

    Raises:
        RuntimeError: if no optimizer has a learning rate, or an optimizer works without a schedule.
    """
    for optimizer in trainer.optimizers:
        if is_schedule_free(optimizer):
            raise RuntimeError(
                f"{trick} sets the learning rate, and the average of {type(optimizer).__name__} assumes a constant "
                f"learning rate: use another optimizer, or remove {trick}."
            )
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if not groups or not all("lr" in group for group in groups):
        raise RuntimeError(
            f"{trick} found no learning rate to set in {type(pl_module).__name__}. Return an optimizer with an lr from "
            f"configure_optimizers, or remove {trick}."
        )
    return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]


class TemporaryLRs:
    """Replaces the scheduled learning rates during the steps of the optimizers.

    Between steps, the optimizers have the scheduled rates, for schedulers that read the last learning rate.

    Args:
        optimizers: all optimizers of the run. Their groups keep their configured proportions.
        configured: the configured rates of these groups.
        lr: the target rate of the group with the highest configured rate.
        way: function that returns the position between the scheduled rate (0) and ``lr`` (1) in the current step.
    """

    def __init__(
        self, optimizers: list[Optimizer], configured: list[list[float]], lr: float, way: Callable[[], float]
    ) -> None:
        self._optimizers = optimizers
        self._configured = configured
        self._lr = lr
        self._way = way
        self._stepping = False
        self._lent: list[tuple[dict[str, Any], Any, Any]] = []  # groups, their scheduled rates, and the temporary rates

    def hook(self) -> list[Any]:
        """Replace the learning rates in all later steps. Return the handles that stop it."""
        handles: list[Any] = [self]
        for optimizer in self._optimizers:
            handles.append(optimizer.register_step_pre_hook(self._before_step))
            handles.append(optimizer.register_step_post_hook(self._after_step))
        return handles

    def remove(self) -> None:
        """Stop the override, and drop the references to the optimizers."""
        self.give_back()
        self._optimizers = []

    def start(self) -> None:
        """Store the configured rates in the groups, as torch's schedulers do, after a checkpoint is restored."""
        for optimizer, rates in zip(self._optimizers, self._configured, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=False):
                group.setdefault("initial_lr", rate)

    def lend(self) -> None:
        """Replace the scheduled rates."""
        self.give_back()
        way = self._way()
        if not way:
            return
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        # a group that appears later (finetuning callbacks add them) counts with the rate that it came with
        configured = [float(group.setdefault("initial_lr", float(group["lr"]))) for group in groups]
        highest = max(configured)
        for group, rate in zip(groups, configured, strict=True):
            scheduled, goal = group["lr"], self._lr * (rate / highest if highest else 1)
            if isinstance(scheduled, Tensor):  # compiled and capturable optimizers keep a reference to this tensor
                self._lent.append((group, scheduled.clone(), scheduled))
                scheduled.mul_(1 - way).add_(goal * way)
            else:
                group["lr"] = (1 - way) * scheduled + way * goal
                self._lent.append((group, scheduled, group["lr"]))

    def give_back(self) -> None:
        """Restore the scheduled rates, except rates that were set meanwhile."""
        for group, scheduled, lent in self._lent:
            if group["lr"] is not lent:
                continue
            if isinstance(scheduled, Tensor):
                lent.copy_(scheduled)
            else:
                group["lr"] = scheduled
        self._lent = []

    def used(self) -> dict[str, float]:
        """Return the learning rates of the current step, by name. Within a step, replace newly set rates again."""
        self.lend()
        rates = rates_of(self._optimizers)
        if not self._stepping:  # a gradient scaler has yet to decide whether it calls the optimizer
            self.give_back()
        return rates

    def around(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replace the learning rates while a method runs."""
        self.lend()
        try:
            return method(*args, **kwargs)
        finally:
            self.give_back()

    def _before_step(self, *_: Any) -> None:
        self._stepping = True
        self.lend()

    def _after_step(self, *_: Any) -> None:
        self._stepping = False
        self.give_back()


def rates_of(optimizers: list[Optimizer]) -> dict[str, float]:
    """Return the learning rates, under the names of Lightning's LearningRateMonitor: lr-SGD, lr-SGD-1/pg2, ..."""
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
