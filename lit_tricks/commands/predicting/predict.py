"""``lit-tricks predict``: what a model finds in images, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lit_tricks._compat import callbacks_of
from lit_tricks.commands.checkpoints import checkpoint_at, read_checkpoint, require_finite
from lit_tricks.commands.predicting.image_files import image_files
from lit_tricks.commands.predicting.loading import accelerator_of, load
from lit_tricks.commands.predicting.onnx_network import ONNXNetwork
from lit_tricks.commands.progress import progress
from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.run.mask_writer import MaskWriter
from lit_tricks.run.prediction_writer import PredictionRows
from lit_tricks.run.tables import STDOUT, check_table, write_table
from lit_tricks.tasks.segmentation import Segmenter
from lit_tricks.utils.log import log

__all__ = ["predict"]


def predict(
    images: list[str],
    *,
    ckpt: str,
    output: str = "predictions.csv",
    top_k: int = 5,
    device: str = "auto",
    batch_size: int | None = None,
    data: LightningDataModule | None = None,
    model: LightningModule | None = None,
    trainer: Trainer | None = None,
) -> Path | None:
    """Predict images with a trained model, and write a table of the results.

    A classifier's table has one row per image: the file, its most probable classes and their probabilities. A
    Detector's table has one row per object: class, score, and box in pixels. A Segmenter's masks are PNG files, in a
    folder next to the table. A file that cannot be read has a row with the reason, in the column ``error``. Other files
    are counted and logged.

    Args:
        images: image files, folders of images at any depth, and globs such as ``photos/**/*.jpg``, one or more. "-"
            reads names from standard input, one per line.
        ckpt: checkpoint, run folder (its best checkpoint), or exported ONNX file.
        output: table to write: .csv, .json, .jsonl (a JSON object in each line) or .parquet (pip install
            "lit-tricks[parquet]"); "-" is standard output, as CSV. Its folder is made. An existing table is replaced.
        top_k: number of the most probable classes to write per image, at least 1.
        device: device of the model: "auto", "cpu", "cuda", "cuda:1" or "mps".
        batch_size: images at a time, at least 1; by default as in training.
        data: data module that prepares the images; by default the one of the checkpoint.
        model: module that the weights are for; by default the one of the checkpoint.
        trainer: the Trainer to use, with its precision and callbacks, such as TestTimeAugment.

    Returns:
        The path of the table; None for standard output.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no image.
        ValueError: for an argument out of its range, or a checkpoint that does not define how images are prepared.
        ModuleNotFoundError: for Parquet without pyarrow.
        RuntimeError: if none of the files can be read.
    """
    for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is below 1. Give 1 or more.")
    files = image_files(images)
    if model is None or data is None:
        model, data = load(ckpt)
        weights = None
    else:
        path = checkpoint_at(ckpt, "--ckpt")
        require_finite(path, read_checkpoint(path)["state_dict"], model)
        weights = str(path)
    if not isinstance(data, ImageDataModule):
        raise ValueError(f"data={type(data).__name__} cannot prepare single images. Give a data module of lit_tricks.")
    if trainer is None:
        trainer = Trainer(
            logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            **accelerator_of(device),
        )  # fmt: skip
    if trainer.world_size > 1:
        raise RuntimeError(f"{trainer.world_size} processes cannot write one table. Predict with --trainer.devices 1.")
    check_table(output)
    data.batch_size = batch_size or data.batch_size
    data.predict_on(files)
    rows = _collector(model, output, top_k, files)
    with progress("images", len(files)) as advance:
        callbacks: list[Callback] = callbacks_of(trainer)
        callbacks += [rows, _Advance(advance)]
        trainer.predict(model, datamodule=data, ckpt_path=weights, weights_only=True, return_predictions=False)
    unread = data.unread()
    if len(unread) == len(files):
        file, reason = next(iter(unread.items()))
        raise RuntimeError(f"none of the {len(files)} files can be read as an image, such as {file!r}: {reason}")
    columns = {"file": "", **rows.columns, "error": ""}
    cells: list[list[Any]] = []
    for file in files:
        cells += [[file, *row, None] for row in rows.rows.get(file, [])]
        if file in unread:
            cells.append([file, *[None] * len(rows.columns), unread[file]])
    write_table(output, columns, cells)
    where = "standard output" if output == STDOUT else output
    log.info("%s written to %s", rows.summary(len(files) - len(unread)), where)
    if unread:
        log.warning("%d of %d files could not be read: see the column `error`", len(unread), len(files))
    return None if output == STDOUT else Path(output)


class _Advance(Callback):
    """Count the images that were predicted."""

    def __init__(self, advance: Any) -> None:
        self.advance = advance

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.advance(len(batch[1]))


def _collector(model: LightningModule, output: str, top_k: int, files: dict[str, str]) -> PredictionRows | MaskWriter:
    """Return the callback that collects the rows of the table."""
    if not (isinstance(model, Segmenter) or (isinstance(model, ONNXNetwork) and model.is_dense)):
        return PredictionRows(top_k)
    if output == STDOUT:
        raise ValueError("output='-': masks are files, in a folder next to the table. Set a file, such as masks.csv.")
    path = Path(output)
    return MaskWriter(path.with_suffix("") if path.suffix else path.with_name(f"{path.name}_masks"), files)
