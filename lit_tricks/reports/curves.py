"""``curves.png``: loss, accuracy and learning rate over a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_curves"]

TRAINED = "val, trained weights"  # where an average is validated beside them
COLORS = {"train": "tab:blue", "val": "tab:orange", TRAINED: "tab:gray"}


def draw_curves(rows: list[dict[str, float]], path: Path) -> Path | None:
    """Draw loss, top-1 accuracy and learning rate against the step.

    Args:
        rows: rows of ``metrics.csv``, see ``read_metrics``.
        path: where the picture goes.

    Returns:
        The path, or None if there is nothing to draw.
    """
    rates = sorted({key for row in rows for key in row if key.startswith("lr-")})
    panels = {
        "loss": {"train": "train/loss_epoch", TRAINED: "raw/val/loss", "val": "val/loss"},
        "top-1 accuracy": {"train": "train/top1", TRAINED: "raw/val/top1", "val": "val/top1"},
        "learning rate": {rate.removeprefix("lr-"): rate for rate in rates},
    }
    drawn = {
        title: lines for title, lines in panels.items() if any(key in row for row in rows for key in lines.values())
    }
    if not drawn:
        return None
    figure = Figure(figsize=(4.5 * len(drawn), 3.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        _draw_panel(axes, title, lines, rows)
    figure.savefig(path, dpi=120)
    return path


def _draw_panel(axes: Axes, title: str, lines: dict[str, str], rows: list[dict[str, float]]) -> None:
    for label, key in lines.items():
        points = [(row["step"], row[key]) for row in rows if key in row and "step" in row]
        if points:
            marker = "." if len(points) < 60 else None
            axes.plot(*zip(*points, strict=True), label=label, color=COLORS.get(label), linewidth=1.5, marker=marker)
    axes.set(title=title, xlabel="step")
    if title == "loss":
        axes.set_yscale("log")
    if title == "learning rate":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
