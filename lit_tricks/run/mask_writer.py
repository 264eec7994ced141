"""Predicted masks as PNG files with a palette, and rows of a table of how much of each image is of which class."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from lit_tricks.run.reading.mask_predictions import palette
from lit_tricks.utils.files import read_regular, written_whole

__all__ = ["MaskWriter"]


class MaskWriter(Callback):
    """Write the labels (N, H, W) of ``predict_step`` as one PNG file per image, and collect table rows.

    Batches are (images, paths). A mask has the size of its image (nearest), and the labels as indices of the palette of
    Pascal VOC (16-bit gray for more than 256 classes). Its path in ``folder`` is the path of its image in its root. The
    columns are ``mask``, and the share of the pixels per class.

    Args:
        folder: folder for the masks, made when needed.
        roots: root folders of the images, for the paths of their masks; the parent folder for a single file.

    Attributes:
        columns: names of the columns after the file's, and the format of their numbers (see ``run.tables``).
        rows: cells of each row, by file.
    """

    def __init__(self, folder: str | Path, roots: dict[str, str]) -> None:
        self.folder: Path = Path(folder)
        self.roots = roots
        self.columns: dict[str, str] = {}
        self.rows: dict[str, list[list[Any]]] = {}
        self.paths: dict[str, Path] = {}  # of the masks, by file

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the paths of the masks.

        Raises:
            FileExistsError: if there is something at one of the paths; masks replace no files.
        """
        whole = os.path.realpath(self.folder)
        taken: set[Path] = set()
        for file in self.roots:
            path = self._path(file, taken)
            taken.add(path)
            inside = os.path.commonpath([whole, os.path.realpath(path.parent)]) == whole
            if os.path.lexists(path) or not inside:
                what = "exists" if inside else "lies behind a link"
                raise FileExistsError(
                    f"the mask {str(path)!r} {what}, and masks replace no files: remove the folder "
                    f"{str(self.folder)!r} if it has old masks, or choose another --output."
                )
            self.paths[file] = path

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
        names: list[str] = pl_module.class_names  # type: ignore[assignment]
        self.columns = {"mask": "", **dict.fromkeys(names, ".6f")}
        for file, labels in zip(files, outputs.cpu().numpy(), strict=True):
            if not file:  # the black image of a batch that could not be read
                continue
            with Image.open(io.BytesIO(read_regular(file))) as image:
                size = image.size
            mask = Image.fromarray(labels.astype(np.uint8 if labels.dtype == np.uint8 else np.uint16))
            mask = mask.resize(size, Image.Resampling.NEAREST)
            shares = np.bincount(np.asarray(mask).ravel(), minlength=len(names)) / (size[0] * size[1])
            if mask.mode == "L":
                mask.putpalette(palette().tobytes())
            path = self.paths[file]
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path, durable=False) as part:
                mask.save(part, "PNG")
            self.rows[file] = [[str(path), *shares.tolist()]]

    def summary(self, files: int) -> str:
        """Return what was written for this many files."""
        return f"{len(self.rows)} masks written to {self.folder}, their shares"

    def _path(self, file: str, taken: set[Path]) -> Path:
        relative = Path(file).relative_to(self.roots.get(file, Path(file).parent))
        path = self.folder / relative.with_suffix(".png")
        return self.folder / f"{relative}.png" if path in taken else path  # a.jpg and a.png in one folder
