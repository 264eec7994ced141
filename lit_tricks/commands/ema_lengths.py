"""Averages of one run of any length, mixed from the snapshots of ``EMA(power=...)``.

One caveat: the profile of an average is mixed as if the weights changed continuously. The error that is compared with
``LARGEST_ERROR`` leaves out what this changes in runs of a few steps.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_tricks.callbacks.averaging.power_law import LONGEST, power_ema_mixture
from lit_tricks.callbacks.averaging.snapshots import FOLDER, read_snapshot, snapshots_in
from lit_tricks.utils.files import write_whole

__all__ = ["Snapshots", "lengths_of", "mixed", "mixtures_of", "snapshots_of", "write_lengths"]

LARGEST_ERROR = 0.05  # of a mixture's profile, relative to the norm of the exact profile
NAME = "--ema_length"


class Snapshots(NamedTuple):
    """The snapshots of a run.

    Attributes:
        files: the files by the number of updates before them.
        lengths: lengths of the averages in each file.
    """

    files: dict[int, Path]
    lengths: list[float]


def lengths_of(text: str) -> list[float]:
    """Return the lengths of "0.1", "0.05:0.25" (five) or "0.05:0.25:9" (nine).

    Raises:
        ValueError: for other text, and lengths out of their range.
    """
    fix = "Give a length such as 0.1, or a range such as 0.05:0.25."
    parts = str(text).split(":")
    try:
        ends = [float(part) for part in parts[:2]]
        [count] = map(int, parts[2:] or ["5"])
    except ValueError:
        raise ValueError(f"{NAME} {text} is not a number or a range. {fix}") from None
    if not all(0 < end < LONGEST for end in ends) or ends != sorted(set(ends)):
        raise ValueError(f"{NAME} {text}: lengths are above 0 and below 0.2886, the smaller one first. {fix}")
    if not 2 <= count <= 100:
        raise ValueError(f"{NAME} {text}: the number of lengths must be from 2 to 100. {fix}")
    if len(ends) == 1:
        return ends
    return [round(ends[0] + (ends[1] - ends[0]) * i / (count - 1), 6) for i in range(count)]


def snapshots_of(path: Path, content: Mapping[str, Any]) -> Snapshots:
    """Return the snapshots of the run that wrote a checkpoint.

    Args:
        path: path of the checkpoint. The snapshots are searched next to it, and then where the run wrote them.
        content: content of the checkpoint.

    Raises:
        FileNotFoundError: if there are no snapshots.
        ValueError: if there are several averages, or a file is damaged.
    """
    states = [state for state in content.get("callbacks", {}).values() if isinstance(state, Mapping)]
    named = [Path(str(state["snapshots"])) for state in states if state.get("power") and state.get("snapshots")]
    folders = [next((p for p in (path.parent / each.name, each) if snapshots_in(p)), None) for each in named]
    if not named:  # a checkpoint without the state of callbacks
        folders = [folder for folder in sorted(path.parent.glob(f"{FOLDER}*")) if snapshots_in(folder)]
    found = [folder for folder in folders if folder]
    if not found:
        raise FileNotFoundError(
            f"{NAME}: there are no snapshots next to {path}. Train with EMA(power=[0.05, 0.2]), which writes them."
        )
    if len(found) > 1:
        raise ValueError(
            f"{NAME}: {path} has the snapshots of several averages, {', '.join(map(str, found))}. Move all but one."
        )
    files = snapshots_in(found[0])
    lengths = [read_snapshot(file).lengths for file in files.values()]
    if any(each != lengths[0] for each in lengths):
        raise ValueError(
            f"{NAME}: {found[0]} has snapshots of averages of different lengths. Keep the files of one run."
        )
    return Snapshots(files, lengths[0])


def mixtures_of(snapshots: Snapshots, lengths: list[float]) -> dict[float, tuple[list[float], float]]:
    """Return for each length the shares of the stored averages, and the error of the mixture.

    Raises:
        ValueError: if the error is too large. The message has the lengths that can be mixed.
    """
    found = {length: _mixture(snapshots, length) for length in lengths}
    for length, (_, error) in found.items():
        if error > LARGEST_ERROR:
            raise ValueError(
                f"{NAME} {length:g}: the {len(snapshots.files)} snapshots in {_folder(snapshots)} give this average "
                f"with an error of {error:.0%} of its profile, above {LARGEST_ERROR:.0%}. Choose lengths "
                f"{_possible(snapshots)}, or train with more EMA(snapshots=...)."
            )
    return found


def mixed(
    snapshots: Snapshots, shares: list[float], state: Mapping[str, Tensor], module: nn.Module
) -> dict[str, Tensor]:
    """Return a state dict with the mixture of the stored averages, computed in float64.

    Args:
        snapshots: the snapshots.
        shares: share of each stored average, in the order of ``mixtures_of``.
        state: state dict of the run. It gives the tensors that were not averaged, and frozen tensors, which have more
            than the 16 bits of a snapshot.
        module: module of the state dict, which has the names of shared tensors.

    Raises:
        ValueError: if the averages are of another module.
    """
    means: dict[str, Tensor] = {}
    constant: dict[str, Tensor] = {}  # equal in all averages so far
    of_each = iter(shares)
    for file in snapshots.files.values():
        for average in read_snapshot(file).averages:
            share = next(of_each)
            for name, tensor in average.items():
                if name not in means:
                    means[name], constant[name] = tensor * share, tensor
                    continue
                means[name].add_(tensor, alpha=share)
                if name in constant and not torch.equal(constant[name], tensor):
                    del constant[name]
    keys: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        keys.setdefault(id(tensor), []).append(key)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    new = dict(state)
    for name, mean in means.items():
        if name not in tensors or tensors[name].shape != mean.shape:
            raise ValueError(
                f"{NAME}: {_folder(snapshots)} has averages of another model than {type(module).__name__}, which has "
                f"no {name!r} of shape {tuple(mean.shape)}. Set --module to the module of the run."
            )
        for key in keys.get(id(tensors[name]), ()):
            if key in new and name not in constant:
                new[key] = mean.to(new[key].dtype)
    return new


def write_lengths(file: Path, errors: Mapping[float, float], scores: Mapping[float, float], metric: str) -> None:
    """Write a table with a row per length: the metric, and the error of the profile as a share of its norm."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["ema_length", metric, "profile_error"])
    writer.writerows([f"{length:g}", scores.get(length, ""), f"{error:.3g}"] for length, error in errors.items())
    write_whole(file, stream.getvalue())


def _mixture(snapshots: Snapshots, length: float) -> tuple[list[float], float]:
    times = [time for time in snapshots.files for _ in snapshots.lengths]
    return power_ema_mixture(times, snapshots.lengths * len(snapshots.files), max(times), length)


def _possible(snapshots: Snapshots) -> str:
    """Return the ranges of lengths that can be mixed, in words."""
    grid = sorted({*snapshots.lengths, *(i / 200 for i in range(1, 58))})
    ranges: list[list[float]] = []
    for i, length in enumerate(grid):
        if _mixture(snapshots, length)[1] > LARGEST_ERROR:
            continue
        if ranges and ranges[-1][-1] == grid[i - 1]:
            ranges[-1].append(length)
        else:
            ranges.append([length])
    return " or ".join(f"from {each[0]:g} to {each[-1]:g}" if len(each) > 1 else f"{each[0]:g}" for each in ranges)


def _folder(snapshots: Snapshots) -> Path:
    return next(iter(snapshots.files.values())).parent
