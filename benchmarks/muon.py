"""Accuracy and CPU time of SGD with and without Muon, in runs of several lengths.

    OMP_NUM_THREADS=1 python benchmarks/muon.py --cifar FOLDER/cifar10 --out benchmarks/results/muon.md

``lookahead.py`` has the network, the images and the pairing. Both arms have four trials of their learning rate in the
shortest run, on training images that the final runs leave out. The test images are used once.
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
from lightning.pytorch import Callback, Trainer
from lookahead import Small, images, interval

from lit_tricks.callbacks import Muon, WarmupCosine
from lit_tricks.callbacks.muon import matrices_in, orthogonal_updates

RATES = {"SGD": (0.1, 0.2, 0.4, 0.8), "SGD and Muon": (0.02, 0.05, 0.1, 0.2)}
LIMITS = (
    "The trials of Muon use the best learning rate of SGD for the other parameters. Momentum and weight decay are the "
    "defaults of both and were not tried. One seed chose the rates. The change is at equal epochs, not at equal cost."
)
HELD_OUT = 200  # training images of each class, for the trials


class Net(Small):
    """The network with a learning rate as argument."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train(arm: str, lrs: dict[str, float], epochs: int, seed: int, data: Any, test: Any) -> tuple[float, float]:
    """Return the accuracy in % after the last epoch, and the CPU seconds of the fit."""
    torch.manual_seed(seed)
    module = Net(lrs["SGD"])
    tricks: list[Callback] = [WarmupCosine(warmup_epochs=1)]
    if arm != "SGD":
        tricks.append(Muon(lr=lrs[arm]))
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=epochs, callbacks=tricks,
    )  # fmt: skip
    loaders = [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 128, shuffle=True, drop_last=True),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*test), 1000),
    ]
    start = time.process_time()
    trainer.fit(module, *loaders)
    found = module.top1, time.process_time() - start
    print(arm, lrs, epochs, seed, *(round(value, 2) for value in found), flush=True)
    return found


def tune(epochs: int, data: Any, held_out: Any) -> tuple[dict[str, float], list[str]]:
    """Return the best learning rate of each arm in the short run, and a line per trial."""
    best: dict[str, float] = {}
    lines = []
    for arm, rates in RATES.items():
        scores = {lr: train(arm, best | {arm: lr}, epochs, 100, data, held_out)[0] for lr in rates}
        best[arm] = max(scores, key=scores.__getitem__)
        lines += [f"{arm} {lr:g}: {score:.2f}" for lr, score in scores.items()]
    return best, lines


def at_ends(best: dict[str, float]) -> str:
    """Return which arms were best at an end of their grid."""
    found = [arm for arm, lr in best.items() if lr in (min(RATES[arm]), max(RATES[arm]))]
    if not found:
        return "No best trial is at an end of its grid."
    return f"The best trial of {' and of '.join(found)} is at an end of its grid, so a rate beyond may be better still."


def cost() -> str:
    """Return the time of an update of ResNet-50 as a share of its step, without the step of the other parameters."""
    net = timm.create_model("resnet50").to(memory_format=torch.channels_last)
    groups = matrices_in(net)
    weights = [parameter for parameter in net.parameters() if id(parameter) in groups]
    momenta = [torch.randn_like(weight) for weight in weights]
    batch = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)
    updates, passes = [], []
    for _ in range(3):
        start = time.process_time()
        with torch.no_grad():
            orthogonal_updates(weights, momenta, [groups[id(weight)] for weight in weights])
        updates.append(time.process_time() - start)
        start = time.process_time()
        net(batch).sum().backward()
        passes.append((time.process_time() - start) / len(batch))
    shares = {count: min(updates) / (min(passes) * count) for count in (32, 256)}
    shown = " and ".join(f"{share:.1%} of a step with {count} images" for count, share in shares.items())
    return f"The update of a ResNet-50 takes {min(updates):.2f} s of CPU time (fp32), at 224 pixels {shown}."


def report(cifar: Path, per_class: int, size: int, lengths: list[int], seeds: int) -> str:
    """Return the table."""
    every, labels = images(cifar / "train", per_class + HELD_OUT, size)
    kept = torch.arange(len(labels)) % (per_class + HELD_OUT) < per_class
    data, held_out = (every[kept], labels[kept]), (every[~kept], labels[~kept])
    test = images(cifar / "val", 500, size)
    best, trials = tune(lengths[0], data, held_out)
    lines = [
        "# Muon on small images",
        "",
        "| epochs | optimizer | top-1 in % (higher is better) | change in points, paired, with 95 % interval | CPU "
        "seconds per run |",
        "|---|---|---|---|---|",
    ]
    for epochs in lengths:
        found = {arm: [train(arm, best, epochs, seed, data, test) for seed in range(seeds)] for arm in RATES}
        for arm, runs in found.items():
            change = "-" if arm == "SGD" else interval([b[0] - a[0] for a, b in zip(found["SGD"], runs, strict=True)])
            top1, seconds = (statistics.mean(column) for column in zip(*runs, strict=True))
            lines.append(f"| {epochs} | {arm}, lr {best[arm]:g} | {top1:.2f} | {change} | {seconds:.0f} |")
    return "\n".join(
        [
            *lines,
            "",
            at_ends(best),
            "",
            LIMITS,
            "",
            cost(),
            "",
            f"Trials at {lengths[0]} epochs, accuracy in % on {len(held_out[1])} other training images: "
            f"{', '.join(trials)}.",
            "",
            f"CIFAR-10, {10 * per_class} training and {len(test[1])} test images at {size} x {size}, ResNet-18-D "
            f"at an eighth of its width, batch size 128, {seeds} seeds. {torch.get_num_threads()} thread(s), "
            f"{os.cpu_count()} cores shared with other work; Python {platform.python_version()}, torch "
            f"{torch.__version__}, lightning {lightning.__version__}; {datetime.date.today()}. "
            f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/muon.py --cifar FOLDER/cifar10 --per-class "
            f"{per_class} --size {size} --epochs {' '.join(map(str, lengths))} --seeds {seeds}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=1000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[6, 24], help="of the runs; the first is for the trials"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = report(arguments.cifar, arguments.per_class, arguments.size, arguments.epochs, arguments.seeds)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
