"""Statistics, tables and plot of peers.py, from its finished runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from peers_runs import HELD_OUT, ROWS, Scale
from peers_statistics import holm, p_value, reduction

from lit_tricks.run.report.ablation_table import paired_change

Line = dict[str, Any]
Values = dict[int, float]  # by seed
METRICS = {"top1": ("top-1 in %", 2), "flip": ("with flips in %", 2), "nll": ("NLL", 3), "ece": ("ECE in %", 2)}
COST = "_at_cost"  # suffix of a row of ours with as many steps as the cost of the best peer allows


def read(path: Path, scale: Scale) -> list[Line]:
    """Return the finished runs of these settings. A line without an end was interrupted."""
    text = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    return [line for line in lines if line["settings"] == asdict(scale)]


def trials_of(done: Sequence[Line], row: str) -> list[Line]:
    return [line for line in done if line["stage"] == "tune" and line["row"] == row]


def best_trial(done: Sequence[Line], row: str) -> Line:
    """Return the trial of a row with the best top-1, and its better network: "weights" or their "average"."""
    found = [(score["top1"], line, name) for line in trials_of(done, row) for name, score in line["scores"].items()]
    _, line, name = max(found, key=lambda each: each[0])
    return {**line, "network": name}


def held_out(done: Sequence[Line], row: str) -> float:
    """Return the top-1 of the best trial of a row."""
    best = best_trial(done, row)
    return float(best["scores"][best["network"]]["top1"])


def best_peer(done: Sequence[Line]) -> str:
    """Return the peer whose best trial is the best on the held-out images."""
    peers = [row for row in ROWS if ROWS[row].peer and trials_of(done, row)]
    return max(peers, key=lambda row: held_out(done, row))


def cost(done: Sequence[Line], row: str) -> float:
    """Return the seconds of a step of a row without the making of batches: the median of its trials.

    Other work on the machine makes single runs slower.
    """
    return statistics.median((line["seconds"] - line["data_seconds"]) / line["steps"] for line in trials_of(done, row))


def tests_of(done: Sequence[Line], row: str) -> list[Line]:
    """Return the runs of a row on the test images, by seed."""
    return sorted((x for x in done if x["stage"] == "test" and x["row"] == row), key=lambda x: x["seed"])


def values(done: Sequence[Line], row: str, metric: str) -> Values:
    """Return a metric of the test images by seed, of the network that the trials chose."""
    network = best_trial(done, row.removesuffix(COST))["network"]
    found = {line["seed"]: line["scores"][network][metric] for line in tests_of(done, row)}
    return {seed: value for seed, value in found.items() if value is not None}


def title(row: str) -> str:
    return ROWS[row.removesuffix(COST)].title + (", at equal cost" if row.endswith(COST) else "")


def shown(done: Sequence[Line]) -> list[str]:
    """Return the rows that were tested."""
    tested = {line["row"] for line in done if line["stage"] == "test"}
    return [row for row in (*ROWS, *(row + COST for row in ROWS)) if row in tested]


def spread(found: Values, digits: int = 2) -> str:
    if not found:
        return "-"
    numbers = list(found.values())
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{deviation}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def results(done: Sequence[Line], scale: Scale) -> list[str]:
    unit = "GPU s" if scale.device == "cuda" else "CPU s"
    lines = []
    for row in shown(done):
        runs = tests_of(done, row)
        seconds = [statistics.fmean(run["seconds"] - part * run["data_seconds"] for run in runs) for part in (1, 0)]
        metrics = [spread(values(done, row, name), digits) for name, (_, digits) in METRICS.items()]
        epochs = statistics.fmean(run["steps"] for run in runs) * scale.epochs / scale.steps
        lines.append([title(row), *metrics, f"{epochs:.1f}", *(f"{s:.0f}" for s in seconds), str(len(runs))])
    names = [name for name, _ in METRICS.values()]
    head = ["", *names, "epochs", f"cost, {unit}", f"with data, {unit}", "seeds"]
    return table(head, lines)


def pairs(done: Sequence[Line]) -> list[tuple[str, str]]:
    """Return the rows of ours with the rows that they are compared with, the best peer first."""
    rows = shown(done)
    peers = sorted((r for r in rows if not r.endswith(COST) and ROWS[r].peer), key=lambda r: -held_out(done, r))
    found = []
    for row in rows:
        if row.endswith(COST):
            found += [(row, peer) for peer in peers[:1]]
        elif ROWS[row].base:
            found += [(row, ROWS[row].base)] * (ROWS[row].base in rows)
        elif not ROWS[row].peer:
            found += [(row, peer) for peer in peers]
    return found


def shared(done: Sequence[Line], row: str, peer: str) -> tuple[list[float], list[float]]:
    """Return the errors of two rows in per cent, of the seeds that both have."""
    a, b = values(done, row, "top1"), values(done, peer, "top1")
    seeds = sorted(a.keys() & b.keys())
    return [100 - a[seed] for seed in seeds], [100 - b[seed] for seed in seeds]


def comparisons(done: Sequence[Line]) -> list[str]:
    found = [(row, peer, *shared(done, row, peer)) for row, peer in pairs(done)]
    found = [each for each in found if each[2]]
    adjusted = holm([p_value([b - a for a, b in zip(mine, others, strict=True)]) for _, _, mine, others in found])
    lines = []
    for (row, peer, mine, others), p in zip(found, adjusted, strict=True):
        mean, reach = paired_change([b - a for a, b in zip(mine, others, strict=True)])
        middle, low, high = reduction(mine, others)
        many = len(mine) > 1
        points, fewer = (
            f"{mean:+.2f}" + f" ± {reach:.2f}" * many,
            f"{middle:.1f}" + f" ({low:.1f} to {high:.1f})" * many,
        )
        shown_p = "-" if not many else "< 0.001" if p < 0.001 else f"{p:.3f}"
        lines.append([title(row), title(peer), points, fewer, shown_p, str(len(mine))])
    return table(["row", "compared with", "points", "fewer errors in %", "p, Holm", "seeds"], lines)


def sentences(done: Sequence[Line]) -> list[str]:
    """Return one sentence for each row of ours, against the best peer."""
    lines = []
    for row, peer in pairs(done):
        mine, others = shared(done, row, peer)
        against_peers = row.endswith(COST) or not ROWS[row].base
        if len(mine) < 2 or (against_peers and peer != best_peer(done)):
            continue
        middle, low, high = reduction(mine, others)
        word = "fewer" if middle >= 0 else "more"
        verdict = "" if low > 0 or high < 0 else " The interval contains 0: this may be chance."
        lines.append(
            f"- {title(row)}: {abs(middle):.1f} % {word} errors than {'the best peer, ' * against_peers}{title(peer)} "
            f"(95 % interval of the reduction {low:.1f} to {high:.1f} %).{verdict}"
        )
    return lines


def tuning(done: Sequence[Line]) -> list[str]:
    lines = []
    for row, space in ROWS.items():
        trials = trials_of(done, row)
        if not trials:
            continue
        best = best_trial(done, row)
        first = max(score["top1"] for line in trials if line["trial"] == 0 for score in line["scores"].values())
        chosen = best["choices"]
        options = ", ".join(f"{name} {value}" for name, value in chosen["options"].items())
        ends = [f"{low:g} to {high:g}" for _, low, high in (space.lr, space.decay)]
        lines.append(
            [
                space.title, str(len(trials)), f"{first:.2f}", f"{held_out(done, row):.2f}",
                f"{chosen['lr']:g} ({ends[0]})", f"{chosen['decay']:g} ({ends[1]})", f"{options}; {best['network']}",
            ]
        )  # fmt: skip
    head = ["", "trials", "first choice", "best", "learning rate", "weight decay", "options; tested network"]
    return table(head, lines)


def write(out: Path, done: Sequence[Line], scale: Scale) -> None:
    """Write peers.md and peers.png from the runs that are done."""
    machines = sorted({line["machine"] for line in done})
    teacher = [line for line in done if line["stage"] == "teacher"]
    taught = ""
    if teacher:
        top1, seconds = teacher[0]["scores"]["weights"]["top1"], teacher[0]["seconds"]
        taught = (
            f" The teacher has width {scale.teacher_width:g}, took {seconds:.0f} s, which are in no cost, and reaches "
            f"{top1:.2f} % on the held-out images."
        )
    steps = f"{scale.epochs} epochs of {scale.images} images in batches of {scale.batch_size}"
    text = ["# Ours against the scripts of timm, torchvision and Lightning", ""]
    if shown(done):
        text += [*sentences(done), "", *results(done, scale), ""]
        text += [
            "Means ± standard deviations over the seeds, on the test images, which no choice has used. Higher is "
            "better for top-1, lower for all else. With flips: top-1 of the mean of an image and its mirror image. NLL "
            "is the negative log-likelihood, ECE the expected calibration error in 15 bins. Cost is in seconds of a "
            "run without the making of its batches. At equal cost, ours has as many steps as cost what the best peer "
            "costs. The best peer is the best on the held-out images.",
            "",
        ]
        if pairs(done):
            text += [*comparisons(done), ""]
            text += [
                "Points: top-1 of the row minus the other, paired by seed, ± half the 95 % interval by Student's t. "
                "Fewer errors: the reduction of the peer's errors, from the mean logarithm of the ratio, with its "
                "interval; negative: more errors. p: two-sided t-test, with Holm's correction over all of these lines.",
                "",
            ]
    text += [
        f"## Trials on {HELD_OUT} held-out images of train",
        "",
        *tuning(done),
        "",
        "Top-1 in %, higher is better, of one seed. The first choice is the script's default, or in the rows of our "
        "stack the best of screening.md. The other trials are the same points of a Halton sequence in the space of "
        "each row: learning rate (for a batch of 256) and weight decay, both logarithmic, and the strengths in "
        "peers_runs.py. The further trials of peers_runs.py are where runs of this size had been best. All trials are "
        "lines of peers.jsonl.",
        "",
        f"All rows: ResNet-18-D of width {scale.width:g}, {steps}, {scale.size} pixels, {scale.precision}, whole test "
        f"images. What the scripts scale by epochs is scaled to this run (peers_runs.py).{taught}",
        "",
        *(f"- {name}" for name in machines),
        "",
        f"`python benchmarks/peers.py --data cifar10 --out RESULTS {scale.flags}`",
        "",
    ]
    (out / "peers.md").write_text("\n".join(text))
    print("\n".join(text))
    if shown(done):
        draw(out / "peers.png", done, scale)


def draw(path: Path, done: Sequence[Line], scale: Scale) -> None:
    rows = shown(done)
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        found = list(values(done, row, "top1").values())
        if not found:
            continue
        color = "tab:gray" if not row.endswith(COST) and ROWS[row].peer else "tab:blue"
        mean, reach = paired_change(found)
        left.plot(found, [y] * len(found), ".", color=color, alpha=0.4)
        left.errorbar(
            mean, y, xerr=reach if math.isfinite(reach) else 0, fmt="|", color=color, capsize=3, markersize=11
        )
        seconds = statistics.fmean(run["seconds"] - run["data_seconds"] for run in tests_of(done, row))
        filled = "none" if row.endswith(COST) else color
        right.plot([seconds], [100 - mean], "o", color=color, markerfacecolor=filled)
        right.annotate(title(row), (seconds, 100 - mean), (5, 3), textcoords="offset points", fontsize=7)
    left.set_yticks(range(len(rows)), [title(row) for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("top-1 in %: seeds, their mean, 95 % interval")
    right.set_xlabel(f"cost of a run in {'GPU' if scale.device == 'cuda' else 'CPU'} seconds, without data")
    right.set_ylabel("errors in %")
    right.margins(x=0.3)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
