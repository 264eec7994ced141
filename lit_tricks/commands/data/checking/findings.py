"""The findings of a check of a data set: faults that stop a run, and problems that make its results misleading."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lit_tricks.commands.data.checking.image_facts import ODDITIES, Facts
from lit_tricks.commands.data.checking.listing import Listing
from lit_tricks.data.splits import NAMES
from lit_tricks.run.reading.predictions import IMBALANCE
from lit_tricks.utils.files import printable

__all__ = ["QUANTILES", "Finding", "find", "sizes"]

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
MOST = 1000  # files of a finding in the file of results
SPLITS = tuple(NAMES)

Level = Literal["fault", "warning", "note"]


@dataclass
class Finding:
    """One kind of thing that was found.

    Args:
        level: "fault" stops a run, "warning" makes results worse or misleading, "note" is for information.
        kind: short name.
        count: of files, classes or groups.
        text: what it means, and what to do.
        files: some of them, by their path below the root.
    """

    level: Level
    kind: str
    count: int
    text: str
    files: list[str] = field(default_factory=list)


def find(listing: Listing, facts: Facts) -> list[Finding]:
    """Return all findings, the faults first."""
    found = [Finding("fault", "structure", 1, text) for text in listing.faults]
    if facts.reasons:
        files = [f"{_name(listing, index)} ({reason})" for index, reason in facts.reasons.items()]
        text = "they stop training. Replace or remove them, or give --data.on_bad_image skip."
        found.append(Finding("fault", "unreadable", len(files), text, files[:MOST]))
    found += _duplicates(listing, facts)
    found += _classes(listing)
    for kind, text in ODDITIES.items():
        indices = facts.odd(kind)
        files = [_name(listing, index) for index in indices[:MOST].tolist()]
        if len(indices):
            found.append(
                Finding("warning" if kind in ("tiny", "EXIF orientation") else "note", kind, len(indices), text, files)
            )
    for kind, text, paths in (
        (
            "unused images",
            "they are in no class folder, no split or no row of the table, and are not read.",
            listing.unused,
        ),
        ("hidden", "names that begin with a dot, and those that systems make, are not read.", listing.hidden),
        ("other files", "their endings do not belong to images, and they are not read.", listing.others),
    ):
        files = [_below(listing.root, path) for path in paths[:MOST]]
        if paths:
            found.append(Finding("warning" if kind == "unused images" else "note", kind, len(paths), text, files))
    order = ("fault", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def _duplicates(listing: Listing, facts: Facts) -> Iterator[Finding]:
    """Find images of equal pixels: in several splits, with several labels, and others."""
    across: list[str] = []
    labeled: list[str] = []
    within: list[str] = []
    copies = 0
    for group in _groups(facts):
        how = "same file" if len(set(facts.content[group].tolist())) == 1 else "same pixels"
        splits, labels = ({*values[group].tolist()} for values in (listing.splits, listing.labels))
        names = f"{' = '.join(_name(listing, index) for index in group[:5].tolist())} ({how})"
        copies += len(group) - 1
        if len(splits) > 1:
            across.append(names)
        if len(labels) > 1:
            labeled.append(names)
        if len(splits) == len(labels) == 1:
            within.append(names)
    rows: tuple[tuple[Level, str, str, list[str]], ...] = (
        ("warning", "conflicting labels", "equal images have different classes. Correct one of the labels.", labeled),
        (
            "warning",
            "duplicates across splits",
            "equal images are in several splits, so that validation looks better than it is. Remove them from one.",
            across,
        ),
        (
            "note",
            "duplicates",
            "groups of equal images are in one class and split. They count more than others.",
            within,
        ),
    )
    for level, kind, text, groups in rows:
        if groups:
            yield Finding(level, kind, len(groups), text, groups[:MOST])


def _groups(facts: Facts) -> Iterator[Any]:
    """Give the indices of each group of images with equal pixels, or of unreadable files with equal bytes."""
    keys = np.where(facts.pixels == 0, facts.content, facts.pixels)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = [*(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(order)]
    for start, end in itertools.pairwise([0, *ends]):
        if end - start > 1 and ordered[start] != 0:
            yield order[start:end]


def _classes(listing: Listing) -> Iterator[Finding]:
    counts = listing.counts()
    train = counts[:, 0]
    if len(train) and train.min() > 0 and train.max() > IMBALANCE * train.min():
        ratio = train.max() / train.min()
        large, small = (listing.classes[int(index)] for index in (train.argmax(), train.argmin()))
        text = f"{large!r} has {ratio:.0f} times the training images of {small!r}. Compare accuracy by class."
        yield Finding("warning", "imbalance", 1, text)
    for number, split in enumerate(SPLITS):
        missing = [name for name, count in zip(listing.classes, counts[:, number].tolist(), strict=True) if not count]
        if missing and counts[:, number].any():
            text = f"{split} has no image of them: {_listed(missing)}"
            yield Finding("warning", "missing classes", len(missing), text)
    plain: dict[str, list[str]] = {}
    for name in listing.classes:
        plain.setdefault("".join(name.casefold().split()).replace("-", "").replace("_", ""), []).append(name)
    if alike := [names for names in plain.values() if len(names) > 1]:
        text = f"names differ only by case, spaces or hyphens: {_listed(' / '.join(names) for names in alike)}"
        yield Finding("warning", "similar classes", len(alike), text)


def sizes(facts: Facts) -> dict[str, list[float]]:
    """Return quantiles of the width, the height and the short side of the images that can be read."""
    widths, heights = (sides[facts.widths > 0] for sides in (facts.widths, facts.heights))
    if not len(widths):
        return {}
    rows = {"width": widths, "height": heights, "short side": np.minimum(widths, heights)}
    return {name: np.quantile(sides, QUANTILES).tolist() for name, sides in rows.items()}


def _name(listing: Listing, index: int) -> str:
    return _below(listing.root, listing.paths[index])


def _below(root: str, path: str) -> str:
    return printable(os.path.relpath(path, root))


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = [*names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
