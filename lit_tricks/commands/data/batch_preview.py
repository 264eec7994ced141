"""``lit-tricks data preview``: draw the model's training images before training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lit_tricks import callbacks as tricks
from lit_tricks._compat import callbacks_of
from lit_tricks.commands.png import png_path
from lit_tricks.run.preview import Preview, preview_of
from lit_tricks.utils.files import text_cell, write_whole, written_whole
from lit_tricks.utils.log import log

__all__ = ["preview"]

BATCH_TRICKS = (tricks.CutMix, tricks.LabelSmoothing, tricks.MixUp, tricks.ProgressiveResizing)


def preview(
    data: LightningDataModule,
    model: LightningModule | None = None,
    trainer: Trainer | None = None,
    out: str = "preview.png",
    count: int = 16,
) -> Path:
    """Draw the first training images as the model's input, with their labels.

    This is the first batch of ``lit-tricks fit`` with the same arguments: after augmentation, color transforms and
    tricks that change batches, such as MixUp, in the order of the run's seed. The normalization is reversed. For a data
    module without ``mean`` and ``std`` the range is stretched to black and white, with a note in the picture. The model
    is not trained, and no run folder is made.

    Args:
        data: the data.
        model: the model, for the tricks of ``trainer``.
        trainer: the Trainer, whose callbacks may change batches.
        out: PNG file to write; labels and their shares are in a CSV file next to it.
        count: images to draw, at least 1; a batch may have fewer.

    Returns:
        The path of the picture.

    Raises:
        ValueError: if ``count`` is below 1, or ``out`` is not a PNG file.
        FileNotFoundError: if the folder of ``out`` does not exist.
        RuntimeError: if the training batches have no images.
    """
    path = png_path(out)
    if count < 1:
        raise ValueError(f"--count={count} is below 1: it is the number of images to draw.")
    found = _first_batch(data, model or _NoModel(), trainer or _quiet_trainer(), count)
    write_whole(path, found.png())
    table = path.with_suffix(".csv")
    with written_whole(table) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "class", "share"])
        rows = ((i, text_cell(name), share) for i, shares in enumerate(found.labels) for name, share in shares.items())
        writer.writerows(rows)
    shape = " x ".join(map(str, found.size))
    log.info("%s: %d training images as the model's input: %s", path, len(found.images), shape)
    return path


class _SeenError(Exception):
    """Not an error: the batch was seen, and the fit need not begin."""


class _Look(Callback):
    def __init__(self, count: int) -> None:
        self.count = count
        self.preview: Preview | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.preview = preview_of(batch, trainer.datamodule, self.count)  # type: ignore[attr-defined]
        raise _SeenError


class _NoModel(LightningModule):
    """Takes any batch, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do not train."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return no optimizers."""
        return []


def _first_batch(data: LightningDataModule, model: LightningModule, trainer: Trainer, count: int) -> Preview:
    look = _Look(count)
    callbacks = callbacks_of(trainer)
    before = list(callbacks)
    callbacks[:] = [*filter(_may_change_batches, before), look]  # called last, after the others have changed the batch
    parameter = next(model.parameters(), None)
    if parameter is not None:  # the fit wants an optimizer, and the model's own may be slow to build
        model.configure_optimizers = lambda: torch.optim.SGD([parameter], lr=0.0)  # type: ignore[method-assign]
    try:
        trainer.fit(model, data)
    except _SeenError:
        pass
    finally:
        callbacks[:] = before
        vars(model).pop("configure_optimizers", None)
    if look.preview is None:
        raise RuntimeError("there was no training batch: check trainer.limit_train_batches and max_epochs.")
    return look.preview


def _may_change_batches(callback: Callback) -> bool:
    """Return whether a callback may change batches. Other tricks, such as distillation, would build what they need."""
    return isinstance(callback, BATCH_TRICKS) or type(callback).__name__ not in tricks.__all__


def _quiet_trainer() -> Trainer:
    return Trainer(
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
