"""Files that cannot be read as images: loading processes mark them, and the main process reports them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_tricks._compat import logging_step
from lit_tricks.data.io.jpeg import BadImageError
from lit_tricks.utils.files import text_cell
from lit_tricks.utils.log import log

__all__ = ["BadImages", "OnBadImage", "Report"]


OnBadImage = Literal["raise", "skip"]


class BadImages:
    """The bad files of a data set that were found so far, in memory that all processes share.

    Args:
        source: the data set. A bad item is read again to report the reason.
        name: of the data set.
        replace: whether another image replaces a bad one; otherwise the batch is smaller.
    """

    def __init__(self, source: Any, name: str, replace: bool) -> None:
        self.source = source
        self.name = name
        self.replace = replace
        self.marks: Tensor = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        self.reported: list[int] = []

    def mark(self, index: int) -> None:
        """Remember a bad file."""
        self.marks[index] = 1

    def new(self) -> list[int]:
        """Return the bad files that were found since the last call."""
        marks = self.marks.numpy().view(bool)
        if np.count_nonzero(marks) == len(self.reported):
            return []
        found = sorted(set(marks.nonzero()[0].tolist()) - set(self.reported))
        self.reported += found
        return found

    def row(self, index: int) -> tuple[str, str, str]:
        """Return the data set, the file, and the reason."""
        path = self.source.paths[index]
        try:
            self.source[index][0].load()
        except BadImageError as error:
            return self.name, path, str(error.__cause__ or error)
        return self.name, path, "could be read later"


class Report:
    """``bad_images.csv`` in the folder of a run, ``data/bad_images`` in its metrics, and a warning at the end.

    Args:
        folder: of the run; None writes no file.
    """

    def __init__(self, folder: str | None) -> None:
        self.path = None if folder is None else Path(folder, "bad_images.csv")
        self.paths: list[str] = []
        self.warned = 0

    def update(self, bad: Iterable[BadImages], trainer: Trainer | None) -> None:
        """Report the files that were found since the last call."""
        rows = [each.row(index) for each in bad for index in each.new()]
        if not rows:
            return
        self.paths += [path for _, path, _ in rows]
        self._write(rows)
        if trainer is not None:
            step = logging_step(trainer)
            for logger in trainer.loggers:
                logger.log_metrics({"data/bad_images": float(len(self.paths))}, step)

    def warn(self) -> None:
        """Report the number of bad files, once."""
        count = len(self.paths)
        if count > self.warned:
            where = f"see {self.path}" if self.path else "such as " + ", ".join(map(repr, self.paths[:3]))
            log.warning("%d image files could not be read and were skipped: %s", count, where)
        self.warned = count

    def _write(self, rows: Sequence[tuple[str, str, str]]) -> None:
        if self.path is None:
            return
        text = io.StringIO()
        writer = csv.writer(text)
        if not self.path.exists():
            writer.writerow(["split", "file", "reason"])
        writer.writerows(map(text_cell, row) for row in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as stream:  # one write: several processes may do so
                stream.write(text.getvalue().encode(errors="surrogateescape"))
        except OSError as error:
            log.warning("%s cannot be written (%s)", self.path, os.strerror(error.errno or 0))
            self.path = None
