"""FixRes, as a callback and in one pass, on CIFAR-10: accuracy and cost per test size.

    python benchmarks/fixres.py --root FOLDER --jobs 8 --out benchmarks/results/fixres.md

FOLDER has train/CLASS/*.jpg and val/CLASS/*.jpg. The networks are trained at 24 pixels with RandomResizedCrop. All
images are in memory and are transformed in batches on the device, so that most time is spent in the network.
Finished runs are kept in --work. Repeat the command to continue an interrupted run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lit_tricks import Classifier, FixRes, WarmupCosine
from lit_tricks.commands import fixres

MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)
CROP_RATIO = 0.875
TRAIN_SIZE = 24


class Pixels(Dataset[Any]):
    """Images in memory, of which a whole batch is transformed at once."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Any) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(indices, device=self.images.device)
        return self.transform(self.images[index]), self.labels[index]


def random_resized_crop(images: Tensor, size: int) -> Tensor:
    """Crop per image 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, and flip at random."""
    n, device = len(images), images.device
    area = torch.empty(n, device=device).uniform_(0.08, 1)
    ratio = torch.empty(n, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = ((2 * torch.rand(n, device=device) - 1) * (1 - side) for side in (width, height))
    flip = 2.0 * torch.randint(2, (n,), device=device) - 1
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = width * flip, left, height, top
    grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
    crops = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return v2.functional.normalize(crops, MEAN, STD)


def resized(images: Tensor, size: int, resize_size: int) -> Tensor:
    images = v2.functional.resize(images, [resize_size, resize_size], antialias=True)
    return v2.functional.normalize(v2.functional.center_crop(images, [size, size]).float(), MEAN, STD)


def as_it_is(batch: Any) -> Any:
    return batch


class Memory(LightningDataModule):
    """Read CIFAR-10 from image files, once."""

    def __init__(
        self, root: str, work: str, batch_size: int = 128, eval_size: int = TRAIN_SIZE, limit: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.root, self.work, self.batch_size, self.limit = Path(root), Path(work), batch_size, limit
        self.eval_transform = self.eval_transform_at(eval_size)
        self.num_classes, self.input_size = 10, (3, TRAIN_SIZE, TRAIN_SIZE)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Any:
        return partial(resized, size=image_size, resize_size=round(image_size / (crop_ratio or CROP_RATIO)))

    def _pixels(self, split: str, transform: Any) -> Pixels:
        images, labels = read(self.root, split, self.work / f"{split}.npz")
        chosen = slice(0, self.limit)  # the images are shuffled
        return Pixels(images[chosen].to(self.device), labels[chosen].to(self.device), transform)

    def train_dataloader(self) -> Any:
        transform = partial(random_resized_crop, size=TRAIN_SIZE)
        return DataLoader(
            self._pixels("train", transform), self.batch_size, shuffle=True, drop_last=True, collate_fn=as_it_is
        )

    def val_dataloader(self) -> Any:
        return DataLoader(self._pixels("val", self.eval_transform), 1000, collate_fn=as_it_is)

    test_dataloader = val_dataloader


def read(root: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, 3, 32, 32) and labels in random order, and store them for the next run."""
    if not cache.is_file():
        files = ImageFolder(str(root / split))
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        images, labels = zip(*(files[i] for i in order), strict=True)
        part = cache.with_name(f".{cache.name}")
        np.savez(part.open("wb"), images=np.stack([np.asarray(image) for image in images]), labels=np.asarray(labels))
        part.replace(cache)
    found = np.load(cache)
    return torch.from_numpy(found["images"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(found["labels"])


def make_trainer(epochs: int = 1, *callbacks: Any) -> Trainer:
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
    )  # fmt: skip


def top1(checkpoint: Path, data: Memory) -> float:
    model = Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    [found] = make_trainer().test(model, data, verbose=False)
    return 100 * found["test/top1"]


# Tasks: each writes one file, and is skipped if the file exists


def base(path: Path, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train a network at 24 pixels."""
    seed_everything(seed, verbose=False)
    data = memory(arguments, batch_size=128)
    model = Classifier(
        "resnet", 10, {"depth": 18, "variant": "B", "small_input": True, "width": arguments.width},
        input_size=data.input_size,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    )  # fmt: skip
    fit = make_trainer(arguments.epochs, WarmupCosine(warmup_epochs=1))
    start = clock()
    fit.fit(model, data)
    seconds = clock() - start
    fit.save_checkpoint(path.with_suffix(".ckpt"), weights_only=True)
    return {"seconds": seconds}


def plain(path: Path, arguments: argparse.Namespace, seed: int, size: int) -> dict[str, float]:
    return {"top1": top1(arguments.work / f"base-{seed}.ckpt", memory(arguments, eval_size=size))}


def callback(path: Path, arguments: argparse.Namespace, seed: int, size: int) -> dict[str, float]:
    """Fine-tune with the callback."""
    seed_everything(seed, verbose=False)
    checkpoint = arguments.work / f"base-{seed}.ckpt"
    optimizer = partial(torch.optim.SGD, lr=arguments.tune_lr, momentum=0.9, weight_decay=1e-4)
    model = Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, optimizer=optimizer)
    tricks = [FixRes(size, lr=arguments.tune_lr), WarmupCosine(warmup_epochs=0)]
    data = memory(arguments, batch_size=256)
    fit = make_trainer(arguments.tune_epochs, *tricks)
    start = clock()
    fit.fit(model, data)
    seconds = clock() - start
    with tempfile.TemporaryDirectory() as folder:
        fit.save_checkpoint(Path(folder, "tuned.ckpt"), weights_only=True)
        return {"top1": top1(Path(folder, "tuned.ckpt"), memory(arguments, eval_size=size)), "seconds": seconds}


def command(path: Path, arguments: argparse.Namespace, seed: int, size: int) -> dict[str, float]:
    """Do the same in one pass."""
    output, checkpoint = path.with_suffix(".ckpt"), str(arguments.work / f"base-{seed}.ckpt")
    start = clock()
    fixres(
        ckpt=checkpoint,
        test_size=size,
        output=str(output),
        data=memory(arguments, batch_size=1000 if torch.cuda.is_available() else 256),
        overwrite=True,
    )
    seconds = clock() - start
    found = top1(output, memory(arguments, eval_size=size))
    output.unlink()
    return {"top1": found, "seconds": seconds}


TASKS: dict[str, Callable[..., dict[str, float]]] = {f.__name__: f for f in (base, plain, callback, command)}


def clock() -> float:
    """Return seconds. On the CPU: the CPU time of this process, which excludes other work of the machine."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def memory(arguments: argparse.Namespace, **kwargs: Any) -> Memory:
    return Memory(str(arguments.root), str(arguments.work), limit=arguments.limit, **kwargs)


def run(name: str, arguments: argparse.Namespace, *key: int) -> dict[str, float]:
    """Run a task unless its file exists."""
    path = arguments.work / f"{'-'.join([name, *map(str, key)])}.json"
    if not path.is_file():
        prepare()
        found = TASKS[name.removesuffix("_alone")](path, arguments, *key)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(path)
        print(path.stem, found, flush=True)
    return json.loads(path.read_text())


def prepare() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lit_tricks"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(max(1, torch.get_num_threads() // 4) if torch.cuda.is_available() else 1)


def run_all(arguments: argparse.Namespace) -> None:
    seeds, sizes = arguments.seeds, arguments.sizes
    rounds = [
        [("base", seed) for seed in seeds],
        [(name, seed, size) for name in ("callback", "command", "plain") for seed in seeds for size in sizes],
    ]
    for tasks in rounds:
        if arguments.jobs == 1:
            for name, *key in tasks:
                run(name, arguments, *key)
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            for future in [pool.submit(run, name, arguments, *key) for name, *key in tasks]:
                future.result()
    if torch.cuda.is_available():
        for name in ("callback_alone", "command_alone"):  # timed while nothing else runs
            run(name, arguments, seeds[0], arguments.timed_size)


# Report


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"


def report(arguments: argparse.Namespace) -> str:
    seeds = arguments.seeds
    lines = [
        "# FixRes on CIFAR-10: as a callback, and in one pass", "",
        "| test size | without | callback | one pass | one pass - callback | cost of one pass | cost of the callback |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for size in arguments.sizes:
        found = {
            name: [run(name, arguments, seed, size) for seed in seeds] for name in ("plain", "callback", "command")
        }
        scores = {name: [each["top1"] for each in runs] for name, runs in found.items()}
        pairs = [one - other for one, other in zip(scores["command"], scores["callback"], strict=True)]
        fast, slow = (statistics.fmean(each["seconds"] for each in found[name]) for name in ("command", "callback"))
        cells = [
            *map(spread, scores.values()),
            spread(pairs, "+"),
            f"{fast:.1f} s, 1/{slow / fast:.0f}",
            f"{slow:.0f} s",
        ]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    how = "of the CPU, one thread, means over the seeds"
    if torch.cuda.is_available():
        key = (seeds[0], arguments.timed_size)
        slow, fast = (run(f"{name}_alone", arguments, *key)["seconds"] for name in ("callback", "command"))
        how = (
            f"with {arguments.jobs} runs side by side; at {arguments.timed_size} pixels, one after the other: callback "
            f"{slow:.1f} s, one pass {fast:.1f} s, 1/{slow / fast:.0f}"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    images = f"{arguments.limit} images" if arguments.limit else "50,000 images"
    text = (
        f"Top-1 accuracy on the test images in %, mean ± standard deviation over {len(seeds)} seed(s). ResNet-18-B of "
        f"width {arguments.width:g}, trained for {arguments.epochs} epochs at {TRAIN_SIZE} pixels (RandomResizedCrop, "
        f"8 to 100 % of the area; {images}), tested with a center crop of {CROP_RATIO:.1%} of the side.",
        f"Callback: {arguments.tune_epochs} epochs, batches of 256, SGD, lr {arguments.tune_lr:g}, half a cosine. "
        f"Cost: seconds {how}.",
        f"{device}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}; {datetime.date.today()}.",
    )
    return "\n".join(lines) + "\n\n" + "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--tune-epochs", type=int, default=30)
    parser.add_argument("--tune-lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[24, 28, 32, 36, 40])
    parser.add_argument("--timed-size", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, help="training and test images, to try it out")
    parser.add_argument("--work", type=Path, default=Path("fixres-benchmark"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):  # once, before processes share it
        read(arguments.root, split, arguments.work / f"{split}.npz")
    run_all(arguments)
    text = report(arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
