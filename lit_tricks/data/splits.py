"""Find the folders of the splits, and hold out validation images of the training images."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_tricks.utils.files import MOST_RESULTS, read_regular, written_whole

__all__ = ["held_out", "split_folder", "split_name"]

NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test",),
}


def split_folder(root: str, split: str) -> str:
    """Return the folder of a split below a root; if there is none, the path that it would have.

    Raises:
        ValueError: if several folders could be the split.
    """
    found = [name for name in NAMES[split] if os.path.isdir(os.path.join(root, name))]
    if len(found) > 1:
        raise ValueError(f"root={root!r} has the folders {' and '.join(found)} for {split}: keep one of them")
    return os.path.join(root, found[0] if found else split)


def split_name(fraction: float, seed: int) -> str:
    """Return the name of the file that keeps which images are held out."""
    return f"split_{fraction:g}_{seed}.csv"


def held_out(
    folder: str, paths: Sequence[str], labels: Sequence[int], fraction: float, seed: int, file: Path
) -> npt.NDArray[np.bool_]:
    """Decide which images are for validation, in proportion to the classes.

    The decision is kept in a file: images that are added later do not move others. Only the names of the files and the
    seed decide where new images go.

    Args:
        folder: folder of the images.
        paths: paths of the images.
        labels: classes of the images.
        fraction: part of each class that is held out, above 0 and below 1; at least one image, and never all.
        seed: of the decision.
        file: that keeps the decision.

    Raises:
        ValueError: if a class has a single image.
    """
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    known = _read(file)
    chosen = np.array([known.get(name) == "val" for name in names], dtype=bool)
    order = np.argsort(
        [hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).hexdigest() for name in names]
    )
    for label in np.unique(labels):
        mine = np.asarray(labels) == label
        count = int(mine.sum())
        if count < 2:
            raise ValueError(
                f"val_fraction={fraction:g}: {names[int(np.argmax(mine))]!r} is the only image of its class in "
                f"{folder!r}, and validation needs another one. Add images, or remove the class."
            )
        wanted = min(max(1, round(fraction * count)), count - 1) - int(chosen[mine].sum())
        new = [index for index in order if mine[index] and names[index] not in known]
        chosen[new[: max(0, wanted)]] = True
    if not known.keys() >= set(names):
        _write(file, names, chosen)
    rank_zero_info(f"{folder}: {int(chosen.sum())} of {len(names)} images are for validation, by {file.name}")
    return chosen


def _read(file: Path) -> dict[str, str]:
    try:
        text = read_regular(file, MOST_RESULTS).removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
        return {row["file"]: row["split"] for row in csv.DictReader(io.StringIO(text, newline=""))}
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, csv.Error) as error:
        raise ValueError(f"{file} is not a table with the columns file and split. Remove it, or repair it.") from error


@rank_zero_only
def _write(file: Path, names: list[str], chosen: npt.NDArray[np.bool_]) -> None:
    rows = ((name, "val" if held else "train") for name, held in zip(names, chosen, strict=True))
    try:
        with (
            written_whole(file) as part,
            part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
        ):
            csv.writer(stream).writerows([("file", "split"), *rows])
    except OSError as error:
        rank_zero_warn(f"{file} cannot be written ({error.strerror}): images that are added may move others.")
