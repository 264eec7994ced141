"""Predictions as a table: one line an image, its five most probable classes and their probabilities."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

__all__ = ["PredictionWriter", "require_folder", "require_one_process"]


class PredictionWriter(Callback):
    """Write what ``predict_step`` returns, probabilities (N, classes), as a CSV file.

    Batches are (images, paths). The columns are ``file``, ``label1``, ``probability1``, ... down to the fifth most
    probable class, or the last where there are fewer. The file appears at the end, whole.

    Args:
        output: the file.
        top: how many classes of an image, at most.

    Raises:
        FileNotFoundError: if the folder of the file does not exist.
        RuntimeError: if several processes predict.
    """

    def __init__(self, output: str = "predictions.csv", top: int = 5) -> None:
        require_folder(output)
        self.output = Path(output)
        self.top = top
        self.rows: list[list[Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no rows."""
        require_one_process(trainer)
        self.rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the most probable classes of a batch."""
        _, files = batch
        names = getattr(pl_module, "class_names", None)
        probabilities, labels = outputs.float().topk(min(self.top, outputs.shape[1]))
        for file, row, indices in zip(files, probabilities.tolist(), labels.tolist(), strict=True):
            pairs = [(names[i] if names else i, f"{p:.6f}") for i, p in zip(indices, row, strict=True)]
            self.rows.append([file, *(cell for pair in pairs for cell in pair)])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        top = (len(self.rows[0]) - 1) // 2
        header = ["file", *(f"{column}{i}" for i in range(1, top + 1) for column in ("label", "probability"))]
        part = self.output.with_name(f".{self.output.name}.part")
        with part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *self.rows])
        os.replace(part, self.output)
        rank_zero_info(f"{len(self.rows)} predictions written to {self.output}")


def require_folder(output: str) -> None:
    """Raise FileNotFoundError unless the folder of a file exists."""
    if not Path(output).resolve().parent.is_dir():
        raise FileNotFoundError(f"output={output!r} lies in a folder that does not exist: make it first.")


def require_one_process(trainer: Trainer) -> None:
    """Raise RuntimeError if several processes predict."""
    if trainer.world_size > 1:
        raise RuntimeError(f"{trainer.world_size} processes can not write one file: predict with --trainer.devices=1.")
