"""Loss, accuracy and learning rate over a run, or over several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lit_tricks.run.reading.run import Row, points
from lit_tricks.run.report.style import LIGHT, Theme, color_of, draw, label_ends, new_figure, tidy
from lit_tricks.utils.files import write_whole

__all__ = ["draw_curves", "draw_panel", "lacking", "panels_of"]

# The lines of each panel and their metrics. "raw" are the trained weights, validated in addition to an average.
LOSS, RATE = "Loss", "Learning rate"
SCORED = {"Top-1 accuracy": "top1", "Mean IoU": "miou", "Mean average precision": "map"}  # a task has one of these
PANELS: dict[str, dict[str, str]] = {
    LOSS: {"train": "train/loss_epoch", "val": "val/loss", "val, trained weights": "raw/val/loss"},
    **{
        title: {"train": f"train/{name}", "val": f"val/{name}", "val, trained weights": f"raw/val/{name}"}
        for title, name in SCORED.items()
    },
    RATE: {},  # its lines are the optimizers
}
UNITS = {LOSS: "loss (log scale)", "Top-1 accuracy": "right in %", RATE: "learning rate"}
WIDTHS = {"train": 1.0, "val": 1.9, "val, trained weights": 1.3}
DASHES: dict[str, tuple[int, tuple[float, ...]]] = {
    "train": (0, (1, 1)),
    "val": (0, ()),
    "val, trained weights": (0, (4, 1.5)),
}
MOST = 2000  # points of a line; more are not seen


def panels_of(rows: Sequence[list[Row]]) -> list[str]:
    """Return the panels for which at least one run has something."""
    return [title for title in PANELS if any(points(r, key) for r in rows for key in _keys(title, r).values())]


def lacking(titles: Sequence[str]) -> list[str]:
    """Return the panels that any run should have, and that are not among these."""
    scored = next((title for title in titles if title in SCORED), next(iter(SCORED)))
    return [title for title in (LOSS, scored, RATE) if title not in titles]


def draw_curves(rows: list[Row], path: Path, starts: Sequence[float] = ()) -> Path | None:
    """Draw all there is of one run side by side.

    Args:
        rows: rows of ``metrics.csv``, see ``Run``.
        path: where the picture goes.
        starts: steps at which the run was resumed.

    Returns:
        The path, or None if there is nothing to draw.
    """
    titles = panels_of([rows])
    if not titles:
        return None
    write_whole(path, draw(_side_by_side, titles, rows, starts))
    return path


def draw_panel(title: str, runs: dict[str, list[Row]], starts: Sequence[float] = (), theme: Theme = LIGHT) -> Figure:
    """Draw one of ``PANELS``, with the lines of all runs, and a vertical line at each step where a run was resumed.

    With one run, each line has a color. With several runs, each run has a color, and lines are solid for validation,
    dotted for training, and dashed for the trained weights next to an average.
    """
    figure = new_figure(4.8, 3.2)
    _fill(figure.subplots(), title, runs, starts, theme)
    return figure


def _side_by_side(titles: list[str], rows: list[Row], starts: Sequence[float], theme: Theme) -> Figure:
    figure = new_figure(4.6 * len(titles), 3.2)
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        _fill(axes, title, {"": rows}, starts, theme)
    return figure


def _keys(title: str, rows: list[Row]) -> dict[str, str]:
    if PANELS[title]:
        return PANELS[title]
    rates = sorted({key for row in rows for key in row if key.startswith("lr-")})
    lines = {rate: points(rows, rate) for rate in rates}
    different = {rate: line for i, (rate, line) in enumerate(lines.items()) if line not in list(lines.values())[:i]}
    if len(different) == 1:  # groups of parameters that differ in other settings
        return {rate.removeprefix("lr-").partition("/")[0]: rate for rate in different}
    return {rate.removeprefix("lr-"): rate for rate in different}


def _fill(axes: Axes, title: str, runs: dict[str, list[Row]], starts: Sequence[float], theme: Theme) -> None:
    tidy(axes, title, "training step", UNITS.get(title, "%"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}")
    )
    for start in starts:
        axes.axvline(start, color=theme.faint, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    factor = 100 if title in SCORED else 1
    ends: list[tuple[float, str, str]] = []
    for number, (name, rows) in enumerate(runs.items()):
        keys = _keys(title, rows)
        for place, (label, key) in enumerate(keys.items()):
            line = [(step, factor * value) for step, value in points(rows, key)]
            if not line:
                continue
            line = line[:: -(-len(line) // MOST)]
            color, dashes = color_of(theme, place if len(runs) == 1 else number)
            style = dashes if title == RATE else DASHES[label]
            marker = "." if len(line) < 30 else None
            text = f"{name} {label}".strip() if len(runs) > 1 else label
            axes.plot(
                *zip(*line, strict=True), label=text, color=color, linewidth=WIDTHS.get(label, 1.6), linestyle=style,
                marker=marker, markersize=4,
            )  # fmt: skip
            if len(runs) == 1:
                ends.append((line[-1][1], label.replace(", ", ",\n"), color))
            elif label in ("val", *list(keys)[: title == RATE]):
                ends.append((line[-1][1], name, color))
    if title == LOSS:
        _log_scale(axes)
    else:
        axes.set_ylim(bottom=0 if title == RATE else None)
    label_ends(axes, ends)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
