"""Fine-tuning on 200 photos against a linear probe of the same network: the configuration `finetune`, unchanged.

    python benchmarks/own_photos.py --cifar FOLDER/cifar10 --work FOLDER --out benchmarks/results/own_photos.md

The photos are CIFAR-10's, in its own JPEG files. A small ResNet is pretrained on six of the classes. Each seed draws 50
photos of each of the other four classes, and holds out a fifth of them. All other photos of these classes in `val` are
the test. The probe is scikit-learn's logistic regression on the features of the pretrained network, on all 200 photos,
with the strength of regularization that cross-validation chooses. Runs that are done are kept in --work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from scipy.stats import t as students
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import lit_tricks
from lit_tricks.data import ImageFolder

OWN = ("bird", "cat", "horse", "ship")  # the photos of the user; the network has seen no such class
SEEDS = tuple(range(8))
PRETRAINING = 500  # photos of each of the other classes
PHOTOS = 50  # of each class
NETWORK = '{"depth": 18, "variant": "D", "width": 0.25, "small_input": true}'
SIZE = ("--data.image_size=32", "--data.resize_size=32", "--data.num_workers=0")
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def lit(folder: Path, *words: str) -> float:
    """Run a command, and return its CPU seconds."""
    start = os.times()
    subprocess.run([sys.executable, "-m", "lit_tricks", *words], cwd=folder, check=True)
    end = os.times()
    return end.children_user + end.children_system - start.children_user - start.children_system


def link(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file)


def pretrained(work: Path, cifar: Path) -> Path:
    """Train on the classes that are not the user's, and return the checkpoint."""
    path = work / "runs" / "pretraining" / "v0" / "checkpoints" / "last.ckpt"
    if not path.is_file():
        shutil.rmtree(work / "runs" / "pretraining", ignore_errors=True)
        shutil.rmtree(work / "others", ignore_errors=True)
        for folder in sorted((cifar / "train").iterdir()):
            if folder.name not in OWN:
                files = sorted(folder.iterdir())
                link(files[:PRETRAINING], work / "others" / "train" / folder.name)
                link(files[PRETRAINING : PRETRAINING + 20], work / "others" / "val" / folder.name)
        lit(
            work, "fit", "--name=pretraining", "--data=ImageFolder", "--data.root=others", "--data.cache=memory",
            "--data.augmentation=basic", "--data.batch_size=64", f"--model.model_args={NETWORK}",
            "--model.optimizer.lr=0.05", "--trainer.max_epochs=6", "--config=tricks/warmup_cosine",
            "--trainer.callbacks.WarmupCosine.warmup_epochs=1", *SIZE, *QUIET,
        )  # fmt: skip
    return path


def features(checkpoint: Path, root: Path) -> tuple[Any, Any]:
    """Return what the classifier of the pretrained network gets, and the labels."""
    model: Any = (
        lit_tricks.Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval().model
    )
    data = ImageFolder(str(root), 32, 100, 0, 32, val_fraction=0.2)
    transform = data.input_transform()
    files = [(file, label) for label, name in enumerate(data.classes) for file in sorted((root / name).glob("*.jpg"))]
    with torch.inference_mode():
        images = torch.stack([transform(str(file)) for file, _ in files]).split(200)
        found = torch.cat([model.forward_head(model.forward_features(part), pre_logits=True) for part in images])
    return found.numpy(), np.array([label for _, label in files])


def one(work: Path, cifar: Path, checkpoint: Path, seed: int) -> dict[str, float]:
    folder = work / f"seed{seed}"
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    shutil.rmtree(folder, ignore_errors=True)
    draw = random.Random(seed)
    for name in OWN:
        link(draw.sample(sorted((cifar / "train" / name).iterdir()), PHOTOS), folder / "photos" / name)
        link(sorted((cifar / "val" / name).iterdir()), folder / "new" / name)
    seconds = lit(
        folder, "fit", "--config=finetune", "--data.root=photos", f"--model.weights={checkpoint}",
        f"--model.model_args={NETWORK}", f"--seed_everything={seed}", f"--data.split_seed={seed}", *SIZE, *QUIET,
    )  # fmt: skip
    lit(folder, "predict", "new", "--ckpt=runs/finetune/v0", "--output=new.json", "--device=cpu", "--batch_size=200")
    rows = json.loads((folder / "new.json").read_text())
    tuned = statistics.mean(row["label1"] == Path(row["file"]).parent.name for row in rows)
    (train, labels), (new, expected) = features(checkpoint, folder / "photos"), features(checkpoint, folder / "new")
    start = time.process_time()
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 2, 13), cv=5, max_iter=2000))
    probe.fit(train, labels)
    found = {
        "finetune": tuned, "probe": float(probe.score(new, expected)), "seconds": seconds,
        "probe seconds": time.process_time() - start,
    }  # fmt: skip
    result.write_text(json.dumps(found))
    return found


def report(rows: list[dict[str, float]]) -> str:
    differences = [100 * (row["finetune"] - row["probe"]) for row in rows]
    reach = students.ppf(0.975, len(rows) - 1) * statistics.stdev(differences) / len(rows) ** 0.5
    lines = [
        "# Own photos: fine-tuning against a linear probe",
        "",
        f"200 photos of {', '.join(OWN)} (50 of each class, from CIFAR-10), and a ResNet-18-D of a quarter of the "
        f"width, pretrained on {PRETRAINING} photos of each of the six other classes. Top-1 on 2000 new photos, in per "
        "cent; higher is better.",
        "",
        "| seed | `finetune` | linear probe | difference | `finetune`, CPU seconds | probe, CPU seconds |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for seed, row, difference in zip(SEEDS, rows, differences, strict=True):
        cells = (100 * row["finetune"], 100 * row["probe"])
        lines.append(
            f"| {seed} | {cells[0]:.2f} | {cells[1]:.2f} | {difference:+.2f} | {row['seconds']:.0f} | "
            f"{row['probe seconds']:.1f} |"
        )
    means = [statistics.mean(100 * row[key] for row in rows) for key in ("finetune", "probe")]
    lines += [
        f"| mean | {means[0]:.2f} | {means[1]:.2f} | {statistics.mean(differences):+.2f} ± {reach:.2f} | | |",
        "",
        "±: reach of the 95 % interval of the mean difference, paired by seed, by Student's t; it "
        f"{'includes' if abs(statistics.mean(differences)) < reach else 'leaves out'} 0. Fine-tuning trains on "
        "160 photos and chooses the epoch on 40. The probe trains on all 200. No public weights were at hand: the "
        "pretraining is small, and larger pretrained networks may give another difference.",
        "",
        f"{os.cpu_count()} CPU cores ({platform.machine()}), other work running; Python {platform.python_version()}, "
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, lit_tricks {lit_tricks.__version__}; "
        f"{datetime.date.today()}. `python benchmarks/own_photos.py --cifar FOLDER/cifar10 --work FOLDER --out "
        "benchmarks/results/own_photos.md`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and links to the photos")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args()
    work, cifar = args.work.resolve(), args.cifar.resolve()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = pretrained(work, cifar)
    rows = [one(work, cifar, checkpoint, seed) for seed in SEEDS]
    args.out.write_text(report(rows))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
