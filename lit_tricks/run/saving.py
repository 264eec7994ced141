"""What a run saves in its folder for those who go on with it: its configuration, and its last checkpoint."""

from __future__ import annotations

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lit_tricks.run.wandb_run import tell_wandb

__all__ = ["LastCheckpoint", "SaveConfig"]


class SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration in the run folder, and hands it to remote loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the configuration where no run folder is seen."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"config": config})
            if isinstance(logger, WandbLogger):
                tell_wandb(logger, pl_module, config.get("watch"))


class LastCheckpoint(ModelCheckpoint):
    """Saves the last checkpoint, and tells no logger of it: W&B's would call it the best one too."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        trainer.save_checkpoint(filepath, self.save_weights_only)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
