"""A small schedule-free SGD, and the trick in runs whose module brings another optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from lit_tricks import callbacks
from lit_tricks.callbacks.base import Trick


class ScheduleFreeSGD(Optimizer):
    """Schedule-free SGD of Defazio et al., 2024, algorithm 1 with a constant learning rate: the average is uniform.

    It keeps ``z``, and the parameter is ``y = (1 - beta) * z + beta * x``. As in the authors' package, ``x`` is
    computed from ``y`` and ``z``, so that ``eval`` followed by ``train`` rounds.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        """Take the parameters and the constants of the algorithm."""
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "steps": 0, "training": False})

    @torch.no_grad()
    def _move(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] is training:
                continue
            group["training"] = training
            weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], weight)

    def train(self) -> None:
        """Write ``y`` into the parameters."""
        self._move(True)

    def eval(self) -> None:
        """Write ``x`` into the parameters."""
        self._move(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step, in training mode only."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            assert group["training"], "step was called in evaluation mode"
            group["steps"] += 1
            for y in group["params"]:
                if y.grad is None:
                    continue
                z = self.state[y].setdefault("z", y.detach().clone())
                gradient = y.grad + group["weight_decay"] * y
                share = 1 / group["steps"]
                y.lerp_(z, share)
                y.add_(gradient, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(gradient, alpha=group["lr"])
        return loss


def replaced(found: Any) -> Any:
    """Replace optimizers in what ``configure_optimizers`` returns."""
    if isinstance(found, Optimizer):
        known = ("params", "lr", "weight_decay", "name")
        return ScheduleFreeSGD([{key: group[key] for key in known if key in group} for group in found.param_groups])
    if isinstance(found, list | tuple):
        return type(found)(replaced(each) for each in found)
    return {key: replaced(each) for key, each in found.items()} if isinstance(found, dict) else found


class Replacing(Trick):
    """Replaces the optimizers of a module by schedule-free ones, and does not switch them."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap ``configure_optimizers``."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.wrap(pl_module, "configure_optimizers", self._replaced)

    def _replaced(self, configure_optimizers: Any) -> Any:
        return replaced(configure_optimizers())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Switch to training, once."""
        super().on_train_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            optimizer.train()


class ReplacedScheduleFree(Replacing, callbacks.ScheduleFree):
    """The trick in a run whose optimizers are replaced."""


ReplacedScheduleFree.__name__ = "ScheduleFree"  # in messages; the command line finds classes by their path
