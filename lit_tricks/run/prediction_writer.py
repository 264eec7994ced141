"""Predictions as a table: a line for each image with its most probable classes, or for each object with its box."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

__all__ = ["PredictionWriter", "require_folder", "require_one_process"]


class PredictionWriter(Callback):
    """Write what ``predict_step`` returns as a CSV file.

    Batches are (images, paths). Of probabilities (N, classes) the columns are ``file``, ``label1``, ``probability1``,
    ... down to the fifth most probable class, or the last where there are fewer. Of objects, a dict of ``boxes``,
    ``labels`` from 1 and ``scores`` for each image, each has a line: ``file``, ``label``, ``score``, and its box in
    pixels, ``x0``, ``y0``, ``x1``, ``y1``; an image without objects has none. The file appears at the end, whole.

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
        self.header: list[str] = []
        self.rows: list[list[Any]] = []
        self.images = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no rows."""
        require_one_process(trainer)
        self.rows, self.images = [], 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what was said of a batch."""
        _, files = batch
        names = getattr(pl_module, "class_names", None)
        self.images += len(files)
        if not isinstance(outputs, Tensor):
            self.header = _OBJECTS
            for file, found in zip(files, outputs, strict=True):
                self.rows += [[file, *cells] for cells in _objects(found, names)]
            return
        top = min(self.top, outputs.shape[1])
        self.header = ["file", *(f"{column}{i}" for i in range(1, top + 1) for column in ("label", "probability"))]
        probabilities, labels = outputs.float().topk(top)
        for file, row, indices in zip(files, probabilities.tolist(), labels.tolist(), strict=True):
            pairs = [(names[i] if names else i, f"{p:.6f}") for i, p in zip(indices, row, strict=True)]
            self.rows.append([file, *(cell for pair in pairs for cell in pair)])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        part = self.output.with_name(f".{self.output.name}.part")
        with part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([self.header, *self.rows])
        os.replace(part, self.output)
        what = f"{len(self.rows)} objects in {self.images} images" if self.header == _OBJECTS else None
        rank_zero_info(f"{what or f'{len(self.rows)} predictions'} written to {self.output}")


_OBJECTS = ["file", "label", "score", "x0", "y0", "x1", "y1"]


def _objects(found: dict[str, Tensor], names: list[str] | None) -> Iterator[list[Any]]:
    """Cells of each object of an image, the best first."""
    parts = (found[key].tolist() for key in ("labels", "scores", "boxes"))
    for label, score, box in zip(*parts, strict=True):
        yield [names[label - 1] if names else label, f"{score:.6f}", *(f"{side:.2f}" for side in box)]


def require_folder(output: str) -> None:
    """Raise FileNotFoundError unless the folder of a file exists."""
    if not Path(output).resolve().parent.is_dir():
        raise FileNotFoundError(f"output={output!r} lies in a folder that does not exist: make it first.")


def require_one_process(trainer: Trainer) -> None:
    """Raise RuntimeError if several processes predict."""
    if trainer.world_size > 1:
        raise RuntimeError(f"{trainer.world_size} processes can not write one file: predict with --trainer.devices=1.")
