"""Save the configuration and the last checkpoint of a run in its folder."""

from __future__ import annotations

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor

from lit_tricks._compat import overrides
from lit_tricks.run.wandb_run import tell_wandb
from lit_tricks.utils.finite import all_finite

__all__ = ["BestCheckpoint", "LastCheckpoint", "SaveConfig"]


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run folder, and hands it to remote loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration where no run folder is seen."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                tell_wandb(logger, config, pl_module)
            elif not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"config": config})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send histograms to W&B as often as metrics are logged, which ``LogInterval`` has decided by now."""
        watch = self.config.get("watch")
        for logger in trainer.loggers:
            if watch and isinstance(logger, WandbLogger):
                often = trainer.log_every_n_steps  # type: ignore[attr-defined]
                logger.watch(pl_module, log=watch, log_freq=often, log_graph=False)


class BestCheckpoint(ModelCheckpoint):
    """Saves the best checkpoint, and never one with a score or weights that are not finite."""

    @overrides(ModelCheckpoint)
    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        score = monitor_candidates.get(self.monitor or "")
        finite = (score is None or bool(score.isfinite().all())) and all_finite(trainer.lightning_module)
        if trainer.strategy.reduce_boolean_decision(finite):
            super()._save_topk_checkpoint(trainer, monitor_candidates)


class LastCheckpoint(ModelCheckpoint):
    """Saves the last checkpoint without notifying loggers: W&B's would also call it the best one."""

    @overrides(ModelCheckpoint)
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        loggers, trainer.loggers = trainer.loggers, []
        try:
            super()._save_checkpoint(trainer, filepath)
        finally:
            trainer.loggers = loggers
