"""Accuracy and cost at many sizes of the test images: a table, ``resolution.csv`` and ``resolution.png``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lit_tricks.run.report.style import PLAIN_TEXT
from lit_tricks.utils.files import written_whole

__all__ = ["APPARENT", "report_resolution"]

# Size in training over the best one in the test, for crops of 8 to 100 % of the area and a test that crops 224 of 256
# pixels (Touvron et al., 2019, section 3): 2/3 * (1 - 0.28**3) / (1 - 0.28**2) * 256 / 224.
APPARENT = 0.81

Row = Mapping[str, Any]


def report_resolution(folder: Path, rows: Sequence[Row], train_size: int | None, title: str) -> None:
    """Write ``resolution.csv`` and ``resolution.png``, and print the table.

    Args:
        folder: folder of the files, made if it is missing.
        rows: ``size``, ``crop_ratio`` (None: the data's ratio), ``gmac`` per image, ``top1`` and perhaps ``top5``.
        train_size: side of the training images in pixels, if known.
        title: title of the picture and the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = [name for name in ("size", "crop_ratio", "gmac", "top1", "top5") if name in rows[0]]
    with written_whole(folder / "resolution.csv") as part, part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    _draw(rows, train_size, title, folder / "resolution.png")
    best = max(rows, key=lambda row: row["top1"])
    console = Console()
    console.print(_table(rows, columns, best, train_size, title))
    console.print(f"table and plot  {folder}", highlight=False, soft_wrap=True)


def _table(rows: Sequence[Row], columns: Sequence[str], best: Row, train_size: int | None, title: str) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    shown = [name for name in columns if any(row[name] is not None for row in rows)]
    for name in (*shown, ""):
        table.add_column(name.replace("_", " "), justify="left" if name == "" else "right", no_wrap=True)
    for row in rows:
        notes = ["training"] * (row["size"] == train_size) + ["best"] * (row is best)
        table.add_row(*(_cell(name, row[name]) for name in shown), ", ".join(notes))
    return table


def _cell(name: str, value: Any) -> str:
    if name.startswith("top"):
        return f"{value:.2%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@mpl.rc_context(PLAIN_TEXT)
def _draw(rows: Sequence[Row], train_size: int | None, title: str, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = list(dict.fromkeys(row["crop_ratio"] for row in rows))
    for ratio in lines:
        points = [(row["size"], 100 * row["top1"]) for row in rows if row["crop_ratio"] == ratio]
        label = "top-1" if len(lines) == 1 else f"top-1, crop ratio {ratio:g}"
        axes.plot(*zip(*points, strict=True), ".-", label=label)
    best = max(rows, key=lambda row: row["top1"])
    label = f"best: {best['top1']:.2%} at {best['size']}"
    axes.plot(best["size"], 100 * best["top1"], "*", color="black", markersize=13, label=label)
    if train_size:
        axes.axvline(train_size, color="gray", linestyle="--", label=f"in training: {train_size}")
        expected = train_size / APPARENT
        axes.axvline(expected, color="gray", linestyle=":", label=f"expected best: {expected:.0f}")
    cost = axes.twinx()
    points = sorted({(row["size"], row["gmac"]) for row in rows})
    cost.plot(*zip(*points, strict=True), color="tab:red", alpha=0.4, label="GMAC")
    cost.set_ylabel("GMAC an image", color="tab:red")
    cost.set_ylim(bottom=0)
    axes.set(title=title, xlabel="side of the test images in pixels", ylabel="top-1 accuracy in %")
    axes.grid(alpha=0.3)
    for part in (axes, cost):
        part.spines["top"].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *cost.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
