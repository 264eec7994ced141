"""Pictures of the time and the predictions of one or several runs."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lit_tricks.run.reading.mask_predictions import MaskPredictions, palette
from lit_tricks.run.reading.predictions import Floats, Ints, Predictions
from lit_tricks.run.report.style import Theme, color_of, new_figure, tidy, unit_of_time

__all__ = [
    "MOST_CLASSES",
    "draw_calibration",
    "draw_confusion",
    "draw_ious",
    "draw_recalls",
    "draw_time",
    "draw_worst_masks",
    "draw_wrong",
    "worst_classes",
    "worst_first",
]

MOST_CLASSES = 30  # of a matrix; with more it is the most frequent mistakes that are shown
WORST = 10  # classes, or mistakes
COLORS = 12  # of classes that are named under masks
IGNORED = (224, 224, 192)  # VOC's, of pixels of no class

ByRun = dict[str, Predictions]  # by the name of the run
MasksByRun = dict[str, MaskPredictions]


def draw_time(runs: dict[str, dict[str, float]], names: list[str], theme: Theme) -> Figure:
    """Bars of the time that each part of the training took; the colors go by the names of all runs."""
    parts = [part for part in next(iter(runs.values())) if any(seconds.get(part) for seconds in runs.values())]
    figure = new_figure(4.8, 1.1 + 0.28 * len(parts) * max(1, 0.6 * len(runs)))
    axes = figure.subplots()
    height = 0.8 / len(runs)
    most = max(max(seconds.values()) for seconds in runs.values())
    unit, unit_name = unit_of_time(most)
    for number, (name, seconds) in enumerate(runs.items()):
        whole = sum(seconds.values()) or 1.0
        places = [i + (number - (len(runs) - 1) / 2) * height for i in range(len(parts))]
        values = [seconds.get(part, 0.0) / unit for part in parts]
        axes.barh(places, values, height * 0.92, color=color_of(theme, names.index(name))[0], label=name)
        for place, value in zip(places, values, strict=True):
            text = f" {value:.3g}" + (f", {value * unit / whole:.0%}" if len(runs) == 1 else "")
            axes.text(value, place, text, va="center", fontsize=9 if len(runs) < 4 else 7)
    tidy(axes, "Time of the training", unit_name, "")
    axes.set_yticks(range(len(parts)), parts)
    axes.set_xlim(0, 1.3 * most / unit)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(runs)), frameon=False, fontsize=9)
    return figure


def draw_calibration(runs: ByRun, names: list[str], theme: Theme) -> Figure:
    """Accuracy against confidence, and how many images have which confidence."""
    figure = new_figure(4.8, 4.4)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 100], [0, 100], color=theme.faint, linewidth=1, linestyle="--", label="as sure as it is right")
    for name, predictions in runs.items():
        found = predictions.calibration()
        some = found.count > 0
        color, style = color_of(theme, names.index(name))
        text = f"{name}: " if len(runs) > 1 else ""
        x, y = 100 * found.confidence[some], 100 * found.accuracy[some]
        text += f"off by {100 * found.error:.1f} points on average"
        axes.plot(x, y, color=color, linestyle=style, linewidth=1.2, label=text)
        axes.scatter(x, y, 8 + 150 * found.count[some] / found.count.sum(), color=color, clip_on=False, zorder=3)
        edges = np.linspace(0, 100, len(found.count) + 1)
        below.stairs(100 * found.count / found.count.sum(), edges, color=color, fill=len(runs) == 1, linestyle=style)
    tidy(axes, "Reliability", "", "right in %")
    tidy(below, "", "confidence: probability of the predicted class in %", "images in %")
    axes.set(xlim=(0, 100), ylim=(-2, 102))
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


def draw_confusion(predictions: Predictions | MaskPredictions, of: str, theme: Theme) -> Figure:
    """Draw the confusion matrix, or the most frequent mistakes for more than 30 classes.

    Args:
        predictions: the predictions.
        of: end of the title, such as ", quickstart/v0".
        theme: light or dark theme.
    """
    if len(predictions.classes) > MOST_CLASSES:
        return _draw_mistakes(predictions, of, theme)
    classes = len(predictions.classes)
    matrix = predictions.confusion().dense(classes)
    parts = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    side = 2.2 + 0.3 * classes if classes <= 12 else 3.4 + 0.14 * classes
    figure = new_figure(side + 0.6, side)
    axes = figure.subplots()
    image = axes.imshow(
        100 * parts, cmap=LinearSegmentedColormap.from_list("", (theme.band, theme.cycle[0])), vmin=0, vmax=100
    )
    axes.set(title=f"Confusion matrix{of}", xlabel="predicted class", ylabel="true class")
    small = 9 if classes <= 12 else 7
    upright = max(map(len, predictions.classes)) <= 2
    axes.set_xticks(range(classes), predictions.classes, rotation=0 if upright else 90, fontsize=small)
    axes.set_yticks(range(classes), predictions.classes, fontsize=small)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if classes <= 12:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                dark = image.cmap(image.norm(100 * parts[row, column]))[:3]
                light = np.dot(dark, (0.299, 0.587, 0.114)) < 0.5
                text = f"{count}" if predictions.unit == "images" else _per_cent(parts[row, column])
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if light else "k")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label=f"of the {predictions.unit} of a true class, in %")
    bar.outline.set_visible(False)
    return figure


def _draw_mistakes(predictions: Predictions | MaskPredictions, of: str, theme: Theme) -> Figure:
    mistakes = predictions.confusion().mistakes()[:15]
    figure = new_figure(4.8, 1.2 + 0.24 * max(1, len(mistakes)))
    axes = figure.subplots()
    counts = [count for _, _, count in mistakes]
    axes.barh(range(len(mistakes)), counts, 0.7, color=theme.cycle[1])
    for place, count in enumerate(counts):
        axes.text(count, place, f" {count:,}", va="center", fontsize=9)
    tidy(axes, "", predictions.unit, "")
    figure.suptitle(f"Most frequent mistakes{of}", x=0.02, ha="left", fontsize=11, fontweight="bold")
    axes.set_yticks(
        range(len(mistakes)),
        [f"{_short(predictions.classes[a])} → {_short(predictions.classes[b])}" for a, b, _ in mistakes],
    )
    axes.set_xlim(0, 1.15 * max(counts, default=1))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure


def draw_recalls(runs: ByRun, names: list[str], theme: Theme) -> Figure:
    """Draw the classes of which the least is found, by the mean over the runs."""
    values = {name: predictions.recalls()[0] for name, predictions in runs.items()}
    title = "found, of the images of the class, in %"
    return _draw_classes(values, next(iter(runs.values())).classes, title, names, theme)


def draw_ious(runs: MasksByRun, names: list[str], theme: Theme) -> Figure:
    """Draw the classes with the lowest IoU, by the mean over the runs."""
    values = {name: predictions.ious() for name, predictions in runs.items()}
    return _draw_classes(values, next(iter(runs.values())).classes, "IoU in %", names, theme)


def _draw_classes(runs: dict[str, Floats], classes: list[str], title: str, names: list[str], theme: Theme) -> Figure:
    order = worst_first(list(runs.values()))[:WORST]
    figure = new_figure(4.8, 1.4 + 0.26 * len(order))
    axes = figure.subplots()
    for name, found in runs.items():
        values = 100 * found[order]
        axes.plot(values, range(len(order)), "o", color=color_of(theme, names.index(name))[0], label=name, alpha=0.9)
        if len(runs) == 1:
            for place, value in enumerate(values):
                axes.annotate(
                    f"{value:.1f}", (value, place), (7, 0), textcoords="offset points", va="center", fontsize=9
                )
    tidy(axes, "Worst classes", title, "")
    axes.set_yticks(range(len(order)), [_short(classes[i]) for i in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(max(-2.0, low), min(102.0, high) + 0.12 * (high - low) * (len(runs) == 1))
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(runs)), frameon=False, fontsize=9)
    return figure


def worst_classes(runs: ByRun) -> list[int]:
    """Return labels of the classes of which the least is found, the worst first; those without images are left out."""
    return worst_first([predictions.recalls()[0] for predictions in runs.values()])[:WORST]


def worst_first(values: list[Floats]) -> list[int]:
    """Return labels by the mean of their values over the runs, without classes that lack a value."""
    known = np.flatnonzero(~np.isnan(values).any(0))
    mean = np.array(values)[:, known].mean(0)
    return [int(known[i]) for i in np.argsort(mean, kind="stable")]


def draw_wrong(predictions: Predictions, theme: Theme) -> Figure:
    """Draw the most wrong images as a grid: what they are, and what they were taken for."""
    found = list(predictions.wrong())
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(max(3.6, 1.75 * columns), 1.95 * rows + 0.3)  # the title needs some width
    figure.suptitle("Most wrong: true class → predicted class", x=0.02, ha="left", fontsize=11, fontweight="bold")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (image, label, predicted, _, confidence, _) in zip(figure.axes, found, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        title = f"{_short(label, 14)} → {_short(predicted, 14)}"
        words = f"{title}\n{confidence:.0%} sure" if len(title) < 20 else title.replace(" → ", "\n→ ")
        axes.set_title(words, fontsize=8, fontweight="normal", loc="center")
    return figure


def draw_worst_masks(predictions: MaskPredictions, theme: Theme) -> Figure:
    """Draw the images with the lowest IoU, each with its mask and prediction, and the classes of the colors."""
    columns = min(2, len(predictions.worst))
    rows = -(-len(predictions.worst) // columns)
    figure = new_figure(4.6 * columns, 1.62 * rows + 0.9)
    figure.suptitle("Lowest IoU: image, mask, prediction", x=0.02, ha="left", fontsize=11, fontweight="bold")
    widths = ([1.0, 1.0, 1.0, 0.12] * columns)[:-1]  # a gap between two images
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.axis("off")
    colors = np.concatenate([palette(len(predictions.classes)), [IGNORED]])  # of label -1, which is the last
    for i, found in enumerate(predictions.worst):
        titles = (_short(found.where, 20), "mask", f"IoU {100 * found.iou:.1f} %")
        pictures = (found.image.squeeze(), colors[found.mask], colors[found.predicted])
        start = 4 * (i % columns)
        for axes, title, picture in zip(grid[i // columns, start : start + 3], titles, pictures, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(title, fontsize=8, fontweight="normal", loc="center", parse_math=False)
            axes.set(xticks=[], yticks=[])
            axes.axis("on")
            axes.spines[:].set_color(theme.faint)  # a mask may be of the color of the ground
    figure.legend(
        handles=[
            Patch(facecolor=colors[label] / 255, edgecolor=theme.faint, label=name)
            for label, name in _shown(predictions)
        ],
        loc="outside lower center", ncols=6, frameon=False, fontsize=8,
    )  # fmt: skip
    return figure


def _shown(predictions: MaskPredictions) -> list[tuple[int, str]]:
    """Return labels and names of the classes that have the most pixels in the worst images."""
    labels: Ints = np.concatenate(
        [part.ravel() for found in predictions.worst for part in (found.mask, found.predicted)]
    )
    found, counts = np.unique(labels, return_counts=True)
    most = sorted(found[np.argsort(-counts, kind="stable")[:COLORS]].tolist(), key=lambda label: (label < 0, label))
    return [(label, _short(predictions.classes[label], 14) if label >= 0 else "ignored") for label in most]


def _per_cent(part: float) -> str:
    """Return the text of a matrix cell, empty below half a per cent."""
    return f"{100 * part:.0f}" if part >= 0.005 else ""


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
