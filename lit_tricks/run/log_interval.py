"""Set how often a run logs, if nobody has, and log the learning rates, if nothing else does."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from lit_tricks._compat import callbacks_of, should_update_logs
from lit_tricks.callbacks import SWA
from lit_tricks.callbacks.optim.lr_override import rates_of
from lit_tricks.callbacks.optim.schedule import Schedule

__all__ = ["LogInterval", "LogRates"]

LEAST_POINTS = 50  # of a curve


class LogInterval(Callback):
    """Log more often than every 50 steps in a run that is so short that its curves would have few points."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the interval, now that the length of the run is known."""
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps):
            interval = int(steps) // LEAST_POINTS
            trainer.log_every_n_steps = min(max(interval, 1), trainer.log_every_n_steps)  # type: ignore[attr-defined]


class LogRates(Callback):
    """Log the learning rates, unless a schedule of ours or Lightning's LearningRateMonitor logs them."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rates of the step."""
        others = (Schedule, SWA, LearningRateMonitor)
        if should_update_logs(trainer) and not any(isinstance(each, others) for each in callbacks_of(trainer)):
            pl_module.log_dict(rates_of(trainer.optimizers), on_step=True, on_epoch=False)
