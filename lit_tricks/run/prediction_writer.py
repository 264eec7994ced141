"""Predictions as rows of a table: an image with its most probable classes, or an object with its box."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

__all__ = ["PredictionRows"]

CLASS = {"label": "", "probability": ".6f"}
OBJECTS = {"label": "", "score": ".6f", "x0": ".2f", "y0": ".2f", "x1": ".2f", "y1": ".2f"}


class PredictionRows(Callback):
    """Collect what ``predict_step`` returns as rows of a table.

    Batches are (images, paths). Of probabilities (N, classes) the columns are ``label1``, ``probability1``, ... down to
    the last of the most probable classes. Of objects, a dict of ``boxes``, ``labels`` from 1 and ``scores`` for each
    image, each has a row: ``label``, ``score``, and its box in pixels, ``x0``, ``y0``, ``x1``, ``y1``; an image without
    objects has none.

    Args:
        top: how many classes of an image, at most.

    Attributes:
        columns: names of the columns after the file's, and the format of their numbers (see ``run.tables``).
        rows: cells of each row, by file.
    """

    def __init__(self, top: int = 5) -> None:
        self.top = top
        self.columns: dict[str, str] = {}
        self.rows: dict[str, list[list[Any]]] = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of a batch."""
        _, files = batch
        names = getattr(pl_module, "class_names", None)
        if not isinstance(outputs, Tensor):
            self.columns = OBJECTS
            found = {file: list(objects_of(each, names)) for file, each in zip(files, outputs, strict=True)}
        else:
            found = self._classes(files, outputs, names)
        found.pop("", None)  # the black image of a batch that could not be read
        self.rows |= found

    def summary(self, files: int) -> str:
        """Return what was predicted for this many files."""
        count = sum(map(len, self.rows.values()))
        return f"{count} objects in {files} images" if self.columns == OBJECTS else f"{count} predictions"

    def _classes(self, files: list[str], outputs: Tensor, names: list[str] | None) -> dict[str, list[list[Any]]]:
        top = min(self.top, outputs.shape[1])
        self.columns = {f"{name}{i}": how for i in range(1, top + 1) for name, how in CLASS.items()}
        probabilities, labels = outputs.float().topk(top)
        rows = {}
        for file, row, indices in zip(files, probabilities.tolist(), labels.tolist(), strict=True):
            pairs = [(str(names[i] if names else i), p) for i, p in zip(indices, row, strict=True)]
            rows[file] = [[cell for pair in pairs for cell in pair]]
        return rows


def objects_of(found: dict[str, Tensor], names: list[str] | None) -> Iterator[list[Any]]:
    """Give the cells of each object of an image, the best first."""
    parts = (found[key].tolist() for key in ("labels", "scores", "boxes"))
    for label, score, box in zip(*parts, strict=True):
        yield [str(names[label - 1] if names else label), score, *box]
