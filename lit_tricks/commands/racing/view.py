"""The view of a race while it runs: what runs, what leads, what is out, and what is left of the budget."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_tricks.commands.ablation.cells import Cell
from lit_tricks.commands.racing.decisions import Comparison, Round, Verdict
from lit_tricks.commands.racing.runs import Runs
from lit_tricks.run.report.style import duration

__all__ = ["left_of_budget", "race_view"]

STYLES = {"kept": "green", "out": "dim", "failed": "red", "open": ""}


def race_view(runs: Runs, verdict: Verdict, stage: str) -> RenderableType:
    """Return the view: a headline, the candidates of the round, and the runs that are made.

    Args:
        runs: runs of the race.
        verdict: decisions so far.
        stage: current stage of the race, for the headline.
    """
    leader = " + ".join(["base", *(runs.names[name] for name in verdict.kept)])
    parts: list[RenderableType] = [
        _line(f"{stage}; {left_of_budget(runs)}"),
        _line(f"leader: {leader}", "green"),
    ]
    if verdict.rounds:
        parts.append(_candidates(runs, verdict.rounds[-1]))
    parts.append(_line(_running(runs.now)))
    return Group(*parts)


def left_of_budget(runs: Runs) -> str:
    """State what is spent and what is left."""
    made = len(runs.took)
    if math.isfinite(runs.budget.seconds):
        left = max(0.0, runs.budget.seconds - runs.spent)
        return f"{made} runs, {duration(left)} of {runs.budget.text} left"
    most = max(0.0, runs.budget.runs - made) * statistics.fmean(runs.took.values() or [0.0]) / runs.parallel
    return f"{made} of {runs.budget.runs:.0f} runs, at most {duration(most)} left"


def _candidates(runs: Runs, found: Round) -> Table:
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("candidate", no_wrap=True, overflow="ellipsis", max_width=22)
    table.add_column("seeds", justify="right", no_wrap=True, min_width=5)
    table.add_column("points", justify="right", no_wrap=True, min_width=13)
    table.add_column("state", no_wrap=True, overflow="ellipsis", ratio=1)
    latest = {each.candidate: each for each in (*found.screened, *found.tested)}
    for each in latest.values():
        state = f"{each.state}: {each.reason}" if each.state != "open" else each.reason or f"in the {each.stage}"
        row = (runs.names[each.candidate], str(len(each.differences)), _points(each), state)
        table.add_row(*(Text(cell) for cell in row), style=STYLES[each.state])
    return table


def _points(each: Comparison) -> str:
    if not each.differences or not math.isfinite(each.mean):
        return "-"
    return f"{each.mean:+.2f}" + (f" ± {each.reach:.2f}" if math.isfinite(each.reach) else "")


def _running(cells: Sequence[Cell]) -> str:
    active = [f"{cell.name} seed {cell.seed}" for cell in cells if cell.state in ("runs", "resumes")]
    waiting = sum(cell.state == "waits" for cell in cells)
    text = f"runs now: {', '.join(active)}" if active else "runs now: none"
    return text + (f"; {waiting} more wait" if waiting else "")


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
