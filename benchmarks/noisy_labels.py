"""Train on CIFAR-10 with 40 % wrong labels, with and without the tricks on the loss, in two budgets.

    python benchmarks/noisy_labels.py --cifar FOLDER/cifar10 --out benchmarks/results/noisy_labels.jsonl

Each seed draws images of each class from ``train``, and replaces the labels of 40 % of them by another class, drawn
uniformly. All arms of a seed share images, wrong labels, initial weights and the order of images. In the first budget
the network hardly learns wrong labels by heart. The second, which was added after results of the first, has fewer
images, unchanged, in more epochs, and plain cross entropy learns all wrong labels. Networks are tested after the last
epoch on all images of ``val``, whose labels are clean. Arguments of tricks are from their papers, and no argument was
chosen by these figures. Finished runs are kept in the file of --out, and the table is written next to it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image
from scipy.stats import t as students
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lit_tricks
from lit_tricks import callbacks as tricks
from lit_tricks.models import create_model

SIZE, BATCH, LR, DECAY = 16, 100, 0.1, 5e-4
NOISE, SEEDS = 0.4, (0, 1, 2)
ARMS: dict[str, Callable[[], list[Any]]] = {
    "plain": list,
    "LabelSmoothing": lambda: [tricks.LabelSmoothing(0.1)],
    "GeneralizedCrossEntropy": lambda: [tricks.GeneralizedCrossEntropy(0.7)],
    "MixUp": lambda: [tricks.MixUp(alpha=1.0)],
}


class Budget(NamedTuple):
    """Images of each class, epochs, and whether images are shifted and mirrored."""

    per_class: int
    epochs: int
    augmented: bool


BUDGETS = (Budget(500, 15, True), Budget(150, 30, False))


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 16, 16), uint8, and labels (N,) of a folder of classes."""
    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for file in sorted((folder / name).iterdir()):
            images.append(np.asarray(Image.open(file).convert("RGB").reduce(32 // SIZE)))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def noisy(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return labels of which a share is replaced by another class, drawn uniformly."""
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    changed = labels.clone()
    changed[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    return changed


class Batches(IterableDataset[Any]):
    """Batches in another order each epoch, if augmented shifted by up to 2 pixels and mirrored at random."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, augmented: bool) -> None:
        self.images, self.labels, self.augmented = images, labels, augmented
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.images), generator=self.generator).split(BATCH):
            if not self.augmented:
                images = normalized(self.images[index]).contiguous(memory_format=torch.channels_last)
                yield images, self.labels[index]
                continue
            images = F.pad(normalized(self.images[index]), (2, 2, 2, 2), mode="reflect")
            rows, columns = torch.randint(5, (2, len(index), 1), generator=self.generator) + torch.arange(SIZE)
            mirrored = torch.rand(len(index), 1, generator=self.generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            item = torch.arange(len(index))[:, None, None]
            images = images.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]]
            yield images.permute(0, 3, 1, 2), self.labels[index]


def normalized(images: Tensor) -> Tensor:
    return (images.float() - 120.0) / 64.0


class Module(LightningModule):
    """A narrow ResNet-18 with softmax cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        net = create_model("resnet", 10, depth=18, width=0.25, small_input=True)
        self.net = net.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LR, momentum=0.9, nesterov=True, weight_decay=DECAY)

    @torch.inference_mode()
    def classes(self, images: Tensor) -> Tensor:
        self.eval()
        return torch.cat([self.net(normalized(part)).argmax(1) for part in images.split(500)])


def run(
    arm: str, budget: Budget, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Train one network, and return its accuracies in per cent."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.cat(
        [
            torch.nonzero(train[1] == label)[:, 0][torch.randperm(5000, generator=generator)[: budget.per_class]]
            for label in range(10)
        ]
    )
    images, labels = train[0][chosen], train[1][chosen]
    given = noisy(labels, NOISE, generator)
    seed_everything(seed, verbose=False)
    module = Module()
    start = time.process_time()
    trainer = Trainer(
        max_epochs=budget.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[tricks.WarmupCosine(warmup_epochs=1), *ARMS[arm]()],
    )  # fmt: skip
    trainer.fit(module, DataLoader(Batches(images, given, seed, budget.augmented), batch_size=None))
    seconds = time.process_time() - start
    fitted, wrong = module.classes(images), given != labels
    return {
        "arm": arm, "images": len(images), "epochs": budget.epochs, "seed": seed, "seconds": round(seconds, 1),
        "test": 100 * float((module.classes(test[0]) == test[1]).double().mean()),
        "wrong labels learnt": 100 * float((fitted == given)[wrong].double().mean()),
    }  # fmt: skip


def report(rows: list[dict[str, Any]]) -> str:
    lines = ["# 40 % wrong labels, with tricks on the loss", ""]
    for budget in BUDGETS:
        images = 10 * budget.per_class
        scores = {
            arm: {row["seed"]: row for row in rows if (row["arm"], row["images"]) == (arm, images)} for arm in ARMS
        }
        augmented = "shifted and mirrored" if budget.augmented else "unchanged"
        lines += [f"## {images} images, {budget.epochs} epochs, images {augmented}", ""]
        lines += [
            "| arm | seeds | top-1 in % | difference to plain in points | wrong labels learnt in % | CPU seconds |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for arm, found in scores.items():
            top1, wrong, seconds = (
                statistics.mean(row[key] for row in found.values())
                for key in ("test", "wrong labels learnt", "seconds")
            )
            difference = "-"
            if arm != "plain":
                differences = [row["test"] - scores["plain"][seed]["test"] for seed, row in found.items()]
                reach = students.ppf(0.975, len(found) - 1) * statistics.stdev(differences) / len(found) ** 0.5
                difference = f"{statistics.mean(differences):+.2f} ± {reach:.2f}"
            lines.append(f"| {arm} | {len(found)} | {top1:.2f} | {difference} | {wrong:.1f} | {seconds:.0f} |")
        lines.append("")
    lines += [
        "Top-1 on the 10,000 test images, whose labels are clean; higher is better. ±: reach of the 95 % interval of "
        "the mean difference, paired by seed, by Student's t. Wrong labels learnt: share of the wrong training labels "
        "that the network predicts on their images; lower is better.",
        "",
        f"CIFAR-10 at {SIZE} pixels, ResNet-18 of a quarter of the width, batch size {BATCH}, SGD at {LR} with a "
        "cosine for all arms. LabelSmoothing(0.1), GeneralizedCrossEntropy(0.7), MixUp(1.0). The second "
        "budget was added after results of the first. A network that guesses learns 10 % of the wrong labels. "
        f"{platform.machine()} CPU, other work running; Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}, lit_tricks {lit_tricks.__version__}; {datetime.date.today()}. "
        "`python benchmarks/noisy_labels.py --cifar FOLDER/cifar10 --out "
        "benchmarks/results/noisy_labels.jsonl`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of the runs; a table is written next to it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    done = {(row["arm"], row["images"], row["seed"]) for row in rows}
    train, test = load(args.cifar / "train"), load(args.cifar / "val")
    for budget, seed, arm in itertools.product(BUDGETS, SEEDS, ARMS):
        if (arm, 10 * budget.per_class, seed) not in done:
            rows.append(run(arm, budget, seed, train, test))
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    text = report(rows)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
