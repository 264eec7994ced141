"""Checkpoints of command-line runs: checked for damage when read, and written atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from lit_tricks.utils.checkpoint_files import check_archive, write_checkpoint
from lit_tricks.utils.files import abandoned

__all__ = ["WholeCheckpointIO", "use_whole_checkpoints"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing, with a check of what is read, and without a moment in which a file is half.

    Lightning writes into the temporary folder first. On another file system that ends in a copy over the last good
    checkpoint, which a full disk or a killed process leaves unfinished. Buckets are as Lightning has them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint next to the path, and rename it when it is on the disk."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for part in abandoned(target):
            part.unlink(missing_ok=True)
        write_checkpoint(checkpoint, target)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ValueError: if the file is damaged.
        """
        if "://" not in str(path) and Path(path).is_file():
            check_archive(path)
        return super().load_checkpoint(path, map_location, weights_only)


def use_whole_checkpoints(trainer: Trainer) -> None:
    """Make a Trainer write checkpoints atomically, unless it has its own checkpoint plugin."""
    try:
        found = trainer.strategy.checkpoint_io
    except NotImplementedError:  # FSDP writes folders, by itself
        return
    if type(found) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
