"""The end of a fit: a table on the terminal, ``results.json`` and ``curves.png`` in the run's folder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lit_tricks.reports.curves import draw_curves

__all__ = ["read_metrics", "report_fit"]

COLUMNS = ("loss", "top1", "top5", "ece")
SPLITS = ("train", "val", "test")


def report_fit(run: Path, best: str, seconds: float | None = None, memory: int | None = None) -> dict[str, Any]:
    """Sum up a finished fit: print the table, write ``results.json`` and ``curves.png``.

    Args:
        run: folder of the run, with ``metrics.csv``.
        best: path of the best checkpoint, or "" if there is none.
        seconds: that the training took, with the runs that it resumes.
        memory: bytes that the run took at most.

    Returns:
        What ``results.json`` holds: the best checkpoint, its epoch, the metrics of ``train``, ``val`` and ``test``
        there, under ``raw`` (the weights as they were trained) or ``averaged`` (those of val and test are of the
        average that the checkpoint has), the seconds, and the peak memory.
    """
    rows = read_metrics(run)
    checkpoint = torch.load(best, map_location="cpu", weights_only=True, mmap=True) if best else {}
    epoch = checkpoint.get("epoch", _last_epoch(rows))
    metrics = {split: found for split in SPLITS if (found := _metrics(rows, split, epoch))}
    results = {"best_checkpoint": best, "epoch": epoch, _kind(checkpoint): metrics}
    results |= {"seconds": seconds, "peak_memory": memory}
    (run / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    curves = draw_curves(rows, run / "curves.png")
    console = Console()
    console.print(_table(epoch, _kind(checkpoint), metrics))
    for what, path in {"best checkpoint": best, "curves": curves, "run": run}.items():
        if path:
            console.print(f"{what:>15}  {path}", highlight=False, soft_wrap=True)
    return results


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Rows of ``metrics.csv``, each without its empty cells; none if nothing was trained, and so nothing logged."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(stream)]


def _last_epoch(rows: list[dict[str, float]]) -> int:
    return int(max((row["epoch"] for row in rows if "epoch" in row), default=0))


def _metrics(rows: list[dict[str, float]], split: str, epoch: int) -> dict[str, float]:
    """Metrics of a split, without its name; those of train and val at the given epoch."""
    found: dict[str, float] = {}
    for row in rows:
        if split == "test" or row.get("epoch") == epoch:
            found |= {key: value for key, value in row.items() if key.startswith(f"{split}/")}
    names = {key: key.removeprefix(f"{split}/").removesuffix("_epoch") for key in found if not key.endswith("_step")}
    return {name: found[key] for key, name in names.items()}


def _kind(checkpoint: dict[str, Any]) -> str:
    """Which weights are in the ``state_dict``: where they are averaged, the raw ones are in a callback's state."""
    states = checkpoint.get("callbacks", {}).values()
    return "averaged" if any(isinstance(state, dict) and state.get("raw") for state in states) else "raw"


def _table(epoch: int, kind: str, metrics: dict[str, dict[str, float]]) -> Table:
    names = {name for of_split in metrics.values() for name in of_split}
    columns = [name for name in COLUMNS if name in names] + sorted(names - set(COLUMNS))
    table = Table(title=f"epoch {epoch}, {kind} weights", title_justify="left")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for split, of_split in metrics.items():
        table.add_row(split, *(_cell(name, of_split.get(name)) for name in columns))
    return table


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if name.startswith("top") else f"{value:.4f}"
