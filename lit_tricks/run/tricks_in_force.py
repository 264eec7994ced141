"""Record the tricks of a run, with arguments and effects, in the run folder and its loggers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.finite import to_json

__all__ = ["TricksInForce", "tricks_in_force"]


def tricks_in_force(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the tricks among the callbacks, in their order, by class name: ``arguments`` and announced ``effect``."""
    found: dict[str, dict[str, Any]] = {}
    for trick in callbacks_of(trainer):
        if isinstance(trick, Trick):
            name = key = type(trick).__name__
            while key in found:
                key = f"{name} ({sum(other.startswith(name) for other in found) + 1})"
            arguments = {p: _plain(getattr(trick, p, None)) for p in inspect.signature(type(trick)).parameters}
            found[key] = {"arguments": arguments, "effect": trick.effect}
    return found


class TricksInForce(Callback):
    """Writes the tricks to ``tricks.json`` after all of them have announced their effect, and logs them to W&B.

    Args:
        folder: the run folder; only on rank zero.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them down. It is the last of the callbacks, so that the tricks come before."""
        if not trainer.is_global_zero:
            return
        tricks = tricks_in_force(trainer)
        write_whole(self.folder / "tricks.json", to_json(tricks, indent=2) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):  # whose hyperparameters are the configuration and nothing else
                logger.experiment.config.update({"tricks": tricks}, allow_val_change=True)
            elif not isinstance(logger, CSVLogger):
                logger.log_hyperparams({"tricks": tricks})


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; a module, such as a teacher, by its class."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
