"""The files that a data module would read, with their splits and classes, and the files that it would not."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lit_tricks.data.image_folder import ImageFolder
from lit_tricks.data.image_table import ImageTable
from lit_tricks.data.io.file_index import Paths, find_images, left_out, list_images
from lit_tricks.data.io.label_tables import is_table, read_list, table_files
from lit_tricks.data.splits import NAMES, split_folder
from lit_tricks.utils.files import printable

__all__ = ["Listing", "listing_of"]


@dataclass
class Listing:
    """The images of a data set.

    Args:
        root: folder that holds them.
        paths: of the images.
        splits: index of the split of each image in ``NAMES``: train, val, test.
        labels: index of the class of each image.
        classes: their names.
        faults: what would stop a run.
        unused: images below the root that would not be read.
        hidden: images and folders below the root with names of hidden files.
        others: files below the root that have no ending of an image.
    """

    root: str
    paths: Paths
    splits: npt.NDArray[np.int8]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    faults: list[str]
    unused: list[str]
    hidden: list[str]
    others: list[str]

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of images by class and split, shape (classes, 3)."""
        found = np.zeros((len(self.classes), len(NAMES)), np.int64)
        np.add.at(found, (self.labels, self.splits), 1)
        return found


def listing_of(root: str, val_fraction: float | None) -> Listing:
    """List the images of a folder or a table.

    Args:
        root: folder of ``ImageFolder``, or table of ``ImageTable``.
        val_fraction: part of each class that would be held out where there are no validation images.

    Raises:
        OSError: if there is no such folder or table.
        ValueError: if a table is no table, or ``val_fraction`` is out of range.
    """
    if is_table(root):
        return _of_table(root, val_fraction)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"root={root!r}: there is no such folder or file. Give images in class folders, or a CSV."
        )
    folders = {split: split_folder(root, split) for split in NAMES}
    present = {split: folder for split, folder in folders.items() if os.path.isdir(folder)} or {"train": root}
    found = {split: list_images(folder) for split, folder in present.items()}
    classes = sorted({printable(name) for _, _, names in found.values() for name in names})
    rows: list[tuple[str, str, str]] = []
    faults: list[str] = []
    for split, (paths, labels, names) in found.items():
        rows += [(path, split, printable(names[label])) for path, label in zip(paths, labels.tolist(), strict=True)]
        counts = np.bincount(labels, minlength=len(names))
        empty = [printable(name) for name, count in zip(names, counts.tolist(), strict=True) if not count]
        faults += [f"{split} has class folders without images: {_some(empty)}"] if empty else []
    faults = [*_fault(lambda: ImageFolder(root, num_workers=0, val_fraction=val_fraction)), *faults]
    return _listing(root, rows, classes, faults, val_fraction, set())


def _of_table(table: str, val_fraction: float | None) -> Listing:
    found = read_list(table, collect=True)
    faults = found.problems or _fault(lambda: ImageTable(table, val_fraction=val_fraction))
    rows = [(os.path.join(found.root, entry.file), entry.split or "train", entry.label) for entry in found.entries]
    files = {os.path.abspath(file) for file in table_files(table).values()}
    return _listing(found.root, rows, found.classes, [*faults], val_fraction, files)


def _listing(
    root: str,
    rows: Sequence[tuple[str, str, str]],
    classes: list[str],
    faults: list[str],
    val_fraction: float | None,
    tables: set[str],
) -> Listing:
    """Make a listing of rows of path, split and class; ``tables`` are files that belong to the data set."""
    label_of = {name: label for label, name in enumerate(classes)}
    number_of = {split: number for number, split in enumerate(NAMES)}
    splits = np.array([number_of[split] for _, split, _ in rows], np.int8)
    labels = np.array([label_of[name] for _, _, name in rows], np.int64)
    if val_fraction is not None and not (splits == number_of["val"]).any():
        single = [classes[label] for label, count in Counter(labels[splits == 0].tolist()).items() if count == 1]
        if single:
            faults.append(f"classes have one image, and val_fraction={val_fraction:g} needs two: {_some(single)}")
    known = {os.path.abspath(path) for path, _, _ in rows}
    images = (os.path.join(root, name) for name in find_images(root))
    unused = [path for path in images if os.path.abspath(path) not in known]
    hidden, others = left_out(root)
    others = [path for path in others if os.path.abspath(path) not in tables and not _is_split_file(path)]
    paths = Paths("", (os.fsencode(path) for path, _, _ in rows))
    return Listing(root, paths, splits, labels, classes, faults, unused, hidden, others)


def _is_split_file(path: str) -> bool:
    """Return whether a file keeps which images are held out (see ``lit_tricks.data.splits``)."""
    return "split_" in os.path.basename(path) and path.endswith(".csv")


def _fault(make: Callable[[], object]) -> list[str]:
    """Return what a data module raises when it is made."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make()
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def _some(names: Iterable[str], most: int = 5) -> str:
    names = [*names]
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
