"""``lit-tricks data check``: what is in a data set, and what is wrong with it, before anything is trained."""

from __future__ import annotations

import json as json_format
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lit_tricks.commands.data.checking.findings import QUANTILES, Finding, find, sizes
from lit_tricks.commands.data.checking.image_facts import read_facts
from lit_tricks.commands.data.checking.listing import Listing, listing_of
from lit_tricks.commands.data.checking.picture import picture_of
from lit_tricks.commands.png import png_path
from lit_tricks.commands.progress import progress
from lit_tricks.data.splits import NAMES
from lit_tricks.utils.arguments import integer, number
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.log import log

__all__ = ["check"]

ROWS = 30  # classes in the table of the terminal
SHOWN = 3  # files of a finding in the terminal
MAX_WORKERS = 16


def check(
    root: str,
    out: str = "check.png",
    json: bool = False,
    val_fraction: float | None = 0.2,
    num_workers: int | Literal["auto"] = "auto",
) -> Path:
    """Check images and their labels before training.

    The check reads all images as ``ImageFolder`` or ``ImageTable`` would. It prints the images by class and split, the
    sizes, and these findings:

    - faults, which would stop a run: unreadable and truncated files, wrong folders, classes without images, and wrong
      rows of a table
    - equal images (by bytes or by decoded pixels) in several splits or with different labels
    - classes that a split lacks, class imbalance, and class names that are alike
    - odd files: wrong endings, CMYK, 16 bits, tiny, animated, turned by EXIF; and images that would not be read

    The exit code is 1 if there are faults. Nothing is written into the data set.

    Args:
        root: folder with class folders or with ``train``, ``val`` and ``test``, as for ``ImageFolder``; or the table or
            folder with metadata of ``ImageTable``.
        out: PNG file to write, with the counts and the sizes; all findings are in a JSON file next to it.
        json: print the findings as JSON instead of the table.
        val_fraction: part of each class that the run will hold out where there are no validation images, above 0 and
            below 1; None for a run that holds out none.
        num_workers: processes that read; "auto" is one for each core, 16 at most; 0 reads in the main process.

    Returns:
        The path of the JSON file.

    Raises:
        RuntimeError: if there are faults, after all else is done.
        FileNotFoundError: if there is no such folder or table.
        ValueError: for an argument out of its range, or a file that is no table.
    """
    path = png_path(out)
    number("data check", "val_fraction", val_fraction, "(0, 1)", "0.2 holds out a fifth.", "no fraction")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given: int = min(cores, MAX_WORKERS) if num_workers == "auto" else num_workers
    workers = integer("data check", "num_workers", given, 0, 'Give "auto" or a number.')
    listing = listing_of(os.fspath(root), val_fraction)
    with progress("images", len(listing.paths)) as advance:
        facts = read_facts(listing.paths, workers, advance)
    findings = find(listing, facts)
    quantiles = sizes(facts)
    write_whole(path, picture_of(listing, facts))
    text = json_format.dumps(_result(root, listing, quantiles, findings), indent=1, ensure_ascii=False) + "\n"
    write_whole(path.with_suffix(".json"), text)
    sys.stdout.write(text if json else _text(listing, quantiles, findings))
    log.info("%s and %s written", path, path.with_suffix(".json"))
    faults = [finding for finding in findings if finding.level == "fault"]
    if faults:
        what = ", ".join(f"{finding.count} {finding.kind}" for finding in faults)
        raise RuntimeError(f"data check {root}: {len(faults)} faults would stop a run ({what}). Correct them first.")
    return path.with_suffix(".json")


def _result(root: str, listing: Listing, quantiles: dict[str, Any], findings: Iterable[Finding]) -> dict[str, Any]:
    counts = listing.counts()
    return {
        "root": str(root),
        "images": len(listing.paths),
        "splits": dict(zip(NAMES, counts.sum(0).tolist(), strict=True)),
        "classes": {
            name: dict(zip(NAMES, row, strict=True)) for name, row in zip(listing.classes, counts.tolist(), strict=True)
        },
        "sizes": {name: dict(zip(map(str, QUANTILES), values, strict=True)) for name, values in quantiles.items()},
        "findings": [asdict(finding) for finding in findings],
    }


def _text(listing: Listing, quantiles: dict[str, Any], findings: Iterable[Finding]) -> str:
    """Return the tables and the findings for a terminal."""
    counts = listing.counts()
    used = [number for number, split in enumerate(NAMES) if counts[:, number].any() or split == "train"]
    rows = [
        [_shown(name), *(str(row[number]) for number in used)]
        for name, row in zip(listing.classes, counts.tolist(), strict=True)
    ]
    if len(rows) > ROWS:
        order = sorted(range(len(rows)), key=lambda index: (-int(counts[index].sum()), index))
        left_out = [f"... {len(rows) - ROWS} more", *([""] * len(used))]
        rows = [
            *(rows[index] for index in order[: ROWS // 2]),
            left_out,
            *(rows[index] for index in order[-(ROWS // 2) :]),
        ]
    rows.append(["total", *(str(counts[:, number].sum()) for number in used)])
    lines = _aligned([["class", *([*NAMES][number] for number in used)], *rows])
    if quantiles:
        header = ["pixels", "least", "5 %", "median", "95 %", "most"]
        lines += [
            "",
            *_aligned([header, *([name, *(f"{value:.0f}" for value in row)] for name, row in quantiles.items())]),
        ]
    lines.append("")
    for finding in findings:
        several = f"{finding.count} x " if finding.files else ""
        lines.append(f"{finding.level}: {several}{finding.kind}: {_shown(finding.text)}")
        lines += [f"    {_shown(file)}" for file in finding.files[:SHOWN]]
        if finding.count > SHOWN and finding.files:
            lines.append(f"    ... {finding.count - SHOWN} more, see the JSON file")
    if not any(finding.level == "fault" for finding in findings):
        lines.append("no faults: a run can read all images")
    return "\n".join(lines) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of columns; all but the first are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _shown(text: str) -> str:
    """Return text without characters that control a terminal."""
    return text if text.isprintable() else repr(text)[1:-1]
