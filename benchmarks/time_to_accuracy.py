"""Seconds, and CPU seconds, until the mean accuracy over seeds reaches a target on CIFAR-10.

    python benchmarks/time_to_accuracy.py --data FOLDER/cifar10 --out benchmarks/results --seeds 5 --threads 2

Images are JPEG files, train/CLASS/*.jpg and val/CLASS/*.jpg in a folder or tar file. The arms are recipes/cifar10_fast,
the module of Lightning's CIFAR-10 tutorial, the same module with callbacks of this library, and the recipes of the
training scripts of timm and torchvision for the tutorial's network. Every arm except the unchanged tutorial has three
trials of its learning rates, on training images that the trials leave out. Validations while a run trains are not
counted. Finished runs are lines of OUT/time_to_accuracy.jsonl, and the command continues when you repeat it.

--scale small trains on 10,000 images of 16 x 16 pixels, with lower targets, for two CPU cores. On a GPU, compare with
the script of airbench in the same session:

    git clone https://github.com/KellerJordan/cifar10-airbench && python cifar10-airbench/airbench94_muon.py
    python benchmarks/time_to_accuracy.py --data FOLDER/cifar10 --out OUT --device cuda --arms recipe --every 10
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
import torchvision
import yaml
from _processes import context
from evidence_data import Arrays, Images, load
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from peers_runs import ExponentialMovingAverage
from torch import Tensor, nn
from torchvision.transforms import v2

from lit_tricks import Classifier, callbacks
from lit_tricks.utils.config_files import CONFIGS

ARMS = ("recipe", "tutorial", "tutorial_tricks", "timm", "torchvision")
NAMES = {
    "recipe": "`recipes/cifar10_fast`",
    "tutorial": "Lightning's tutorial, unchanged",
    "tutorial_tricks": "the tutorial's module with callbacks of lit_tricks",
    "timm": "timm's training script",
    "torchvision": "torchvision's training script",
}
FACTORS = (0.5, 1.0, 2.0)  # on the learning rates, in the trials
TRIAL_SEED = 100
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Scale:
    """The size of all runs.

    Args:
        images: training images.
        size: side of the images in pixels.
        epochs: of all arms except the recipe, which has its own number.
        held_out: training images that the trials score, and do not train on.
        targets: accuracies in %.
    """

    images: int
    size: int
    epochs: int
    held_out: int
    targets: tuple[int, ...]


SCALES = {
    "full": Scale(50_000, 32, 30, 5000, (90, 92, 94)),
    "small": Scale(10_000, 16, 15, 2000, (50, 55, 60)),
}


@dataclass(frozen=True)
class Cell:
    """One run: its arm, its seed, the factor on its learning rates, and whether it is a trial."""

    arm: str
    seed: int
    factor: float
    trial: bool


class Clock(Callback):
    """Notes time and accuracy at each validation. The validations are not counted."""

    def __init__(self, accuracy: str) -> None:
        self.accuracy = accuracy
        self.points: list[dict[str, float]] = []
        self.spent = np.zeros(2)

    def start(self) -> None:
        """Start, or continue after a validation."""
        self.began = now()

    def note(self, epoch: int, top1: float) -> None:
        """Note a point."""
        seconds, cpu = (float(value) for value in self.spent)
        self.points.append({"epoch": epoch, "seconds": seconds, "cpu_seconds": cpu, "top1": 100 * top1})

    def stop(self) -> None:
        """Stop before a validation."""
        self.spent += now() - self.began

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy, and continue."""
        self.note(trainer.current_epoch + 1, float(trainer.callback_metrics[self.accuracy]))
        self.start()


def now() -> np.ndarray:
    """Return the time and the CPU time of this process, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


# Data


class Photos(torch.utils.data.Dataset[Any]):
    """Images with a transform of torchvision, as the tutorial has them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(torch.from_numpy(self.images[index])), int(self.labels[index])


def tutorial_loaders(data: Arrays, workers: int) -> list[Any]:
    """Return the loaders of the tutorial: batches of 256, random crop of padded images, and flip."""
    size = data["train_x"].shape[-1]
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = v2.Compose([v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip(), *end])
    make: Any = partial(torch.utils.data.DataLoader, batch_size=256, num_workers=workers)
    return [
        make(Photos(data["train_x"], data["train_y"], train), shuffle=True),
        make(Photos(data["val_x"], data["val_y"], v2.Compose(end))),
    ]


def prepared(data: Arrays, scale: Scale, trial: bool) -> Arrays:
    """Return the images of a run: some of each class, resized; for a trial, other training images to validate on."""
    kept = {}
    for part, most in (("train", scale.images), ("val", len(data["val_y"]))):
        chosen = np.arange(len(data[f"{part}_y"]))[:: max(1, len(data[f"{part}_y"]) // most)]
        images = torch.from_numpy(data[f"{part}_x"][chosen])
        if images.shape[-1] != scale.size:
            small = F.interpolate(images.float(), (scale.size, scale.size), mode="area")
            images = small.round().to(torch.uint8)
        kept |= {f"{part}_x": images.numpy(), f"{part}_y": data[f"{part}_y"][chosen]}
    if trial:
        is_held = np.arange(len(kept["train_y"])) % (len(kept["train_y"]) // scale.held_out) == 0
        train, labels = kept["train_x"], kept["train_y"]
        kept = {
            "val_x": train[is_held],
            "val_y": labels[is_held],
            "train_x": train[~is_held],
            "train_y": labels[~is_held],
        }
    return kept


# The arms with a Trainer


def recipe(cell: Cell, data: Arrays, scale: Scale, device: str, every: int) -> list[dict[str, float]]:
    """Train by the configuration, as ``lit-tricks fit`` does."""
    config = yaml.safe_load((CONFIGS / "recipes" / "cifar10_fast.yaml").read_text())
    model, options = config["model"]["init_args"], config["trainer"]
    optimizer = model.pop("optimizer")
    package, _, name = optimizer["class_path"].rpartition(".")
    optimizer["init_args"]["lr"] *= cell.factor
    make = partial(getattr(importlib.import_module(package), name), **optimizer["init_args"])
    tricks: list[Callback] = []
    for trick in options.pop("callbacks"):
        arguments = trick.get("init_args", {})
        if trick["class_path"] == "Muon":
            arguments["lr"] *= cell.factor
        tricks.append(getattr(callbacks, trick["class_path"])(**arguments))
    arguments = {k: v for k, v in config["data"]["init_args"].items() if k not in ("root", "val_size")}
    if scale.size < 32:
        arguments["translate"] = 1
    seed_everything(cell.seed, verbose=False)
    datamodule = Images.of(data, split_seed=cell.seed, **arguments)
    module = Classifier(**model, num_classes=10, input_size=(3, scale.size, scale.size), optimizer=make)
    if device == "cuda":
        options["precision"] = "16-mixed"
    epochs = options.pop("max_epochs")
    del options["check_val_every_n_epoch"]
    return fitted(module, tricks, epochs, every, device, "val/top1", options, datamodule=datamodule)


def fitted(
    module: LightningModule, tricks: list[Callback], epochs: int, every: int, device: str, accuracy: str,
    options: dict[str, Any], *loaders: Any, **datamodule: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """Fit, and return the points of time and accuracy."""
    clock = Clock(accuracy)
    options = {"devices": 1, "num_sanity_val_steps": 0, **options}
    clock.start()
    trainer = Trainer(
        max_epochs=epochs, accelerator="gpu" if device == "cuda" else "cpu", callbacks=[*tricks, clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        check_val_every_n_epoch=min(every, epochs), log_every_n_steps=10**6, **options,
    )  # fmt: skip
    trainer.fit(module, *loaders, **datamodule)
    return clock.points


def network() -> nn.Module:
    """Return the tutorial's network: torchvision's ResNet-18 with a stem for small images."""
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


class Tutorial(LightningModule):
    """The module of Lightning's tutorial: cross entropy as log-probabilities and their loss, SGD and OneCycleLR."""

    def __init__(self, lr: float, steps_per_epoch: int, max_lr: float = 0.1) -> None:
        super().__init__()
        self.model = network()
        self.lr, self.max_lr, self.steps_per_epoch = lr, max_lr, steps_per_epoch

    def forward(self, images: Tensor) -> Tensor:
        return F.log_softmax(self.model(images), dim=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.nll_loss(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        right = (self(images).argmax(1) == labels).float().mean()
        self.log("val_acc", right, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.max_lr, epochs=self.trainer.max_epochs, steps_per_epoch=self.steps_per_epoch
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def tutorial(
    cell: Cell, data: Arrays, scale: Scale, device: str, every: int, tricks: bool = False
) -> list[dict[str, float]]:
    """Train the tutorial's module with its own loaders, in 32 bits, or with callbacks in bf16."""
    seed_everything(cell.seed, verbose=False)
    train, val = tutorial_loaders(data, max(0, torch.get_num_threads() // 2))
    module = Tutorial(0.05 * cell.factor, len(train), 0.1 * cell.factor)
    chosen: list[Callback] = []
    if tricks:
        chosen = [
            callbacks.NoBiasDecay(), callbacks.LabelSmoothing(smoothing=0.1), callbacks.ChannelsLast(),
            callbacks.EMA(half_life=0.5), callbacks.TestTimeAugment(flip=True),
        ]  # fmt: skip
    options = {"precision": "bf16-mixed"} if tricks else {}
    return fitted(module, chosen, scale.epochs, every, device, "val_acc", options, train, val)


# The training scripts, as loops


def loop(
    cell: Cell, data: Arrays, scale: Scale, device: str, every: int,
    make: Callable[[nn.Module, int], tuple[Any, Callable[[int, bool], None], nn.Module]],
) -> list[dict[str, float]]:  # fmt: skip
    """Train in batches of 128 with label smoothing 0.1, bf16, shifts and flips.

    Args:
        cell: the run.
        data: images.
        scale: size of the run.
        device: "cpu" or "cuda".
        every: epochs between two validations.
        make: function from the network and the steps of an epoch to an optimizer, a function that is called after each
            step with the number of finished steps and whether the epoch ends, and the averaged network.
    """
    seed_everything(cell.seed, verbose=False)
    clock = Clock("")
    clock.start()
    datamodule = Images.of(data, batch_size=128, split_seed=cell.seed, images_on="host", num_workers=0)
    datamodule.setup("fit")
    train, val = datamodule.train_dataloader(), datamodule.val_dataloader()
    net = network().to(device, memory_format=torch.channels_last)
    optimizer, after_step, average = make(net, len(train))
    steps = 0
    for epoch in range(scale.epochs):
        train.sampler.set_epoch(epoch)  # otherwise each epoch has the crops and the order of the first
        net.train()
        for index, (images, labels) in enumerate(train):
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(net(images), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            after_step(steps, index + 1 == len(train))
        if (epoch + 1) % every == 0 or epoch + 1 == scale.epochs:
            clock.stop()
            clock.note(epoch + 1, accuracy(average, val, device))
            clock.start()
    return clock.points


@torch.no_grad()
def accuracy(net: nn.Module, val: Any, device: str) -> float:
    """Return the accuracy as a fraction."""
    net.eval()
    right = total = 0
    for images, labels in val:
        with torch.autocast(device, torch.bfloat16):
            right += int((net(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return right / total


def timm_script(cell: Cell, data: Arrays, scale: Scale, device: str, every: int) -> list[dict[str, float]]:
    """timm's train.py: `--opt sgd --lr 0.1 --weight-decay 5e-4 --sched cosine --sched-on-updates --warmup-epochs 2
    --smoothing 0.1 --model-ema --model-ema-warmup --amp --amp-dtype bfloat16 --channels-last`, in batches of 128."""

    def make(net: nn.Module, updates: int) -> Any:
        lr = 0.1 * cell.factor
        optimizer = timm.optim.create_optimizer_v2(net, opt="sgd", lr=lr, weight_decay=5e-4, momentum=0.9)
        scheduler = timm.scheduler.CosineLRScheduler(
            optimizer, scale.epochs * updates, warmup_t=2 * updates, warmup_lr_init=1e-5, t_in_epochs=False
        )
        ema = timm.utils.ModelEmaV3(net, decay=0.5 ** (2 / updates), use_warmup=True)

        def after_step(steps: int, ends: bool) -> None:
            ema.update(net, step=steps)
            scheduler.step_update(num_updates=steps)

        scheduler.step_update(num_updates=0)
        return optimizer, after_step, ema.module

    return loop(cell, data, scale, device, every, make)


def torchvision_script(cell: Cell, data: Arrays, scale: Scale, device: str, every: int) -> list[dict[str, float]]:
    """torchvision's references/classification/train.py: `--lr 0.1 --weight-decay 5e-4 --norm-weight-decay 0.0
    --lr-scheduler cosineannealinglr --lr-warmup-method linear --lr-warmup-epochs 2 --lr-warmup-decay 0.01
    --label-smoothing 0.1 --model-ema --amp`, in batches of 128."""

    def make(net: nn.Module, updates: int) -> Any:
        norms = {p for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)}
        groups = [
            {"params": [p for p in net.parameters() if p not in norms], "weight_decay": 5e-4},
            {"params": list(norms), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, 0.1 * cell.factor, 0.9)
        lr = torch.optim.lr_scheduler
        scheduler = lr.SequentialLR(
            optimizer,
            [
                lr.LinearLR(optimizer, start_factor=0.01, total_iters=2),
                lr.CosineAnnealingLR(optimizer, T_max=scale.epochs - 2, eta_min=0.0),
            ],
            milestones=[2],
        )
        every_steps = min(32, updates)
        ema = ExponentialMovingAverage(net, decay=0.5 ** (2 * every_steps / updates))

        def after_step(steps: int, ends: bool) -> None:
            if steps % every_steps == 0:
                ema.update_parameters(net)
                if steps < 2 * updates:
                    ema.n_averaged.fill_(0)  # copies the weights, until the warm-up is over
            if ends:
                scheduler.step()

        return optimizer, after_step, ema

    return loop(cell, data, scale, device, every, make)


RUN: dict[str, Callable[..., list[dict[str, float]]]] = {
    "recipe": recipe,
    "tutorial": tutorial,
    "tutorial_tricks": partial(tutorial, tricks=True),
    "timm": timm_script,
    "torchvision": torchvision_script,
}


# The grid


def work(cell: Cell, data: Arrays, args: argparse.Namespace, out: Path) -> None:
    """Make one run in a separate process, and write its line to a file."""
    warnings.simplefilter("ignore")  # advice about workers and logging
    torch.set_num_threads(args.threads)
    scale = SCALES[args.scale]
    points = RUN[cell.arm](cell, prepared(data, scale, cell.trial), scale, args.device, args.every)
    line = {**vars(cell), "scale": args.scale, "device": args.device, "threads": args.threads, "points": points}
    out.write_text(json.dumps(line))


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a run."""
    names = ("arm", "seed", "factor", "trial", "scale", "device", "threads")
    return tuple(line[name] for name in names)


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of this scale, device and number of threads."""
    file = args.out / "time_to_accuracy.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if key_of(line)[-3:] == (args.scale, args.device, args.threads)]


def best_factor(arm: str, lines: list[dict[str, Any]]) -> float | None:
    """Return the factor of the best trial of an arm; None before all trials are done."""
    if arm == "tutorial":
        return 1.0
    scores = {line["factor"]: line["points"][-1]["top1"] for line in lines if line["arm"] == arm and line["trial"]}
    return max(scores, key=scores.__getitem__) if scores.keys() >= set(FACTORS) else None


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield runs that are to be done: trials first, then seed by seed."""
    for arm, factor in itertools.product(args.arms, FACTORS):
        if arm != "tutorial" and not args.untuned:
            yield Cell(arm, TRIAL_SEED, factor, True)
    for seed, arm in itertools.product(range(args.seeds), args.arms):
        found = 1.0 if args.untuned else best_factor(arm, finished(args))
        if found is not None:
            yield Cell(arm, seed, found, False)


def grid(args: argparse.Namespace) -> None:
    """Make the runs one after another, each in its own process."""
    data, processes = load(args.data, args.cache), context(args.device)
    for cell in cells(args):
        if key_of({**vars(cell), "scale": args.scale, "device": args.device, "threads": args.threads}) in map(
            key_of, finished(args)
        ):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "line.json"
            process = processes.Process(target=work, args=(cell, data, args, file))
            process.start()
            process.join()
            if process.exitcode or not file.exists():
                sys.exit(f"{cell} failed")
            with (args.out / "time_to_accuracy.jsonl").open("a") as lines:
                lines.write(file.read_text() + "\n")
        last = finished(args)[-1]["points"][-1]
        print(cell, {name: round(value, 2) for name, value in last.items()}, flush=True)


# The table


def reached(lines: list[dict[str, Any]], target: float) -> str:
    """Return the mean seconds and CPU seconds at the first epoch whose mean accuracy reaches a target."""
    for points in zip(*(line["points"] for line in lines), strict=True):
        if statistics.mean(point["top1"] for point in points) >= target:
            seconds, cpu = (statistics.mean(point[name] for point in points) for name in ("seconds", "cpu_seconds"))
            return f"{seconds:.0f} ({cpu:.0f})"
    return "-"


def report(args: argparse.Namespace) -> str:
    """Return the table in Markdown."""
    scale, lines = SCALES[args.scale], finished(args)
    head = [f"{target} %" for target in scale.targets]
    rows = [
        "# Time to accuracy",
        "",
        "Seconds until the mean top-1 over seeds reaches a target, and in brackets CPU seconds (lower is better).",
        "",
        f"| arm | seeds | {' | '.join(head)} | top-1 at the end (higher is better) | seconds of the run |",
        "|" + "---|" * (len(head) + 4),
    ]
    for arm in args.arms:
        runs = [line for line in lines if line["arm"] == arm and not line["trial"] and line["seed"] < args.seeds]
        if not runs:
            continue
        ends = [line["points"][-1] for line in runs]
        top1 = statistics.mean(end["top1"] for end in ends)
        seconds = statistics.mean(end["seconds"] for end in ends)
        found = " | ".join(reached(runs, target) for target in scale.targets)
        rows.append(
            f"| {NAMES[arm]}, rates x {runs[0]['factor']:g} | {len(runs)} | {found} | {top1:.2f} | {seconds:.0f} |"
        )
    trials = [
        f"{line['arm']} x {line['factor']:g}: {line['points'][-1]['top1']:.2f}" for line in lines if line["trial"]
    ]
    return "\n".join(
        [
            *rows,
            "",
            f"Tuning: {len(FACTORS)} trials of the learning rates per arm except the unchanged tutorial, accuracy in % "
            f"on {scale.held_out} training images that were left out: {', '.join(trials) or 'none'}.",
            "",
            "The images are JPEG files of CIFAR-10, so figures differ a little from the usual ones. Validations while "
            "a run trains are not counted. The loops of timm and torchvision have the data pipeline of lit_tricks.",
            "",
            f"{scale.images} training images of {scale.size} pixels. {processor()}, {os.cpu_count()} cores, "
            f"{args.threads} threads, device {args.device}; Python {platform.python_version()}, torch "
            f"{torch.__version__}, lightning {lightning.__version__}, timm {timm.__version__}; "
            f"{datetime.date.today()}. `python benchmarks/time_to_accuracy.py {shown(args)}`.",
            "",
        ]
    )


def processor() -> str:
    """Return the name of the GPU, or of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in file.read_text().splitlines() if "model name" in line]
        if file.exists()
        else []
    )
    return names[0] if names else platform.processor()


def shown(args: argparse.Namespace) -> str:
    """Return the options, without paths of this machine."""
    words = ["--data", "FOLDER/cifar10", "--out", "OUT", "--arms", *args.arms, "--seeds", str(args.seeds)]
    words += [
        "--threads",
        str(args.threads),
        "--device",
        args.device,
        "--scale",
        args.scale,
        "--every",
        str(args.every),
    ]
    return shlex.join([*words, *(["--untuned"] if args.untuned else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or tar file of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the lines and the table")
    parser.add_argument("--cache", type=Path, help="file of decoded images; by default in the temporary folder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full")
    parser.add_argument("--every", type=int, default=1, help="epochs between two validations")
    parser.add_argument("--untuned", action="store_true", help="no trials, and the published learning rates")
    parser.add_argument("--report", action="store_true", help="write only the table of the finished runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache = args.cache or Path(tempfile.gettempdir()) / "time_to_accuracy_cifar10.npz"
    if not args.report:
        grid(args)
    text = report(args)
    (args.out / "time_to_accuracy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
