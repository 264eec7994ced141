"""Learning rates in parameter groups: their names, and others put in their place for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["TemporaryLRs", "configured_rates", "rates_of"]


def configured_rates(trick: str, trainer: Trainer, pl_module: LightningModule) -> list[list[float]]:
    """Learning rates of the groups of each optimizer, before a resumed checkpoint puts its own in their place.

    Raises:
        RuntimeError: if there are none.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if not groups or not all("lr" in group for group in groups):
        raise RuntimeError(
            f"{trick} found no learning rate to set: {type(pl_module).__name__} is trained without an optimizer."
        )
    return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]


class TemporaryLRs:
    """Other learning rates during the steps of the optimizers, instead of the scheduled rates.

    Between steps, the optimizers have the scheduled rates, for schedulers that read the last rate.

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
        self._lent: list[tuple[dict[str, Any], Any, Any]] = []  # groups, their scheduled rates, and those lent

    def hook(self) -> list[Any]:
        """Lend them in every step to come; return the handles to stop it."""
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
        """Note the configured rates in the groups, as torch's schedulers do, once a checkpoint is restored."""
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
            if isinstance(scheduled, Tensor):  # compiled and capturable optimizers hold on to this tensor
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
        """Return the rates of the present step, by name. In it, this also lends those again that were set anew."""
        self.lend()
        rates = rates_of(self._optimizers)
        if not self._stepping:  # a gradient scaler has yet to decide whether it calls the optimizer
            self.give_back()
        return rates

    def around(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lend them to a method."""
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
    """Learning rates, under the names that Lightning's LearningRateMonitor gives them: lr-SGD, lr-SGD-1/pg2, ..."""
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
