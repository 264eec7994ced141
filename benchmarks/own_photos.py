"""Fine-tuning on 200 and on 1000 photos against a linear probe of the same network: the configuration `finetune`.

    python benchmarks/own_photos.py --cifar FOLDER/cifar10 --work FOLDER --out benchmarks/results/own_photos.md

The photos are CIFAR-10's, in its own JPEG files. A small ResNet is pretrained on six of the classes. Each seed draws
photos of the other four classes, and a fifth of them is held out for validation. All other photos of these classes in
`val` are the test. The probe is scikit-learn's logistic regression on the features of the pretrained network, on all
photos, with the strength of regularization that cross-validation chooses. `finetune` runs unchanged, with SGD, and with
strong augmentation. What these two change is chosen on the validation photos of one further seed. With 200 photos,
tricks of `finetune` are also left out, and the backbone stays frozen. Runs that are done are kept in --work.
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
PRETRAINING = 500  # photos of each of the other classes
SEEDS = {50: tuple(range(8)), 250: tuple(range(3))}  # by the number of photos of each class
PROBE, FIXRES = "linear probe", "finetune, then FixRes"
LARGER = 40  # pixels of the test images after FixRes
TRIAL = 100  # the seed whose validation photos choose learning rates
BATCH = {50: (), 250: ("--data.batch_size=64",)}
SGD = (
    "--model.optimizer=SGD --model.optimizer.momentum=0.9 --model.optimizer.nesterov=true "
    "--model.optimizer.weight_decay=1e-4"
)
TRIALS: dict[str, dict[str, tuple[str, ...]]] = {  # each arm is the trial that is best on validation photos
    "finetune": {"AdamW, 0.001": ()},
    "with SGD": {f"SGD, {lr:g}": (*SGD.split(), f"--model.optimizer.lr={lr:g}") for lr in (0.03, 0.1, 0.3)},
    "with strong augmentation": {
        f"AdamW, 0.001, {name}": (f"--data.augmentation={name}",) for name in ("trivial", "rand")
    },
}
WITHOUT = {name: f"--trainer.callbacks-={name}" for name in ("Unfreeze", "LayerDecay", "EMA")}
LEFT_OUT = {f"without {name}": (word,) for name, word in WITHOUT.items()}
FROZEN = (
    WITHOUT["Unfreeze"], WITHOUT["LayerDecay"], "--trainer.callbacks+=Freeze",
    "--trainer.callbacks.Freeze.modules=[backbone]",
)  # fmt: skip
ONLY_CLASSIFIER = {
    "only the classifier, by Freeze": {
        f"AdamW, {lr:g}": (*FROZEN, f"--model.optimizer.lr={lr:g}") for lr in (0.001, 0.01, 0.03, 0.1)
    }
}
LEFT_OUT_AT = 50  # photos of each class
NETWORK = '{"depth": 18, "variant": "D", "width": 0.25, "small_input": true}'
SIZE = ("--data.image_size=32", "--data.resize_size=32", "--data.num_workers=0")
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def lit(folder: Path, *words: str) -> float:
    """Run a command, and return its CPU seconds."""
    start = os.times()
    subprocess.run([sys.executable, "-m", "lit_tricks", *words], cwd=folder, check=True)
    end = os.times()
    return end.children_user + end.children_system - start.children_user - start.children_system


def trials_of(count: int) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the settings of each trial by arm and name."""
    return TRIALS | (ONLY_CLASSIFIER if count == LEFT_OUT_AT else {})


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


def photos(folder: Path, cifar: Path, count: int, seed: int) -> None:
    """Link the photos of a seed, and the test photos."""
    draw = random.Random(seed)
    for name in OWN:
        link(draw.sample(sorted((cifar / "train" / name).iterdir()), count), folder / "photos" / name)
        link(sorted((cifar / "val" / name).iterdir()), folder / "new" / name)


def fit(folder: Path, checkpoint: Path, count: int, seed: int, name: str, words: tuple[str, ...]) -> float:
    """Fine-tune, unless it is done, and return the CPU seconds of the process."""
    result = folder / f"{name}.seconds"
    if not result.is_file():
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
        seconds = lit(
            folder, "fit", "--config=finetune", "--data.root=photos", f"--model.weights={checkpoint}", f"--name={name}",
            f"--model.model_args={NETWORK}", f"--seed_everything={seed}", f"--data.split_seed={seed}", *SIZE, *QUIET,
            *BATCH[count], *words,
        )  # fmt: skip
        result.write_text(str(seconds))
    return float(result.read_text())


def accuracy(folder: Path, checkpoint: str) -> float:
    lit(folder, "predict", "new", f"--ckpt={checkpoint}", "--output=new.json", "--device=cpu", "--batch_size=200")
    rows = json.loads((folder / "new.json").read_text())
    return statistics.mean(row["label1"] == Path(row["file"]).parent.name for row in rows)


def choose(work: Path, cifar: Path, checkpoint: Path, count: int) -> dict[str, dict[str, float]]:
    """Return the accuracy of each trial on the validation photos of a further seed."""
    folder, found = work / f"{count}-trials", {}
    if not folder.is_dir():
        photos(folder, cifar, count, TRIAL)
    for arm, trials in trials_of(count).items():
        found[arm] = {}
        for name, words in trials.items():
            run = name.replace(", ", "-") if arm in TRIALS else f"frozen-{name.replace(', ', '-')}"
            fit(folder, checkpoint, count, TRIAL, run, words)
            content = json.loads((folder / "runs" / run / "v0" / "results.json").read_text())
            found[arm][name] = 100 * (content.get("averaged") or content["raw"])["val"]["top1"]
    return found


def probe(folder: Path, checkpoint: Path) -> tuple[float, float]:
    """Return the accuracy of the linear probe on the test photos, and its CPU seconds."""
    (train, labels), (new, expected) = features(checkpoint, folder / "photos"), features(checkpoint, folder / "new")
    start = time.process_time()
    model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 2, 13), cv=5, max_iter=2000))
    model.fit(train, labels)
    return float(model.score(new, expected)), time.process_time() - start


def one(
    work: Path, cifar: Path, checkpoint: Path, count: int, seed: int, chosen: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Return the accuracy on the test photos and the CPU seconds of each arm."""
    folder = work / f"{count}-seed{seed}"
    result = folder / "result.json"
    done = json.loads(result.read_text()) if result.is_file() else {}
    found: dict[str, tuple[float, float]] = {arm: (top1, seconds) for arm, (top1, seconds) in done.items()}
    if not folder.is_dir():
        photos(folder, cifar, count, seed)
    if PROBE not in found:
        found[PROBE] = probe(folder, checkpoint)
    arms = {arm: trials_of(count)[arm][trial] for arm, trial in chosen.items()} | (
        LEFT_OUT if count == LEFT_OUT_AT else {}
    )
    for arm, words in arms.items():
        if arm not in found:
            name = arm.replace(" ", "-").replace(",", "")
            seconds = fit(folder, checkpoint, count, seed, name, words)
            found[arm] = accuracy(folder, f"runs/{name}/v0"), seconds
    if FIXRES not in found:
        seconds = found["finetune"][1]
        seconds += lit(folder, "fixres", "--ckpt=runs/finetune/v0", f"--test-size={LARGER}", "-o", "large.ckpt")
        found[FIXRES] = accuracy(folder, "large.ckpt"), seconds
    result.write_text(json.dumps(found))
    return found


def table(count: int, trials: dict[str, dict[str, float]], rows: list[dict[str, tuple[float, float]]]) -> list[str]:
    """Return the section of a number of photos."""
    reach = students.ppf(0.975, len(rows) - 1) / len(rows) ** 0.5
    lines = [
        f"## {count * len(OWN)} photos, {len(rows)} seeds",
        "",
        "| arm | setting | top-1 | against the probe | against `finetune` | CPU seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for arm in rows[0]:
        setting = max(trials[arm], key=trials[arm].__getitem__) if arm in trials else ""
        cells = []
        for reference in (PROBE, "finetune"):
            gains = [100 * (row[arm][0] - row[reference][0]) for row in rows]
            cells.append(
                "" if arm == reference else f"{statistics.mean(gains):+.2f} ± {reach * statistics.stdev(gains):.2f}"
            )
        top1, seconds = (statistics.mean(row[arm][i] for row in rows) for i in (0, 1))
        lines.append(f"| {arm} | {setting} | {100 * top1:.2f} | {' | '.join(cells)} | {seconds:.1f} |")
    validated = "; ".join(
        f"{arm}: " + ", ".join(f"{value:.2f} ({name})" for name, value in each.items()) for arm, each in trials.items()
    )
    return [*lines, "", f"Validation top-1 of the trials: {validated}.", ""]


def report(sections: list[str]) -> str:
    lines = [
        "# Own photos: fine-tuning against a linear probe",
        "",
        f"Photos of {', '.join(OWN)} from CIFAR-10, and a ResNet-18-D of a quarter of the width, pretrained on "
        f"{PRETRAINING} photos of each of the six other classes. Top-1 on 2000 new photos, in per cent; higher is "
        "better. ±: reach of the 95 % interval of the mean difference, paired by seed, by Student's t, uncorrected for "
        "the number of rows.",
        "",
        *sections,
        "Fine-tuning trains on four fifths of the photos and chooses the epoch on the others. The probe trains on all. "
        "The setting of an arm is the trial that is best on the validation photos of one further seed. "
        f"`{FIXRES}` is `lit-tricks fixres --test-size {LARGER}` after `finetune`; its seconds include both. No "
        "public weights were at hand: the pretraining is small, and larger pretrained networks may give other "
        "differences.",
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
    sections = []
    for count, seeds in SEEDS.items():
        trials = choose(work, cifar, checkpoint, count)
        chosen = {arm: max(each, key=each.__getitem__) for arm, each in trials.items()}
        sections += table(count, trials, [one(work, cifar, checkpoint, count, seed, chosen) for seed in seeds])
    args.out.write_text(report(sections))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
