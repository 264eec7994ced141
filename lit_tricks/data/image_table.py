"""Images whose labels are in a table: a CSV file, JSON lines, or a folder with metadata as Hugging Face has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_tricks.data.datamodule import Split
from lit_tricks.data.image_folder import ImageFolder
from lit_tricks.data.io.file_index import THREADS, Paths
from lit_tricks.data.io.label_tables import AUTO, SHOWN, Entry, ImageList, is_table, read_list
from lit_tricks.utils.arguments import invalid
from lit_tricks.utils.arguments import path as path_argument
from lit_tricks.utils.arguments import text as text_argument

__all__ = ["ImageTable", "images_at"]


class ImageTable(ImageFolder):
    """Images whose file names and labels are in a table, with the pipeline of ``ImageFolder``.

    The table is a CSV file in UTF-8 with a header; commas, semicolons, tabs or ``|`` separate its cells. It may also be
    a file of JSON lines, or a folder of Hugging Face's ``imagefolder`` layout, with ``metadata.csv`` or
    ``metadata.jsonl`` in it or in each of ``train``, ``validation`` and ``test``.

    The splits come from a column with the values train, val and test, from the folders of the metadata, or from the
    first folder of all paths. Otherwise ``val_fraction`` holds out validation images. An image that is listed twice
    counts once. The order of the rows does not matter: a table of an ``ImageFolder``'s files gives the same batches.

    Spaces around labels are removed. The classes are the sorted labels of all splits, unless ``classes`` sets their
    order; labels that are whole numbers are sorted by value. Files may have any ending.

    Args:
        table: CSV file (.csv, .tsv, .txt), JSON lines (.jsonl, .ndjson), or folder with metadata.
        root: folder that the file names are relative to, and that holds all of them; None is the folder of the table.
        file_column: name of the column with the file names; "auto" takes a usual name, such as file_name, image or
            path, or the only column with names of images.
        label_column: name of the column with the labels; "auto" takes a usual name, such as label, class or category,
            or the only other column.
        split_column: name of the column with the splits; "auto" takes split, subset or partition; None reads none.
        kwargs: all other arguments of ``ImageFolder``.

    Raises:
        ValueError: if the table is not UTF-8, lacks a column, or has a wrong row, and for arguments out of range.
        FileNotFoundError: if the table, the root or an image is missing. ``on_bad_image="skip"`` skips missing images.
        RuntimeError: while loading, as for ``ImageFolder``.

    Example:
        ``data: {class_path: ImageTable, init_args: {table: labels.csv, batch_size: 32, val_fraction: 0.2}}``
    """

    def __init__(
        self,
        table: str,
        root: str | None = None,
        file_column: str = AUTO,
        label_column: str = AUTO,
        split_column: str | None = AUTO,
        **kwargs: Any,
    ) -> None:
        fix = "Give a CSV file of file names and labels."
        table = self.table = path_argument(self, "table", table, fix)
        fix = "Give the folder of the images."
        root = self._given_root = path_argument(self, "root", root, fix, "the folder of the table")
        self._columns = {
            "file_column": text_argument(self, "file_column", file_column, "Give the name of a column."),
            "label_column": text_argument(self, "label_column", label_column, "Give the name of a column."),
            "split_column": text_argument(
                self, "split_column", split_column, "Give the name of a column.", "no splits"
            ),
        }
        self._list: ImageList | None = None
        super().__init__(root or os.path.dirname(table) or ".", **kwargs)
        self.hparams["root"] = root

    @property
    def has_test(self) -> bool:
        """Return whether the table has test images."""
        return self._list is not None and "test" in self._list.splits

    def _read_classes(self) -> list[str]:
        if self.predict_dir is not None and not os.path.lexists(self.table):
            return []  # a checkpoint has the names
        found = self._list = read_list(self.table, self._given_root, **self._columns)  # type: ignore[arg-type]
        self.root = found.root
        self._check_splits(found)
        repeated = f", {found.repeated} rows repeat others" if found.repeated else ""
        rank_zero_info(
            f"{self.table}: {len(found.entries)} images of {len(found.classes)} classes, read from the columns "
            f"{', '.join(map(repr, found.columns))}{repeated}"
        )
        return found.classes

    def _check_splits(self, found: ImageList) -> None:
        if "train" not in found.splits:
            raise invalid(self, "the table has no training images. Mark some as train.", table=self.table)
        if "val" not in found.splits and self.val_fraction is None:
            raise invalid(
                self,
                "the table has no validation images. Give --data.val_fraction 0.2 to hold out a fifth, or add a column "
                "split with train and val.",
                table=self.table,
            )
        seen = {entry.label for entry in found.entries if (entry.split or "train") == "train"}
        for split in sorted(found.splits - {"train"}):
            here = {entry.label for entry in found.of(split)}
            if unknown := sorted(here - seen):
                message = f"{split} has classes that train lacks: {_some(unknown)}. Add training images of them."
                raise invalid(self, message, table=self.table)
            if missing := sorted(seen - here):
                rank_zero_warn(f"{self.table}: {split} has no image of {len(missing)} classes: {_some(missing)}")

    def _holds_out(self) -> bool:
        assert self._list is not None
        return "val" not in self._list.splits

    def _split_file(self) -> Path:
        folder, name = (self.table, "metadata") if os.path.isdir(self.table) else os.path.split(self.table)
        return Path(folder, f"{Path(name).stem}_{super()._split_file().name}")

    def _listed(self, split: Split) -> tuple[Paths, Tensor]:
        assert self._list is not None
        entries = self._list.of("train" if split == "val" and self._holds_out() else split)
        if self.on_bad_image == "raise":
            self._require_files(entries)
        label_of = {name: label for label, name in enumerate(self.classes)}
        paths = Paths(self.root, (os.fsencode(entry.file) for entry in entries))
        return paths, torch.tensor([label_of[entry.label] for entry in entries])

    def _require_files(self, entries: Sequence[Entry]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            exist = pool.map(lambda entry: os.path.exists(os.path.join(self.root, entry.file)), entries)
            missing = [entry for entry, exists in zip(entries, exist, strict=True) if not exists]
        if missing:
            first = missing[0]
            remedy = (
                "Paths are separated by /, not by a backslash." if "\\" in first.file else "Give their --data.root."
            )
            raise FileNotFoundError(
                f"ImageTable(table={self.table!r}): {len(missing)} of {len(entries)} files are not in {self.root!r}, "
                f"such as {first.file!r} of {first.place}. {remedy}"
            )

    def _no_test(self, root: str | os.PathLike[str], remedy: str = "") -> FileNotFoundError:
        return super()._no_test(root, "Mark rows of the table as test")


def images_at(path: str, val_fraction: float | None = None) -> ImageFolder:
    """Return ``ImageTable`` for a table or a folder with metadata, and otherwise ``ImageFolder``."""
    return (ImageTable if is_table(path) else ImageFolder)(path, val_fraction=val_fraction)


def _some(names: Sequence[str]) -> str:
    """Name the first few, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
