"""Measure the cost of PreciseBN for a ResNet-50, relative to bare forward passes over the same batches.

    OMP_NUM_THREADS=1 python benchmarks/precise_bn.py --out benchmarks/results/precise_bn.md

All candidates take turns, round by round, in one process. The result is the median of the rounds' ratios.
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

import lightning
import timm
import torch
import torch.nn.functional as F
from fvcore.nn.precise_bn import update_bn_stats
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks.callbacks.batchnorm.data_pass import go_through
from lit_tricks.utils.modules import batchnorms_of


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet50")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Measure(Callback):
    """Measure in a fit, before its first step."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.times: dict[str, list[float]] = {}

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.train_dataloader
        batches = list(loader)
        samples = sum(len(images) for images, _ in batches)

        def bare() -> None:
            for images, _ in batches:
                pl_module(images)

        layers = batchnorms_of(pl_module)
        candidates: dict[str, Callable[[], object]] = {
            "bare forward passes, data at hand": bare,
            "PreciseBN, all of it": lambda: go_through(trainer, pl_module, layers, samples, "train"),
            "fvcore update_bn_stats": lambda: update_bn_stats(pl_module.net, [x for x, _ in batches], len(batches)),
            "torch swa_utils.update_bn": lambda: update_bn((x for x, _ in batches), pl_module.net),
        }
        for i in range(self.rounds + 1):
            for name, candidate in candidates.items():
                start = time.perf_counter()
                candidate()
                if i:  # the first warms up
                    self.times.setdefault(name, []).append(time.perf_counter() - start)
        trainer.should_stop = True


def report(rounds: int, image_size: int, batch_size: int, batches: int) -> str:
    data = TensorDataset(
        torch.randn(batch_size * batches, 3, image_size, image_size),
        torch.zeros(batch_size * batches, dtype=torch.long),
    )
    measure = Measure(rounds)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[measure],
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(data, batch_size=batch_size, shuffle=True))
    bare = measure.times["bare forward passes, data at hand"]
    lines = ["| | x bare | seconds |", "|---|---|---|"]
    for name, seconds in measure.times.items():
        ratio = statistics.median(
            s / b for s, b in zip(seconds, bare, strict=True)
        )  # within one round, since the machine does other work too
        lines.append(f"| {name} | {ratio:.3f} | {statistics.median(seconds):.2f} |")
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return "\n".join(
        [
            "# Re-estimating the BatchNorm statistics of a ResNet-50 on the CPU",
            "",
            *lines,
            "",
            f"{batches} batches of {batch_size} images of {image_size} x {image_size}. PreciseBN: a fresh loader, "
            "isolated random state, batch hooks, sums in float64, and all states restored.",
            "",
            f"Medians over {rounds} rounds in which all candidates take turns, {torch.get_num_threads()} thread(s). "
            f"{model or platform.processor()}, {os.cpu_count()} cores shared with other work; Python "
            f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}, timm "
            f"{timm.__version__}; {datetime.date.today()}. `OMP_NUM_THREADS={torch.get_num_threads()} python "
            f"benchmarks/precise_bn.py --rounds {rounds}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = report(arguments.rounds, arguments.image_size, arguments.batch_size, arguments.batches)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
