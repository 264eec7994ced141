"""Each change of our stack alone, on held-out training images, to choose what peers.py compares.

    OMP_NUM_THREADS=1 python benchmarks/screening.py --data cifar10 --out RESULTS --epochs 10 --images 10000 \\
        --size 16 --batch-size 128 --jobs 2

The stack is the row "ours" of peers_runs.py, with WarmupCosine and shifted images. Images, settings and cost are as in
peers.py. No test image is used. A change is worth another look where both seeds gain. The first choice of the row has
the changes that gained.

A variant at equal cost trains for more or fewer steps, by the share that its title states. Finished runs are lines of
OUT/screening.jsonl. A repeated command continues. The table is OUT/screening.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from _processes import context
from evidence_data import load
from evidence_report import machine
from lightning.pytorch import Callback, Trainer
from peers import SEED_OF_TRIALS
from peers_report import table
from peers_runs import HELD_OUT, Run, Scale, choices, ours_run, train

from lit_tricks import callbacks as tricks


class Milder(Callback):
    """Weaker crops in the last fifth of the run."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step >= 0.8 * trainer.max_steps:
            transform = trainer.datamodule.train_transform  # type: ignore[attr-defined]
            if any(getattr(transform, name) != value for name, value in self.arguments.items()):
                vars(transform).update(self.arguments)
                transform._constants.clear()  # tables of the old crops


@dataclass(frozen=True)
class Variant:
    """A change of the stack.

    Attributes:
        title: shown name.
        changes: tricks that are added or replaced by name; None leaves one out.
        options: of the row, which are replaced.
        data: arguments of the data module.
        length: steps relative to the stack.
        batch: size of a batch relative to the stack.
    """

    title: str
    changes: dict[str, Callable[[], Callback] | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    length: float = 1.0
    batch: float = 1.0


STACK = {"scale": 0.0, "smoothing": 0.1, "schedule": "cosine"}  # options of the row
VARIANTS = {
    "stack": Variant("the stack"),
    "no_muon": Variant("without Muon: SGD, four times its learning rate", {"muon": None}),
    "no_smoothing": Variant("without LabelSmoothing", options={"smoothing": 0.0}),
    "smoothing_0.2": Variant("LabelSmoothing 0.2", options={"smoothing": 0.2}),
    "smoothing_falls": Variant(
        "LabelSmoothing 0.2, falling to 0",
        {"smoothing": lambda: tricks.LabelSmoothing(smoothing=0.2, schedule="fall")},
    ),
    "no_zero_gamma": Variant("without ZeroGamma", {"zero_gamma": None}),
    "no_bias_decay": Variant("without NoBiasDecay", {"no_bias_decay": None}),
    "linear": Variant("WarmupLinear", options={"schedule": "linear"}),
    "poly": Variant("WarmupPoly", options={"schedule": "poly"}),
    "stable_decay": Variant("WarmupStableDecay", options={"schedule": "stable_decay"}),
    "binary": Variant("BinaryCrossEntropy", {"loss": tricks.BinaryCrossEntropy}),
    "ema": Variant("EMA, half-life of half an epoch", {"ema": lambda: tricks.EMA(half_life=0.5)}),
    "lookahead": Variant("Lookahead, cubic", {"lookahead": lambda: tricks.Lookahead(schedule="cubic")}),
    "drop_path": Variant("DropPath 0.05", {"drop_path": lambda: tricks.DropPath(rate=0.05)}),
    "mixup": Variant("MixUp 0.2", {"mix": lambda: tricks.MixUp(alpha=0.2)}),
    "mixup_half": Variant("MixUp 0.2 in the first half", {"mix": lambda: tricks.MixUp(alpha=0.2, end=0.5)}),
    "cutmix_half": Variant("CutMix 1.0 in the first half", {"mix": lambda: tricks.CutMix(end=0.5)}),
    "alternating": Variant("alternating flip", data={"flip": "alternating"}),
    "reflect": Variant("mirrored border", data={"padding": "reflect"}),
    "cutout": Variant("cutout of a quarter of the side", data={"cutout": 4}),
    "shift_1": Variant("shift of a sixteenth of the side", data={"translate": 1}),
    "mild_shift": Variant("no shift in the last fifth", {"mild": lambda: Milder(translate=0)}),
    "crop": Variant("crops of 35 to 100 % of the area", options={"scale": 0.35}),
    "crop_70": Variant("crops of 70 to 100 % of the area", options={"scale": 0.7}),
    "crop_70_linear": Variant(
        "crops of 70 to 100 % of the area, WarmupLinear", options={"scale": 0.7, "schedule": "linear"}
    ),
    "crop_mild": Variant(
        "crops of 35 to 100 % of the area, of 80 to 100 % in the last fifth",
        {"mild": lambda: Milder(crop_scale=(0.8, 1.0))},
        {"scale": 0.35},
    ),
    "progressive": Variant(
        "ProgressiveResizing from 0.75, 1.25 times the steps",
        {"sizes": lambda: tricks.ProgressiveResizing(start_scale=0.75, start=0.4, end=0.8, multiple_of=4)},
        length=1.25,
    ),
    "batch_half": Variant("batches of half the size, as many images", length=2.0, batch=0.5),
}


def make(work: tuple[str, int, Scale, Path]) -> dict[str, Any]:
    """Make a run of a variant. Return its line of the results."""
    name, seed, scale, cache = work
    variant, chosen = VARIANTS[name], choices("ours", 0)
    steps = round(variant.length * scale.steps)
    scaled = dataclasses.replace(scale, batch_size=round(variant.batch * scale.batch_size))
    options = {**STACK, **variant.options}
    run = Run(scaled, cache, Path(), seed, steps, chosen["lr"], chosen["decay"], options)
    found = train(run, "val", lambda: ours_run(run, variant.changes, **variant.data))
    return {"variant": name, "seed": seed, **found, "settings": asdict(scale), "machine": machine(scale.device)}


def report(out: Path, lines: Sequence[dict[str, Any]], scale: Scale) -> None:
    """Write screening.md."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["variant"], {})[line["seed"]] = line
    stack, rows = found["stack"], []
    base = [f"{stack[seed]['scores']['weights']['top1']:.2f}" for seed in sorted(stack)]
    for name, runs in found.items():
        seeds = sorted(runs.keys() & stack.keys())
        top1 = {seed: runs[seed]["scores"]["weights"]["top1"] for seed in seeds}
        changes = [top1[seed] - stack[seed]["scores"]["weights"]["top1"] for seed in seeds]
        costs = [
            statistics.fmean(part[seed]["seconds"] - part[seed]["data_seconds"] for seed in seeds)
            for part in (runs, stack)
        ]
        change = "-" if name == "stack" else f"{statistics.fmean(changes):+.2f}"
        each = "-" if name == "stack" else ", ".join(f"{value:+.2f}" for value in changes)
        top = f"{statistics.fmean(top1.values()):.2f}"
        rows.append(
            (statistics.fmean(changes), [VARIANTS[name].title, top, change, each, f"{costs[0] / costs[1]:.2f}"])
        )
    rows.sort(key=lambda row: -row[0])
    head = ["change of the stack", "top-1 in %", "change in points", "by seed", "x cost"]
    text = [
        "# Screening of the stack for peers.py",
        "",
        *table(head, [row for _, row in rows]),
        "",
        f"Means over the seeds that are listed, paired, on {HELD_OUT} held-out images. Few seeds show large effects "
        f"only: the stack has {', '.join(base)} by seed. All rates are the first choice of the row in "
        "peers_runs.py: the SGD without Muon was not tuned. Cost is CPU seconds without the making of batches, "
        "which vary by about a tenth with other work on the machine.",
        "",
        f"ResNet-18-D of width {scale.width:g}, {scale.epochs} epochs of {scale.images} images in batches of "
        f"{scale.batch_size}, {scale.size} pixels, {scale.precision}.",
        "",
        *(f"- {name}" for name in sorted({line["machine"] for line in lines})),
        "",
        f"`python benchmarks/screening.py --data cifar10 --out RESULTS {scale.flags}`",
        "",
    ]
    (out / "screening.md").write_text("\n".join(text))
    print("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or tar file of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "evidence-cifar10.npz")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    Scale.add_flags(parser)
    args = parser.parse_args()
    scale = Scale.of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    load(args.data, args.cache)
    file = args.out / "screening.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = [line for line in lines if line["settings"] == asdict(scale)]
    done = {(line["variant"], line["seed"]) for line in lines}
    seeds = range(SEED_OF_TRIALS, SEED_OF_TRIALS + args.seeds)
    names = dict.fromkeys(("stack", *args.variants))
    todo = [(name, seed, scale, args.cache) for seed in seeds for name in names if (name, seed) not in done]
    with context(args.device).Pool(args.jobs, maxtasksperchild=1) as pool:
        for line in pool.imap_unordered(make, todo):
            with file.open("a") as kept:
                kept.write(json.dumps(line) + "\n")
            lines.append(line)
            print(line["variant"], line["seed"], f"{line['scores']['weights']['top1']:.2f}", flush=True)
    report(args.out, lines, scale)


if __name__ == "__main__":
    main()
