"""Accuracy with and without Lookahead, with a cosine that ends at 0 and with one that ends at a tenth of its peak.

    OMP_NUM_THREADS=1 python benchmarks/lookahead.py --cifar FOLDER/cifar10 --out benchmarks/results/lookahead.md

A narrow ResNet-18-D learns a part of CIFAR-10, resized to 16 pixels, with random flips and shifts. All runs of a seed
start from the same weights and see the same batches. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from scipy.stats import t as students
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lit_tricks.callbacks import Lookahead, WarmupCosine
from lit_tricks.models import resnet

PEAK = 0.2
SCHEDULES = {"cosine to 0": 0.0, "cosine to a tenth of the peak": PEAK / 10}
ARMS: dict[str, Callable[[], list[Callback]]] = {
    "no average": list,
    "Lookahead, constant (alpha 0.5)": lambda: [Lookahead(k=5, alpha=0.5)],
    "Lookahead, cubic (alpha 0.23)": lambda: [Lookahead(k=5, alpha=0.23, schedule="cubic")],
}


def images(folder: Path, per_class: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1] and labels."""
    found, labels = [], []
    for label, name in enumerate(sorted(each.name for each in folder.iterdir())):
        for file in sorted((folder / name).iterdir())[:per_class]:
            found.append(pil_to_tensor(Image.open(file).resize((size, size), Image.Resampling.BOX)))
            labels.append(label)
    return torch.stack(found).float() / 127.5 - 1, torch.tensor(labels)


class Small(LightningModule):
    """The network, which augments a batch by flips and shifts of up to 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet(18, "D", 10, small_input=True, width=0.125)
        self.correct: list[Tensor] = []
        self.top1 = 0.0

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        flips = torch.rand(len(images)) < 0.5
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
        y, x = torch.randint(5, (2,)).tolist()
        images = F.pad(images, (2, 2, 2, 2), mode="reflect")[:, :, y : y + images.shape[2], x : x + images.shape[3]]
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.correct.append(self(batch[0]).argmax(1) == batch[1])

    def on_validation_epoch_end(self) -> None:
        self.top1, self.correct = 100 * float(torch.cat(self.correct).float().mean()), []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=PEAK, momentum=0.9, nesterov=True, weight_decay=5e-4)


def top1(tricks: list[Callback], floor: float, seed: int, epochs: int, train: Any, val: Any) -> float:
    """Return the accuracy in % after the last epoch."""
    torch.manual_seed(seed)
    module = Small()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=epochs,
        callbacks=[WarmupCosine(warmup_epochs=1, min_lr=floor), *tricks],
    )  # fmt: skip
    loaders = [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), 128, shuffle=True, drop_last=True),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*val), 1000),
    ]
    trainer.fit(module, *loaders)
    return module.top1


def interval(differences: list[float]) -> str:
    """Return the mean with its 95 % interval of Student's t."""
    n = len(differences)
    reach = students.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return f"{statistics.mean(differences):+.2f} ± {reach:.2f}"


def report(cifar: Path, per_class: int, size: int, epochs: int, seeds: int) -> str:
    """Return the table."""
    start = time.process_time()
    train, val = images(cifar / "train", per_class, size), images(cifar / "val", 500, size)
    lines = [
        "# Lookahead on small images",
        "",
        "| schedule | weights | top-1 in % (higher is better) | change in points, paired, with 95 % interval |",
        "|---|---|---|---|",
    ]
    for schedule, floor in SCHEDULES.items():
        found: dict[str, list[float]] = {name: [] for name in ARMS}
        for seed in range(seeds):
            for name, make in ARMS.items():
                found[name].append(top1(make(), floor, seed, epochs, train, val))
                print(schedule, name, seed, found[name][-1], round(time.process_time() - start), flush=True)
        plain = found["no average"]
        for name, each in found.items():
            change = "-" if each is plain else interval([b - a for a, b in zip(plain, each, strict=True)])
            lines.append(f"| {schedule} | {name} | {statistics.mean(each):.2f} | {change} |")
    return "\n".join(
        [
            *lines,
            "",
            f"CIFAR-10, {10 * per_class} training images and {len(val[1])} test images at {size} x {size}, ResNet-18-D "
            f"at an eighth of its width, {epochs} epochs of {10 * per_class // 128} steps, batch size 128, SGD with a "
            f"peak learning rate of {PEAK:g}, {seeds} seeds. {round(time.process_time() - start)} s of CPU time, "
            f"{torch.get_num_threads()} thread(s), {os.cpu_count()} cores shared with other work; Python "
            f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}; "
            f"{datetime.date.today()}. `OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/lookahead.py "
            f"--cifar FOLDER/cifar10 --per-class {per_class} --size {size} --epochs {epochs} --seeds {seeds}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = report(arguments.cifar, arguments.per_class, arguments.size, arguments.epochs, arguments.seeds)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
