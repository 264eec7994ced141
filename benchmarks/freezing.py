"""Measure what Freeze saves in a training step of a ResNet-50: time, and memory of activations for the backward pass.

    OMP_NUM_THREADS=1 python benchmarks/freezing.py --out benchmarks/results/freezing.md

The candidates take turns, step by step, in one process. The table has medians of CPU time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_tricks.callbacks import Freeze

FROZEN: dict[str, list[str]] = {
    "nothing": [],
    "conv1, bn1, layer1": ["conv1", "bn1", "layer1"],
    "conv1 to layer2": ["conv1", "bn1", "layer[12]"],
    "conv1 to layer3": ["conv1", "bn1", "layer[123]"],
    "backbone": ["backbone"],
}


class Classifier(LightningModule):
    """A ResNet-50 that counts the bytes that the forward pass saves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet50")
        self.saved = 0

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        weights = {parameter.data_ptr() for parameter in self.parameters()}
        seen: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.saved = sum(seen.values())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class StepTime(Callback):
    """CPU time of each step after the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def measure(parts: list[str], size: int, batch_size: int, steps: int) -> tuple[float, float]:
    """Return the median seconds of a step, and the mebibytes that it saves for the backward pass."""
    torch.manual_seed(0)
    module, clock = Classifier(), StepTime()
    count = batch_size * (steps + 1)
    data = torch.utils.data.TensorDataset(torch.randn(count, 3, size, size), torch.arange(count) % 1000)
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*([Freeze(parts)] if parts else []), clock],
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=batch_size))  # fmt: skip
    return statistics.median(clock.seconds[1:]), module.saved / 2**20


def report(size: int, batch_size: int, steps: int, rounds: int) -> str:
    """Return the table."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in FROZEN}
    for _ in range(rounds):
        for name, parts in FROZEN.items():
            found[name].append(measure(parts, size, batch_size, steps))
    times = {name: statistics.median(seconds for seconds, _ in each) for name, each in found.items()}
    lines = [
        "# What Freeze saves in a training step of a ResNet-50",
        "",
        "| frozen | step in s (lower is better) | share of the step | saved activations in MiB (lower is better) |",
        "|---|---|---|---|",
        *(
            f"| {name} | {times[name]:.2f} | {times[name] / times['nothing']:.0%} | {found[name][0][1]:.0f} |"
            for name in FROZEN
        ),
        "",
        f"CPU time, batch of {batch_size} at {size} x {size}, medians of {rounds} rounds of {steps} steps, "
        f"{torch.get_num_threads()} thread(s), {os.cpu_count()} cores shared with other work; Python "
        f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}, timm "
        f"{timm.__version__}; {datetime.date.today()}. `OMP_NUM_THREADS={torch.get_num_threads()} python "
        f"benchmarks/freezing.py --image-size {size} --batch-size {batch_size} --steps {steps} --rounds {rounds}`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = report(arguments.image_size, arguments.batch_size, arguments.steps, arguments.rounds)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
