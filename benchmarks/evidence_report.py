"""Table and plot of evidence.py, from its finished runs."""

from __future__ import annotations

import datetime
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evidence_runs import HALF_LIFE, PIPELINE, Settings
from matplotlib.figure import Figure

from lit_tricks.run.report.ablation_table import paired_change

Values = dict[int, float]  # by seed, in per cent
# name of the row, its run, its model, and the row to compare with
ROWS: list[tuple[str, str, str, int | None]] = [
    ("efficient baseline, step schedule", "baseline", "end", None),
    ("+ cosine", "cosine", "end", 0),
    ("+ label smoothing", "smoothing", "end", 1),
    ("+ distillation", "distillation", "end", 2),
    ("+ mixup", "mixup", "weights", 3),
    ("+ EMA", "mixup", "end", 4),
    ("+ PreciseBN", "mixup", "precise_bn", 5),
    ("+ FixRes", "mixup", "fixres", 6),
    ("SWA instead of EMA", "swa", "end", 4),
    ("SWA and PreciseBN", "swa", "precise_bn", 8),
    ("all except distillation", "no_teacher", "fixres", 7),
]
FULL = 7
EARLIER = "d786131"  # the last commit whose runs had a data pipeline of their own


def machine(device: str) -> str:
    """Return the device and the versions of a run."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "timm"))
    return f"{_device_name(device)}; {versions}; {datetime.date.today()}"


def _device_name(device: str) -> str:
    if device == "cuda":
        query = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        return query.stdout.strip() or "a GPU"
    return f"{platform.machine()} CPU"


def read(path: Path, s: Settings) -> list[dict[str, Any]]:
    """Return the finished runs of these settings, in either 16-bit format."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    same = [run for run in found if run["settings"] | {"precision": s.precision} == asdict(s)]
    if len(same) < len(found):
        print(f"{path}: {len(found) - len(same)} of {len(found)} runs have other settings, and are left out")
    return same


def accuracies(runs: Sequence[dict[str, Any]], run: str, model: str, size: int) -> Values:
    found = {r["seed"]: r["top1"].get(model, {}).get(str(size)) for r in runs if r["run"] == run}
    return {seed: 100 * value for seed, value in found.items() if value is not None}


def spread(values: Values) -> str:
    if not values:
        return "-"
    numbers = list(values.values())
    return f"{statistics.fmean(numbers):.2f}" + (f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else "")


def change(values: Values, reference: Values) -> str:
    shared = sorted(values.keys() & reference.keys())
    if not shared:
        return ""
    mean, reach = paired_change([values[seed] - reference[seed] for seed in shared])
    return f"{mean:+.2f}" + (f" ± {reach:.2f}" if math.isfinite(reach) else "")


def fewer(values: Values, reference: Values) -> str:
    """Return the reduction of the number of errors, relative to a reference, as the mean over shared seeds."""
    shared = sorted(values.keys() & reference.keys())
    if not shared:
        return "-"
    errors = [statistics.fmean(100 - of[seed] for seed in shared) for of in (values, reference)]
    return f"{100 * (1 - errors[0] / errors[1]):.1f} %"


def table(runs: Sequence[dict[str, Any]], s: Settings) -> list[str]:
    sizes = (s.train_size, s.test_size)
    head = ["", *(cell for size in sizes for cell in (f"tested at {size}", "change")), "runs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, run, model, reference in _shown(runs):
        cells: list[str] = []
        for size in sizes:
            values = accuracies(runs, run, model, size)
            other = accuracies(runs, *ROWS[reference][1:3], size) if reference is not None else {}
            cells += [spread(values), change(values, other)]
        lines.append("| " + " | ".join([name, *cells, str(len(values)) if values else "-"]) + " |")
    return lines


def _shown(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, int | None]]:
    """Return the rows that have a run."""
    return [row for row in ROWS if row[1] in {run["run"] for run in runs}]


def summary(runs: Sequence[dict[str, Any]], s: Settings) -> list[str]:
    def of(row: int, size: int) -> Values:
        return accuracies(runs, *ROWS[row][1:3], size)

    small, large = s.train_size, s.test_size
    base, at_large = of(0, small), of(0, large)
    return [
        "Reduction of the number of errors, relative to the baseline:",
        "",
        f"- full stack (FixRes, tested at {large}), baseline tested at {small}: {fewer(of(FULL, large), base)}",
        f"- both tested at {large}: {fewer(of(FULL, large), at_large)}",
        f"- without FixRes, both tested at {small}: {fewer(of(FULL - 1, small), base)}",
        f"- without a teacher, only cosine and smoothing, both tested at {large}: {fewer(of(2, large), at_large)}",
    ]


def machines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the machines of the runs, and their time."""
    lines = []
    for name in sorted({run["machine"] for run in runs}):
        here = [run for run in runs if run["machine"] == name]
        seeds: dict[str, list[str]] = {}
        for run in here:
            seeds.setdefault(run["run"], []).append(str(run["seed"]))
        what = ", ".join(f"{run} ({' '.join(sorted(each))})" for run, each in seeds.items())
        seconds = sum(run["seconds"] for run in here)
        lines.append(f"- {name}, {seconds:.0f} s of training: the runs, and their seeds, {what}")
    return lines


def pipelines(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a paragraph about the runs of the earlier data pipeline, if there are any."""
    earlier = sum("pipeline" not in run for run in runs)
    if not earlier:
        return []
    return [
        f"Data: {earlier} of these {len(runs)} runs were made with an earlier data pipeline, "
        f"benchmarks/evidence_data.py of commit {EARLIER}, and are not repeated. Since then, the benchmark uses "
        f"{PIPELINE}. Images, sizes, flips and the range of the crops are the same. The earlier crops were bilinear "
        "without antialiasing, and a side that exceeded the image was cut to the image.",
        "",
    ]


def write(out: Path, runs: Sequence[dict[str, Any]], s: Settings) -> None:
    """Write evidence.md and evidence.png."""
    seeds = sorted({run["seed"] for run in runs if run["run"] != "teacher"})
    teachers = [spread(accuracies(runs, "teacher", "end", size)) for size in (s.train_size, s.test_size)]
    precisions = " or ".join(sorted({run["settings"]["precision"] for run in runs})) or s.precision
    text = [
        "# The stack on CIFAR-10, trick by trick",
        "",
        *table(runs, s),
        "",
        "Top-1 in per cent on the 5,000 images of val (higher is better): mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}. Change: points relative to the row above, or to the row without the trick. The "
        "last row is relative to the full stack (+ FixRes). Changes are paired by seed, ± half the width of the 95 % "
        "interval by Student's t. No choice was made on val.",
        "",
        *summary(runs, s),
        "",
        f"ResNet-18-D of width {s.width:g}, {s.epochs} epochs of 50,000 images, batches of {s.batch_size}, "
        f"{precisions}, crops of 25 to 100 % of the image at {s.train_size} pixels and flips, SGD (learning rate 0.1 "
        f"per batch of 128, momentum 0.9, weight decay 5e-4), {s.warmup:g} epochs of warm-up, moving averages with a "
        f"half-life of {HALF_LIFE:g} epoch. The teacher has width {s.teacher_width:g} and reaches {teachers[0]} at "
        f"{s.train_size} pixels, {teachers[1]} at {s.test_size}. FixRes: {s.fixres_epochs} more epochs of classifier "
        f"and last BatchNorm at {s.test_size}. "
        "EMA and PreciseBN do not change the training, so their rows come from the runs of + mixup.",
        "",
        *machines(runs),
        "",
        *pipelines(runs),
        f"`python benchmarks/evidence.py --data cifar10.tar.xz --epochs {s.epochs} --width {s.width:g} "
        f"--seeds {' '.join(map(str, seeds))}`, several runs at a time.",
        "",
    ]
    (out / "evidence.md").write_text("\n".join(text))
    draw(out / "evidence.png", runs, s)
    print("\n".join(text[2:-3]))


def draw(path: Path, runs: Sequence[dict[str, Any]], s: Settings) -> None:
    rows = _shown(runs)
    figure = Figure(figsize=(7.5, 1.2 + 0.33 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for size, shift, color in ((s.train_size, -0.13, "tab:blue"), (s.test_size, 0.13, "tab:orange")):
        axes.plot([], [], ".", color=color, label=f"tested at {size} pixels")
        for y, (_, run, model, _) in enumerate(rows):
            values = list(accuracies(runs, run, model, size).values())
            if values:
                axes.plot(values, [y + shift] * len(values), ".", color=color, alpha=0.5, markersize=7)
                axes.plot([statistics.fmean(values)], [y + shift], "|", color=color, markersize=11, markeredgewidth=2)
    axes.axhline(sum(row in rows for row in ROWS[: FULL + 1]) - 0.5, color="0.8", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("top-1 accuracy in %: seeds, and their mean")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="upper right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
