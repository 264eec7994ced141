"""Predicted masks as PNG files with a palette, and a table of how much of each image is of which class."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor

from lit_tricks.run.prediction_writer import require_folder, require_one_process
from lit_tricks.run.reading.mask_predictions import palette

__all__ = ["MaskWriter"]


class MaskWriter(Callback):
    """Write what ``predict_step`` returns, labels (N, H, W), as a PNG file for each image, and a CSV file.

    Batches are (images, paths). A mask has the size of its image (nearest), the labels as indices of the palette of
    Pascal VOC (of more than 256 classes as 16-bit grey), and lies as its image does in the folder that is called as the
    CSV file, without its ending. The columns of the CSV file are ``file``, ``mask``, and for each class the part of the
    pixels that it has. It appears at the end, whole.

    Args:
        output: the CSV file.

    Raises:
        FileNotFoundError: if the folder of the file does not exist.
        RuntimeError: if several processes predict.
    """

    def __init__(self, output: str = "predictions.csv") -> None:
        require_folder(output)
        self.output = Path(output)
        self.folder = self.output.with_suffix("") if self.output.suffix else self.output.with_name(f"{output}_masks")
        self.rows: list[list[Any]] = []
        self.written: set[Path] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no rows."""
        require_one_process(trainer)
        self.rows, self.written = [], set()
        root = getattr(trainer.datamodule, "predict_dir", None)  # type: ignore[attr-defined]
        self.root = Path(root) if root else None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the masks of a batch."""
        _, files = batch
        for file, labels in zip(files, outputs.cpu().numpy(), strict=True):
            with Image.open(file) as image:
                size = image.size
            mask = Image.fromarray(labels.astype(np.uint8 if labels.dtype == np.uint8 else np.uint16))
            mask = mask.resize(size, Image.Resampling.NEAREST)
            shares = np.bincount(np.asarray(mask).ravel(), minlength=len(self._names(pl_module))) / (size[0] * size[1])
            if mask.mode == "L":
                mask.putpalette(palette().tobytes())
            path = self._path(Path(file))
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
            self.rows.append([file, path, *(f"{share:.6f}" for share in shares)])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        part = self.output.with_name(f".{self.output.name}.part")
        with part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["file", "mask", *self._names(pl_module)], *self.rows])
        os.replace(part, self.output)
        rank_zero_info(f"{len(self.rows)} masks written to {self.folder}, what they hold to {self.output}")

    def _path(self, file: Path) -> Path:
        relative = file.relative_to(self.root) if self.root and file.is_relative_to(self.root) else Path(file.name)
        path = self.folder / relative.with_suffix(".png")
        if path in self.written:  # a.jpg beside a.png
            path = self.folder / f"{relative}.png"
        self.written.add(path)
        return path

    @staticmethod
    def _names(pl_module: LightningModule) -> list[str]:
        names: list[str] = pl_module.class_names  # type: ignore[assignment]
        return names
