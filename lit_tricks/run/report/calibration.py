"""Calibration before and after a scaling: a table, a JSON file, and a reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_tricks.run.reading.predictions import Predictions
from lit_tricks.run.report.figures import draw_calibration
from lit_tricks.run.report.style import LIGHT, PLAIN_TEXT
from lit_tricks.utils.files import write_whole, written_whole
from lit_tricks.utils.finite import to_json

__all__ = ["report_calibration"]

SCORES = {"ece": "ECE", "nll": "NLL", "brier": "Brier", "accuracy": "top-1"}


def report_calibration(
    output: Path, logits: Tensor, scaled: Tensor, labels: Tensor, result: Mapping[str, Any], title: str
) -> None:
    """Print a table, and write ``.json`` and ``.png`` files next to the calibrated checkpoint.

    Args:
        output: path of the checkpoint.
        logits: logits (N, K) before the scaling.
        scaled: logits (N, K) after it.
        labels: class indices (N,).
        result: temperatures and scores, as ``Calibration.plain`` returns them.
        title: title of the table.
    """
    write_whole(output.with_suffix(".json"), to_json(result, indent=2) + "\n")
    runs = {"before": _predictions(logits, labels), "after": _predictions(scaled, labels)}
    with mpl.rc_context(PLAIN_TEXT):
        figure = draw_calibration(runs, list(runs), LIGHT)
        with written_whole(output.with_suffix(".png")) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")
    console = Console()
    console.print(_table(result, title))
    for line in _lines(result):
        console.print(line, highlight=False, soft_wrap=True)
    files = {"checkpoint": output, "diagram": output.with_suffix(".png"), "scores": output.with_suffix(".json")}
    for what, path in files.items():
        console.print(f"{what:>15}  {path}", highlight=False, soft_wrap=True)


def _predictions(logits: Tensor, labels: Tensor) -> Predictions:
    probabilities = logits.double().softmax(1)
    confidence, best = probabilities.max(1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    places = np.arange(len(labels))
    return Predictions(
        "val", [str(i) for i in range(logits.size(1))], labels.numpy(), best[:, None].numpy(), confidence.numpy(),
        own.numpy(), places, np.zeros(0, np.int64), None, [], "given",
    )  # fmt: skip


def _table(result: Mapping[str, Any], title: str) -> Table:
    table = Table(title=f"{title}, {result['samples']} samples", title_justify="left")
    for i, column in enumerate(["", *SCORES.values()]):
        table.add_column(column, justify="right" if i else "left")
    for which in ("before", "after"):
        scores = result[which]
        table.add_row(which, *(f"{scores[n]:.2%}" if n == "accuracy" else f"{scores[n]:.4f}" for n in SCORES))
    return table


def _lines(result: Mapping[str, Any]) -> list[str]:
    """Return temperatures and changed predictions, in words."""
    temperatures = result["temperatures"]
    low, high = min(temperatures), max(temperatures)
    text = f"{low:.4g}" if len(temperatures) == 1 else f"{low:.4g} to {high:.4g}, one per class"
    text += f" ({result['note']})" if result["note"] else ""
    found = {
        "temperature": text,
        "changed": f"{result['changed']} of {result['samples']} predictions",
        "layer": ", ".join(result["layers"]),
    }
    if result["views"] > 1:
        found["views"] = f"{result['views']} per image, whose mean is calibrated"
    return [f"{name:>15}  {value}" for name, value in found.items()]
