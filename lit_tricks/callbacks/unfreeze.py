"""Gradual unfreezing: train a pretrained network from its head down, one part after another (Howard & Ruder, 2018).

One caveat: the run must be long enough for the parts that are trained last.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lit_tricks.callbacks.finetuning.callback import Freezing, Stage
from lit_tricks.callbacks.optim.lr_factors import LRFactors
from lit_tricks.callbacks.optim.param_groups import GroupNames, optimizers_in
from lit_tricks.utils.arguments import choice, flag, invalid, numbers_by_name
from lit_tricks.utils.training_length import is_fast_dev_run

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Unfreeze"]


class Unfreeze(Freezing):
    """Unfreeze a network from its head down, one part after another ([Howard & Ruder, 2018](https://arxiv.org/abs/1801.06146)).

    All parts in ``schedule`` are frozen at the start, as by Freeze, and each part is trained from its scheduled time
    on. All other parts are trained from the start. Unfreezing does not restart learning rate schedules. A resumed run
    has the same frozen parts as an uninterrupted run.

    Cost: none. The first epochs are faster, as they run backward only through the last layers. Use it to fine-tune on
    little data, where the large gradients of a new head would damage good features. Leave it out for runs of one or two
    epochs. Under DDP each unfreezing builds the DDP wrapper again, which takes about a second.

    Args:
        schedule: time of unfreezing by part, above 0, in ``unit``: ``{layer4: 1, layer3: 2, backbone: 4}``. Parts are
            names or patterns, as in Freeze. A layer in two parts belongs to the smaller part. Near 0 a part is frozen
            for a few steps only. A time after the end of the run keeps the part frozen, with a warning.
        lr_factors: factor on the learning rate by part, above 0, for parts in the schedule: ``{backbone: 0.1}``. None
            and 1 keep the learning rate. With factors near 0 a part hardly leaves its pretrained weights.
        train_bn: whether BatchNorm layers of frozen parts are trained and update their statistics, as the others.
        unit: "epochs", or "run", in which 0.25 is a quarter of the run and 1 its end.

    Raises:
        ValueError: for an argument out of its range, or factors for parts that are not in the schedule.
        RuntimeError: when the fit starts, if a part is not found, nothing is left to train at first, another callback
            freezes the same part, the strategy keeps weights in other tensors, or a scheduler overwrites the learning
            rates; in the first step, if the loss depends on frozen parameters only.

    Example:
        ``- {class_path: Unfreeze, init_args: {schedule: {layer4: 1, backbone: 3}, lr_factors: {backbone: 0.1}}}``
    """

    _names: GroupNames

    def __init__(
        self,
        schedule: dict[str, float],
        lr_factors: dict[str, float] | None = None,
        train_bn: bool = False,
        unit: Literal["epochs", "run"] = "epochs",
    ) -> None:
        self.unit: Literal["epochs", "run"] = choice(self, "unit", unit, ("epochs", "run"))
        interval = "(0, 1]" if unit == "run" else "(0, 1e6]"
        fix = "{'layer4': 1, 'backbone': 3} trains the rest of the backbone from epoch 3 on."
        self.schedule: dict[str, float] = numbers_by_name(self, "schedule", schedule, interval, fix)
        fix = "{'backbone': 0.1} gives the backbone a tenth of the learning rate."
        self.lr_factors: dict[str, float] | None = numbers_by_name(
            self, "lr_factors", lr_factors, "(0, 1e6]", fix, or_none="factors of 1"
        )
        self.train_bn: bool = flag(self, "train_bn", train_bn)
        if unknown := [name for name in self.lr_factors or {} if name not in self.schedule]:
            raise invalid(self, f"{unknown[0]!r} is not in the schedule. Add it there.", lr_factors=lr_factors)
        self._forget()

    def stages(self) -> list[Stage]:
        """Return the parts."""
        factors = self.lr_factors or {}
        return [Stage([name], moment, name, factors.get(name, 1.0)) for name, moment in self.schedule.items()]

    def shown(self) -> str:
        """Return the call, for messages."""
        return f"Unfreeze(schedule={self.schedule})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the groups of an earlier fit."""
        if stage == "fit":
            self._forget()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the schedule in steps, and warn if the run ends before it."""
        super().on_train_start(trainer, pl_module)
        length, last = self._now.length, max(step for step in self._now.steps if step is not None)
        if length is not None and last >= length and not is_fast_dev_run(trainer):
            rank_zero_only(warnings.warn)(
                f"{self.shown()}: the run ends after {length} steps, and a part is frozen until step {last}. Lower its "
                "moment, or train longer.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return which parts have been trained, and names of the parameters in each group."""
        return super().state_dict() | {"groups": self._names.names}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the groups with the groups of the resumed run.

        Raises:
            RuntimeError: if they differ.
        """
        if self.lr_factors:
            self._names.load(checkpoint, self.state_key)

    def _configure(
        self, pl_module: LightningModule, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        stages = {pl_module.get_parameter(name): stage for stage, held in self._now.parts for name in held.parameters}

        def part_of(parameter: Tensor, _: float) -> tuple[str, float]:
            stage = stages.get(parameter)  # type: ignore[call-overload]
            return (stage.name, stage.lr_factor) if stage else ("rest", 1.0)

        factors = LRFactors("Unfreeze", part_of)
        with factors.applied() if self.lr_factors else contextlib.nullcontext():
            configured = super()._configure(pl_module, configure_optimizers, *args, **kwargs)
        if self.lr_factors:
            factors.finish(configured, type(pl_module).__name__)
            self._names.take(pl_module, optimizers_in(configured))
        return configured

    def _forget(self) -> None:
        self._names = GroupNames(f"Unfreeze(lr_factors={self.lr_factors})", "schedule, factors or network")
