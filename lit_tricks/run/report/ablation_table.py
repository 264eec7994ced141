"""The table of an ablation, from its run folders: means and deviations over seeds, and what a row adds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from lit_tricks.run.reading.scores import SCORES, scores_in
from lit_tricks.run.report.escaping import escape_markdown, row_cell
from lit_tricks.run.report.style import PLAIN_TEXT
from lit_tricks.utils.files import MOST_RESULTS, read_regular, write_whole, written_whole

__all__ = ["paired_change", "read_run", "report_ablation"]

Runs = Mapping[str, Mapping[int, Path | None]]  # of each row, by seed; None where a run failed


def paired_change(differences: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean of differences between runs of the same seeds, and how far its interval reaches, by Student's t.

    Args:
        differences: one a seed; of a single one the interval is infinite.
        confidence: probability that the interval has the true mean, for normal differences.
    """
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return mean, math.inf
    return mean, float(stdtrit(n - 1, (1 + confidence) / 2)) * statistics.stdev(differences) / math.sqrt(n)


def read_run(run: Path) -> dict[str, float]:
    """Return the values of a run for the table: its scores, the main score first, then ``seconds`` and ``memory``.

    Scores come from the test data, or else from the validation data. A run without scores has top-1 NaN.
    """
    results: dict[str, Any] = json.loads(read_regular(run / "results.json", MOST_RESULTS))
    metrics = results.get("averaged") or results.get("raw") or {}
    found = metrics.get("test") or metrics.get("val") or {}
    found = {name: math.nan if value is None else value for name, value in found.items()}
    values = {name: found[name] for name in scores_in(found)} or {"top1": math.nan}
    # none where it is not known
    return values | {"seconds": results.get("seconds") or math.nan, "memory": results.get("peak_memory") or math.nan}


def report_ablation(folder: Path, runs: Runs, relative_to: Literal["above", "first"]) -> list[tuple[str, ...]]:
    """Write ``ablation.csv``, ``ablation.md`` and ``ablation.png``, and print the table.

    Args:
        folder: where they go.
        runs: the run folders.
        relative_to: the row that a row is compared with: the one above it, or the first.

    Returns:
        The header and the rows of the table, as they are printed.
    """
    found = {name: {s: read_run(run) for s, run in seeds.items() if run} for name, seeds in runs.items()}
    scores = scores_in(key for seeds in found.values() for values in seeds.values() for key in values) or ["top1"]
    header, rows = _table(found, scores, relative_to)
    _write_csv(folder / "ablation.csv", found, runs, scores)
    _write_markdown(folder / "ablation.md", header, rows, _legend(runs, relative_to, SCORES[scores[0]]))
    _draw(found, scores[0], folder / "ablation.png")
    _show(header, rows, folder)
    return [header, *rows]


def _table(
    found: Mapping[str, Mapping[int, Any]], scores: Sequence[str], relative_to: str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the rows, as text."""
    header = ("", *(SCORES[score] for score in scores), "change", "time", "memory")
    seeds = list(found.values())
    references = [None, *(seeds[:-1] if relative_to == "above" else [seeds[0]] * (len(seeds) - 1))]
    rows = [
        _row(name, own, reference, seeds[0], scores)
        for (name, own), reference in zip(found.items(), references, strict=True)
    ]
    return header, rows


def _write_csv(path: Path, found: Mapping[str, Mapping[int, Any]], runs: Runs, scores: Sequence[str]) -> None:
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["row", "seed", *scores, "seconds", "memory", "run"])
        for name, seeds in found.items():
            for seed, values in seeds.items():
                numbers = [values.get(score, math.nan) for score in scores] + [values["seconds"], values["memory"]]
                writer.writerow([row_cell(name), seed, *numbers, runs[name][seed]])


def _write_markdown(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], legend: str) -> None:
    table = (header, ("---",) * len(header), *rows)
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in table]
    write_whole(path, "\n".join([*lines, "", escape_markdown(legend), ""]))


def _show(header: Sequence[str], rows: Sequence[Sequence[str]], folder: Path) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"table and plot  {folder}", highlight=False, soft_wrap=True)


def _row(
    name: str,
    found: Mapping[int, Any],
    reference: Mapping[int, Any] | None,
    first: Mapping[int, Any],
    scores: Sequence[str],
) -> tuple[str, ...]:
    shared = sorted(found.keys() & reference.keys()) if reference else []
    differences = [100 * (found[s][scores[0]] - reference[s][scores[0]]) for s in shared] if reference else []
    change = ""
    if differences:
        mean, reach = paired_change(differences)
        change = f"{mean:+.2f}" + (f" ± {reach:.2f}" if math.isfinite(reach) else "")
    accuracies = (_spread([100 * values.get(key, math.nan) for values in found.values()]) for key in scores)
    costs = (_ratio(found, first, key) for key in ("seconds", "memory"))
    return (name, *accuracies, change, *costs)


def _spread(values: Sequence[float]) -> str:
    if not values or math.isnan(values[0]):
        return "-"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _ratio(found: Mapping[int, Any], first: Mapping[int, Any], key: str) -> str:
    ratios = [found[s][key] / first[s][key] for s in sorted(found.keys() & first.keys())]
    return "-" if not ratios or math.isnan(ratios[0]) else f"{statistics.median(ratios):.2f}"


def _legend(runs: Runs, relative_to: str, score: str) -> str:
    seeds = sorted({seed for of_row in runs.values() for seed in of_row})
    failed = [f"{name} in seed {s}" for name, of_row in runs.items() for s, run in of_row.items() if run is None]
    reference = "the row above" if relative_to == "above" else "the first row"
    text = (
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}, in per cent. Change: points of {score} "
        f"against {reference}, paired by seed, ± the reach of the 95 % interval by Student's t. Time and peak memory: "
        "medians over the seeds, relative to the first row; memory is what torch allocates on a GPU, without one what "
        "the process takes in addition to Python and its libraries."
    )
    return text + (f" Failed: {', '.join(failed)}." if failed else "")


@mpl.rc_context(PLAIN_TEXT)
def _draw(found: Mapping[str, Mapping[int, Any]], score: str, path: Path) -> None:
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    for y, seeds in enumerate(found.values()):
        values = [100 * values[score] for values in seeds.values()]
        if values:
            axes.plot(values, [y] * len(values), ".", color="tab:blue", alpha=0.4, markersize=9)
            axes.plot([statistics.fmean(values)], [y], "|", color="black", markersize=16, markeredgewidth=2)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"{SCORES[score]} in %: seeds, and their mean")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    with written_whole(path) as part:
        figure.savefig(part, dpi=120, format="png")
