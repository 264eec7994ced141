"""The report of a race, from its ``race.json``: tried and kept tricks, and the confirmation on fresh seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from lit_tricks.run.report.ablation_table import paired_change
from lit_tricks.run.report.content import Picture, Section, Table
from lit_tricks.run.report.escaping import row_cell
from lit_tricks.run.report.page import write
from lit_tricks.run.report.style import DARK, LIGHT, Theme, draw, duration, new_figure, tidy
from lit_tricks.utils.files import MOST_RESULTS, read_regular, text_cell, written_whole

__all__ = ["COLUMNS", "race_rows", "race_sections", "report_race"]

COLUMNS = ("round", "stage", "candidate", "seeds", "mean", "reach", "cost", "memory", "state", "reason")

COSTS = {
    "cpu_seconds": "The cost is the CPU time of the training, which other work on the machine changes little.",
    "seconds": "The cost is the time of the training by the clock.",
}


def report_race(folder: Path) -> Path:
    """Write ``race.md``, ``race.csv``, ``race.png`` and ``report.html`` of a race, and print the verdict.

    Args:
        folder: with ``race.json``.

    Returns:
        The page.
    """
    race = json.loads(read_regular(folder / "race.json", MOST_RESULTS))
    sections = race_sections(race)
    write(folder, "Race", sections)
    (folder / "report.md").replace(folder / "race.md")
    with written_whole(folder / "race.csv") as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(race_rows(race))
    console = Console()
    for section in sections[:1]:
        for line in section.text:
            console.print(line, highlight=False, soft_wrap=True)
    console.print(f"recipe, tables and plot  {folder}", highlight=False, soft_wrap=True)
    return folder / "report.html"


def race_rows(race: Mapping[str, Any]) -> list[list[Any]]:
    """Return the comparisons of a race in the order of ``COLUMNS``."""
    rows: list[list[Any]] = []
    for number, stage, each in _comparisons(race):
        name, seeds = row_cell(race["names"][each["candidate"]]), len(each["differences"])
        numbers = (_mean(each), _reach(each), each["cost"], _memory(each))
        rows.append([number, stage, name, seeds, *numbers, each["state"], text_cell(each["reason"] or "")])
    return rows


def race_sections(race: Mapping[str, Any]) -> list[Section]:
    """Return verdict, confirmation and rounds of a race."""
    sections = [_verdict(race)]
    if race["confirmed"]:
        sections.append(_confirmation(race))
    sections += [_round(race, number, each) for number, each in enumerate(race["rounds"], start=1)]
    if race["failed"]:
        rows = [[each["stack"], str(each["seed"]), each["reason"], each["log"]] for each in race["failed"]]
        text = ["Failed and diverged runs count as losses. The same command tries failed runs again."]
        sections.append(Section("Failed runs", text, [Table("Failed runs", ["run", "seed", "reason", "log"], rows)]))
    return sections


def _verdict(race: Mapping[str, Any]) -> Section:
    names = race["names"]
    kept = [names[name] for name in race["kept"]]
    failed = all(each["state"] == "failed" for _, _, each in _comparisons(race))
    reason = "every candidate failed" if failed else "no candidate showed a gain"
    reason = "the budget ended the race" if _waiting(race) else reason
    stack = f"with {', '.join(kept)}." if kept else f"as it is: {reason}."
    text = [f"The recipe is the base {stack}"]
    text.append(
        f"The race took {race['runs']} run{'s' * (race['runs'] != 1)} and {duration(race['seconds'])} of a budget of "
        f"{race['budget']}." + (" The budget ended it." if race["out_of_budget"] else "")
    )
    text += _undecided(race)
    stacks = race["confirmed"].get("stacks", {})
    for split, what in (("val", "validation"), ("test", "test")):
        if pairs := _pairs(stacks, "base", split):
            base, recipe = (statistics.fmean(side) for side in zip(*pairs, strict=True))
            change = _change([b - a for a, b in pairs])
            text.append(f"Fresh seeds, {what}: base {base:.2f} %, recipe {recipe:.2f} %, {change} points.")
    if race["settings"]["equal_cost"]:
        text.append(f"Comparisons are at equal cost: the cheaper side trains for more epochs. {COSTS[race['clock']]}")
    else:
        text.append("Comparisons are at equal epochs.")
    alpha = race["settings"]["alpha"]
    text.append(f"In each round, the probability to keep a trick without gain is at most {alpha:.0%}.")
    picture = Picture(
        "race",
        "Differences to the leader, one point per seed, and their means",
        draw(_draw, race, theme=LIGHT),
        draw(_draw, race, theme=DARK),
    )
    return Section("Verdict", text, pictures=[picture])


def _undecided(race: Mapping[str, Any]) -> list[str]:
    """State how many more seeds would settle the gains that were not shown."""
    lines = []
    kept = set(race["kept"])
    if waiting := _waiting(race):
        lines.append(
            f"Undecided: {', '.join(waiting)}. The budget ended before the race could decide about them. The same "
            "command with a larger budget continues the race."
        )
    last = {each["candidate"]: each for _, stage, each in _comparisons(race) if stage == "test"}
    for name, each in last.items():
        mean = _mean(each)
        if (
            race["names"][name] in waiting
            or name in kept
            or each["state"] == "failed"
            or len(each["differences"]) < 3
            or mean is None
            or mean <= 0
        ):
            continue
        deviation = statistics.stdev(each["differences"])
        for seeds in range(len(each["differences"]) + 1, 201):
            if paired_change_reach(deviation, seeds) <= mean:
                more = seeds - len(each["differences"])
                lines.append(f"Undecided: {race['names'][name]}. {more} more seeds would settle {mean:.1f} points.")
                break
    return lines


def _waiting(race: Mapping[str, Any]) -> list[str]:
    """Return the names of the candidates that the end of the budget left undecided."""
    if not race["out_of_budget"] or not race["rounds"]:
        return []
    found = race["rounds"][-1]
    latest = {each["candidate"]: each["state"] for each in (*found["screened"], *found["tested"])}
    return [race["names"][name] for name, state in latest.items() if state == "open"]


def paired_change_reach(deviation: float, seeds: int) -> float:
    """Return how far the 95 % interval of a mean reaches, for a deviation of the differences and a number of seeds."""
    spread = [deviation * math.sqrt((seeds - 1) / 2), -deviation * math.sqrt((seeds - 1) / 2), *[0.0] * (seeds - 2)]
    return paired_change(spread)[1]


def _confirmation(race: Mapping[str, Any]) -> Section:
    stacks, seeds, epochs = (race["confirmed"][key] for key in ("stacks", "seeds", "epochs"))
    if not seeds:
        return Section(
            "Confirmation", ["The budget held no confirmation: the gain of the recipe may be overestimated."]
        )
    rows = []
    for name, found in stacks.items():
        cells = [name, str(epochs[name])]
        for split in ("val", "test"):
            values = [value for value in found[split] if value is not None]
            cells.append(f"{statistics.fmean(values):.2f}" if values else "-")
            pairs = _pairs(stacks, name, split)
            cells.append(_change([b - a for a, b in pairs]) if pairs and name != "recipe" else "")
        rows.append(cells)
    text = [
        f"Runs with seeds {seeds[0]} to {seeds[-1]}, which no choice has used.",
        "Gain: recipe minus the row, in points, paired by seed, with its 95 % interval by Student's t.",
    ]
    header = ["stack", "epochs", "val in %", "gain of the recipe", "test in %", "gain of the recipe"]
    return Section("Confirmation", text, [Table("Base, recipe, and recipe without each trick", header, rows)])


def _pairs(stacks: Mapping[str, Any], name: str, split: str) -> list[tuple[float, float]]:
    """Return the scores of a stack and of the recipe, by seed, where both are known."""
    if not stacks:
        return []
    pairs = zip(stacks[name][split], stacks["recipe"][split], strict=True)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _round(race: Mapping[str, Any], number: int, found: Mapping[str, Any]) -> Section:
    leader = " + ".join(["base", *(race["names"][name] for name in found["leader"])])
    rows = []
    for stage in ("screened", "tested"):
        for each in found[stage]:
            mean, cost, memory = _mean(each), each["cost"], _memory(each)
            reach = _reach(each)
            rows.append(
                [
                    race["names"][each["candidate"]],
                    each["stage"],
                    str(len(each["differences"])),
                    "failed" if mean is None else f"{mean:+.2f}" + (f" ± {reach:.2f}" if reach is not None else ""),
                    "-" if cost is None else f"{cost:.2f}",
                    "-" if memory is None else f"{memory:.2f}",
                    each["state"],
                    each["reason"],
                ]
            )
    header = ["candidate", "stage", "seeds", "points against the leader", "time", "memory", "state", "reason"]
    outcome = f"{race['names'][found['kept']]} was kept." if found["kept"] else "No candidate was kept."
    text = [
        f"The leader is {leader}. {outcome}",
        "Points are paired by seed. In the screening, ± is the reach of the 95 % interval by Student's t, from two "
        "seeds on. In the test, the interval allows for repeated looks. Time and memory are multiples of the leader's.",
    ]
    return Section(f"Round {number}", text, [Table(f"Round {number}", header, rows)])


def _comparisons(race: Mapping[str, Any]) -> list[tuple[int, str, Mapping[str, Any]]]:
    return [
        (number, each["stage"], each)
        for number, found in enumerate(race["rounds"], start=1)
        for each in (*found["screened"], *found["tested"])
    ]


def _mean(each: Mapping[str, Any]) -> float | None:
    differences = each["differences"]
    return None if not differences or any(value is None for value in differences) else statistics.fmean(differences)


def _reach(each: Mapping[str, Any]) -> float | None:
    """Return the reach of the interval of a comparison: of the test, or by Student's t in the screening."""
    if each["stage"] == "test" or _mean(each) is None or len(each["differences"]) < 2:
        reach: float | None = each["reach"]
        return reach
    return paired_change(each["differences"])[1]


def _memory(each: Mapping[str, Any]) -> float | None:
    """Return the peak memory with the candidate, as a multiple of the leader's."""
    known = [own / base for own, base in each["memories"] if own and base]
    return statistics.median(known) if known else None


def _change(differences: Sequence[float]) -> str:
    mean, reach = paired_change(differences)
    return f"{mean:+.2f}" + (f" ± {reach:.2f}" if math.isfinite(reach) else "")


def _draw(race: Mapping[str, Any], theme: Theme) -> Figure:
    rows = [(n, s, each) for n, s, each in _comparisons(race) if _mean(each) is not None]
    figure = new_figure(7.2, 1.2 + 0.3 * max(1, len(rows)))
    axes = figure.subplots()
    for y, (_, stage, each) in enumerate(rows):
        color = theme.cycle[2] if each["state"] == "kept" else theme.cycle[0] if stage == "test" else theme.faint
        axes.plot(each["differences"], [y] * len(each["differences"]), ".", color=color, alpha=0.6)
        mean = statistics.fmean(each["differences"])
        if each["reach"] is not None:
            axes.plot([mean - each["reach"], mean + each["reach"]], [y, y], color=color, linewidth=2)
        axes.plot([mean], [y], "|", color=color, markersize=14, markeredgewidth=2)
    axes.axvline(0, color=theme.faint, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{n}: {race['names'][each['candidate']]}, {s}" for n, s, each in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    tidy(axes, "", "points against the leader", "")
    return figure
