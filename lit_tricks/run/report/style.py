"""The style of the pictures: light and dark themes, in colors that color-blind readers can distinguish."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "LIGHT",
    "PLAIN_TEXT",
    "Theme",
    "color_of",
    "draw",
    "duration",
    "label_ends",
    "new_figure",
    "tidy",
    "unit_of_time",
]

DPI = 160
PLAIN_TEXT: Any = {"text.parse_math": False}  # two dollar signs in a name are no formula


@dataclass(frozen=True)
class Theme:
    """Colors of a theme: page, text, faint lines, zero on a map, and a cycle for lines.

    The cycles are from [Okabe & Ito](https://jfly.uni-koeln.de/color/), ordered by contrast with the page.
    """

    ground: str
    ink: str
    faint: str
    band: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#6e7781", "#f0f4f8", ("#0072b2", "#d55e00", "#009e73", "#b3548c", "#a67500", "#56b4e9")
)
DARK = Theme(
    "#15181d", "#e6e8eb", "#949ba4", "#1d2127", ("#56b4e9", "#e69f00", "#2fc79c", "#e08fc0", "#f0e442", "#f2733d")
)
LINES = ("-", "--", ":", "-.")


def color_of(theme: Theme, number: int) -> tuple[str, str]:
    """Color and line style of the run of a number: all pairs differ up to 24 runs."""
    return theme.cycle[number % len(theme.cycle)], LINES[number // len(theme.cycle) % len(LINES)]


def draw(function: Callable[..., Figure], *args: Any, theme: Theme = LIGHT) -> bytes:
    """Draw a figure on a ground, as a PNG file. ``function`` gets the arguments and the theme."""
    colors = {"figure.facecolor": theme.ground, "axes.facecolor": theme.ground, "savefig.facecolor": theme.ground}
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
    lines = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    text = {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold"}
    settings: Any = PLAIN_TEXT | colors | dict.fromkeys(inks, theme.ink) | dict.fromkeys(lines, theme.faint) | text
    with mpl.rc_context(settings):
        figure = function(*args, theme)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def unit_of_time(seconds: float) -> tuple[float, str]:
    """Return the seconds of a unit in which a time is a handy number, and its name."""
    return (3600, "hours") if seconds >= 7200 else (60, "minutes") if seconds >= 300 else (1, "seconds")


def duration(seconds: float) -> str:
    """Return a readable time: 8.1 s, 12.5 min, 7.8 h."""
    unit, name = unit_of_time(seconds)
    return f"{seconds / unit:.1f} {name[0] if unit != 60 else 'min'}"


def new_figure(width: float = 4.6, height: float = 3.2) -> Figure:
    """Return a figure of this size in inches whose text is not clipped."""
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels and a faint grid; no box."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Write names at the right end of lines, pushed apart where they would overlap.

    Args:
        axes: with its limits and scale set.
        ends: last value of a line in data units, its name and its color.
        gap: least distance, as a part of the height.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [(float(to_axes.transform((axes.get_xlim()[1], value))[1]), name, color) for value, name, color in ends]
    heights.sort()
    placed: list[float] = []
    for height, _, _ in heights:
        placed.append(max(height, placed[-1] + gap) if placed else max(height, 0.02))
    over = placed[-1] - 1 if placed else 0
    if over > 0:  # the stack is too high: move its upper part down until it fits
        top = 1.0
        for i in range(len(placed) - 1, -1, -1):
            placed[i] = min(placed[i], top)
            top = placed[i] - gap
    for height, (_, name, color) in zip(placed, heights, strict=True):
        axes.annotate(
            name, (1.015, height), xycoords="axes fraction", color=color, fontsize=9, va="center", annotation_clip=False
        )
