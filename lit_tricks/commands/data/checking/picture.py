"""The picture of a check: images by class and split, and their sizes."""

from __future__ import annotations

import warnings

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lit_tricks.commands.data.checking.image_facts import Facts
from lit_tricks.commands.data.checking.listing import Listing
from lit_tricks.data.splits import NAMES
from lit_tricks.run.report.style import Theme, draw, new_figure, tidy

__all__ = ["picture_of"]

BARS = 40  # classes, the largest
POINTS = 5000  # images
LONGEST = 24  # characters of a name


def picture_of(listing: Listing, facts: Facts) -> bytes:
    """Draw the picture as a PNG file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in a script without a font
        return draw(_figure, listing, facts)


def _figure(listing: Listing, facts: Facts, theme: Theme) -> Figure:
    counts = listing.counts()
    order = np.argsort(-counts.sum(1), kind="stable")[:BARS]
    figure = new_figure(9.6, max(3.4, 1.2 + 0.22 * len(order)))
    left, right = figure.subplots(1, 2)
    start = np.zeros(len(order))
    for number, split in enumerate(NAMES):
        if counts[:, number].any():
            width = counts[order, number]
            left.barh(np.arange(len(order)), width, left=start, color=theme.cycle[number], label=split)
            start += width
    left.set_yticks(np.arange(len(order)), [_short(listing.classes[index]) for index in order.tolist()])
    left.invert_yaxis()
    more = f", {len(order)} of {len(counts)} classes" if len(counts) > len(order) else ""
    tidy(left, f"Images by class{more}", "images", "")
    left.grid(visible=False, axis="y")
    left.set_axisbelow(True)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    if np.count_nonzero(counts.any(0)) > 1:
        left.legend(frameon=False)
    read = np.flatnonzero(facts.widths)
    shown = read[np.linspace(0, len(read) - 1, min(POINTS, len(read))).astype(int)] if len(read) else read
    for number, _ in enumerate(NAMES):
        mine = shown[listing.splits[shown] == number]
        right.scatter(facts.widths[mine], facts.heights[mine], s=14, alpha=0.5, linewidths=0, color=theme.cycle[number])
    longest = int(max(facts.widths.max(initial=1), facts.heights.max(initial=1)))
    right.set(xlim=(0, 1.05 * longest), ylim=(0, 1.05 * longest))
    right.plot([0, longest], [0, longest], color=theme.faint, linewidth=0.8, zorder=0)
    right.set_aspect("equal", anchor="N")
    tidy(right, "Image sizes", "width (pixels)", "height (pixels)")
    return figure


def _short(name: str) -> str:
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
