"""Snapshots of averages: files of a run, bounded in number, from which averages of other lengths are mixed.

A snapshot has all averages after the same update, in 16 bits. Which updates have a file depends only on the number of
updates so far, so a resumed run has the same files as an uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lit_tricks.utils.checkpoint_files import load_archive, write_checkpoint
from lit_tricks.utils.files import abandoned

__all__ = [
    "FOLDER",
    "Snapshot",
    "copy_snapshots",
    "free_folder",
    "read_snapshot",
    "snapshot_interval",
    "snapshots_in",
    "thin_snapshots",
    "write_snapshot",
]

FOLDER = "ema_snapshots"
SUFFIX = ".pt"


class Snapshot(NamedTuple):
    """The averages after an update.

    Attributes:
        updates: number of updates of the averages.
        lengths: length of each average.
        averages: for each length, the averaged tensors by name.
    """

    updates: int
    lengths: list[float]
    averages: list[dict[str, Tensor]]


def snapshot_interval(updates: int, first: int, most: int) -> int:
    """Return the updates between snapshots: ``first``, doubled until the run so far has at most ``most`` of them.

    Args:
        updates: number of updates so far.
        first: interval at the start of the run, 1 or more.
        most: largest number of snapshots, 1 or more.

    Example:
        >>> [snapshot_interval(updates, first=10, most=4) for updates in (40, 50, 90, 100)]
        [10, 20, 20, 40]
    """
    interval = first
    while updates // interval > most:
        interval *= 2
    return interval


def snapshots_in(folder: Path) -> dict[int, Path]:
    """Return the snapshots of a folder by their number of updates, in this order."""
    found = {int(file.stem): file for file in folder.glob(f"*{SUFFIX}") if file.stem.isdecimal()}
    return dict(sorted(found.items()))


def free_folder(parent: Path, name: str) -> Path:
    """Return ``parent/name``, or ``parent/name-v1`` and so on if that has the snapshots of another run."""
    folder, version = parent / name, 0
    while snapshots_in(folder):
        version += 1
        folder = parent / f"{name}-v{version}"
    return folder


def copy_snapshots(source: Path, target: Path, updates: int) -> None:
    """Copy the snapshots of a run's first updates to the folder of the run that resumes it."""
    for number, file in snapshots_in(source).items():
        if number <= updates:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target / file.name)


def thin_snapshots(folder: Path, updates: int, interval: int) -> None:
    """Remove the snapshots that a run does not have after ``updates``: later ones, and those between intervals."""
    for number, file in snapshots_in(folder).items():
        if number > updates or (number % interval and number < updates):
            file.unlink()


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot atomically. Tensors are written in fp16, divided by the power of 2 above their largest value.

    The power of 2 keeps large variances and small weights in the range of fp16. A value is rounded by at most 1 / 2048
    of itself, or ``2 ** -24`` of the tensor's largest value. Complex tensors, and tensors with values that are not
    finite, keep their type.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{snapshot.updates}{SUFFIX}"
    for part in abandoned(file):
        part.unlink()
    packed = [{name: _packed(tensor) for name, tensor in average.items()} for average in snapshot.averages]
    content = {
        "updates": snapshot.updates,
        "lengths": list(snapshot.lengths),
        "averages": [{name: tensor for name, (tensor, _) in average.items()} for average in packed],
        "exponents": [{name: exponent for name, (_, exponent) in average.items()} for average in packed],
    }
    write_checkpoint(content, file)


def read_snapshot(file: Path) -> Snapshot:
    """Return a snapshot, with real tensors in float64.

    Raises:
        ValueError: if the file is damaged, or no snapshot.
    """
    content: Any = load_archive(file)
    try:
        averages = [
            {name: _unpacked(tensor, exponents[name]) for name, tensor in average.items()}
            for average, exponents in zip(content["averages"], content["exponents"], strict=True)
        ]
        return Snapshot(int(content["updates"]), [float(length) for length in content["lengths"]], averages)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} is not a snapshot of EMA(power=...), or damaged. Remove it.") from error


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    tensor = tensor.detach()
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if tensor.is_complex() or not math.isfinite(largest):
        return tensor.cpu().clone(), 0
    exponent = max(math.frexp(largest)[1], -100)  # so that the factor is in the range of fp32
    return (tensor * 2.0**-exponent).half().cpu(), exponent


def _unpacked(tensor: Tensor, exponent: int) -> Tensor:
    return tensor.clone() if tensor.is_complex() else tensor.double() * 2.0**exponent
