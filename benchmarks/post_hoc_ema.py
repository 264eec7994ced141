"""Measure power-law averages: error on held-out digits by their length, and cost and disk use for a ResNet-50.

    OMP_NUM_THREADS=1 python benchmarks/post_hoc_ema.py --out benchmarks/results/post_hoc_ema.md

Each network is trained once. Averages of other lengths are mixed from the snapshots of ``EMA(power=[0.05, 0.2])``, and
the best one is chosen on validation images. Errors are of test images, which choose nothing.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from ema_warmup import network
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks import EMA, PreciseBN
from lit_tricks.callbacks.averaging.snapshots import Snapshot, read_snapshot, snapshots_in, write_snapshot
from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.commands import average

LENGTHS = (0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25)
SCHEDULES = {"constant": lambda share: 1.0, "linear to 0": lambda share: 1 - share}
T95 = {2: 4.303, 4: 2.776, 7: 2.365, 9: 2.262}  # by degrees of freedom


class Digits(LightningDataModule):
    """600 images to train on, 400 to choose by, 797 to test."""

    def __init__(self) -> None:
        super().__init__()
        digits = load_digits()
        image = torch.tensor(digits.images[:, None], dtype=torch.float32) / 16
        order = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))
        self.parts = TensorDataset(image[order], torch.tensor(digits.target)[order])

    def loader(self, first: int, last: int, **how: Any) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.Subset(self.parts, range(first, last)), **how)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0, 600, batch_size=32, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(600, 1000, batch_size=400)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(1000, len(self.parts), batch_size=1000)


class Module(LightningModule):
    def __init__(self, schedule: str = "constant", steps: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = network()

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        image, label = batch
        return F.cross_entropy(self.net(image + 0.3 * torch.randn_like(image)), label)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("error", 100 * (logits.argmax(1) != batch[1]).float().mean())
        self.log("loss", F.cross_entropy(logits, batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        change = SCHEDULES[self.hparams["schedule"]]
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: change(step / self.hparams["steps"]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def trainer(folder: str, **how: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **quiet, **how)


def test_error(module: Module, folder: str) -> float:
    [found] = trainer(folder, enable_checkpointing=False).test(module, datamodule=Digits(), verbose=False)
    return float(found["error"])


def run(seed: int, schedule: str, steps: int) -> dict[str, float]:
    """Return the test error of each average, of the weights without an average, and of the choice on validation."""
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(f"{folder}/checkpoints", "last")
        tricks = [EMA(power=[0.05, 0.2]), PreciseBN(num_samples=600), saver]
        lightning.seed_everything(seed, verbose=False)
        module = Module(schedule, steps)
        found = {}
        fit = trainer(folder, max_steps=steps, callbacks=tricks, limit_val_batches=0)
        fit.fit(module, datamodule=Digits())
        content = torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True)
        plain = Module(schedule, steps)
        plain.load_state_dict(content["state_dict"] | content["callbacks"]["EMA"]["raw"])
        found["no average"] = test_error(plain, folder)
        validated = {}
        for length in LENGTHS:
            path = average(
                [f"{folder}/checkpoints/last.ckpt"], f"{folder}/{length}.ckpt", ema_length=str(length), data=Digits(),
                module=Module(schedule, steps), metric="loss", num_samples=600,
            )  # fmt: skip
            rows = path.with_suffix(".csv").read_text().splitlines()
            validated[length] = float(rows[1].split(",")[1])
            mixed = Module(schedule, steps)
            mixed.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            found[f"length {length:g}"] = test_error(mixed, folder)
        best = min(validated, key=lambda length: validated[length])
        return found | {"chosen": found[f"length {best:g}"], "best": best}


def accuracy(seeds: int, all_steps: list[int]) -> list[str]:
    columns = ["no average", *(f"length {length:g}" for length in LENGTHS), "chosen"]
    rows = [f"| learning rate | steps | {' | '.join(columns)} | change from no average | lengths chosen |"]
    rows.append("|" + "---|" * (len(columns) + 4))
    for schedule in SCHEDULES:
        for steps in all_steps:
            runs = [run(seed, schedule, steps) for seed in range(seeds)]
            means = [f"{statistics.mean(each[column] for each in runs):.2f}" for column in columns]
            changes = [each["chosen"] - each["no average"] for each in runs]
            half = T95[seeds - 1] * statistics.stdev(changes) / seeds**0.5
            chosen = ", ".join(f"{each['best']:g}" for each in runs)
            change = f"{statistics.mean(changes):+.2f} ± {half:.2f}"
            rows.append(f"| {schedule} | {steps} | {' | '.join(means)} | {change} | {chosen} |")
            print(rows[-1], flush=True)
    return rows


def seconds(function: Any, times: int) -> float:
    """Return the median CPU time of a call."""
    found = []
    for _ in range(times):
        start = time.process_time()
        function()
        found.append(time.process_time() - start)
    return statistics.median(found)


def cost() -> list[str]:
    """Return the cost for a ResNet-50 at batch size 32 and 224 pixels, as shares of a training step."""
    net: nn.Module = timm.create_model("resnet50")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    image, label = torch.randn(32, 3, 224, 224), torch.randint(1000, (32,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(image), label).backward()
        optimizer.step()

    step()
    whole = seconds(step, 3)
    first, second = AveragedWeights(net), AveragedWeights(net)
    update = seconds(lambda: (first.update(0.01), second.update(0.01)), 20)
    with tempfile.TemporaryDirectory() as folder:
        snapshot = Snapshot(1, [0.05, 0.2], [first.whole(), second.whole()])
        writing = seconds(lambda: write_snapshot(Path(folder), snapshot), 3)
        [file] = snapshots_in(Path(folder)).values()
        reading, size = seconds(lambda: read_snapshot(file), 3), file.stat().st_size / 1e6
    return [
        "| work, ResNet-50 | CPU time | share of a step |",
        "|---|---|---|",
        f"| training step, 32 images of 224 pixels | {whole:.2f} s | 100 % |",
        f"| update of both averages, per step | {update:.3f} s | {100 * update / whole:.2f} % |",
        f"| writing a snapshot, {size:.0f} MB, 17 times per run | {writing:.2f} s | {100 * writing / whole:.0f} % |",
        f"| reading a snapshot, for each length | {reading:.2f} s | - |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=5, choices=[each + 1 for each in T95])
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 1000])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start = time.process_time()
    lines = [
        "# Power-law averages of any length",
        "",
        "Test error in % (lower is better) by the length of the average:",
        "",
    ]
    lines += accuracy(args.seeds, args.steps)
    lines += ["", *cost(), ""]
    lines.append(
        "The digits of scikit-learn: 600 training images with noise, 400 validation images, 797 test images; a network "
        f"of three convolutions with BatchNorm, batch size 32, SGD with a learning rate of 0.1, {args.seeds} seeds. "
        'Statistics of BatchNorm are re-estimated. "Chosen" has the lowest validation loss. The change is paired by '
        f"seed, with the 95 % interval. {time.process_time() - start:.0f} s of CPU time, 1 thread; Python "
        f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}. "
        f"`OMP_NUM_THREADS=1 python benchmarks/post_hoc_ema.py --seeds {args.seeds}`."
    )
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
