"""Measure the cost of a batch of small images in memory: `python benchmarks/data.py small`.

All candidates take turns on the same 50,000 random images of 32 x 32 pixels, batch by batch, in one thread and without
workers: shift by 4 pixels, flip, normalize. Their content makes no difference to the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from timm.data import create_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from lit_tricks.data import CIFAR10
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.models import create_model

COUNT, SIDE, SHIFT = 50_000, 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 512


@dataclass(frozen=True)
class RandomImages:
    """Return random images."""

    def load(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        return images, torch.arange(COUNT) % 10

    def to_image(self, pixels: Tensor) -> Image.Image:
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class RandomCIFAR(CIFAR10):
    """Return the data module of the library with these images."""

    def _load(self, split: Any) -> Any:
        return {split: MemorySource(RandomImages())}


class ImageByImage(Dataset[tuple[Any, int]]):
    """The habit: a data set that gives an image, transformed by itself."""

    def __init__(self, images: Tensor, transform: Any, tensors: bool = False) -> None:
        self.images = images if tensors else images.permute(0, 2, 3, 1).numpy()
        self.transform, self.tensors = transform, tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index] if self.tensors else Image.fromarray(self.images[index])
        return self.transform(image), index % 10


def product(device: str = "cpu", images_on: Any = "auto") -> Any:
    data = RandomCIFAR(batch_size=BATCH, val_size=0, images_on=images_on)
    data.trainer = Trainer(accelerator=device, devices=1, logger=False, enable_checkpointing=False)
    return data.train_dataloader()


def padded_buffer(images: Tensor) -> Iterator[Tensor]:
    """Gather rows into a small padded buffer that is reused, crop them there, and normalize in place."""
    chunk = 64
    buffer = torch.zeros(chunk, 3, SIDE + 2 * SHIFT, SIDE + 2 * SHIFT, dtype=torch.uint8)
    inner = buffer[:, :, SHIFT : SHIFT + SIDE, SHIFT : SHIFT + SIDE]
    scale, shift = statistics_of_batches()
    while True:
        for rows in torch.randperm(COUNT).split(BATCH):
            out = torch.empty(len(rows), 3, SIDE, SIDE)
            top, left = torch.randint(2 * SHIFT + 1, (2, len(rows))).tolist()
            flips = torch.randint(2, (len(rows),)).bool()
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                inner[: len(part)] = images.index_select(0, part)
                for i in range(len(part)):
                    y, x = top[start + i], left[start + i]
                    out[start + i] = buffer[i, :, y : y + SIDE, x : x + SIDE]
                here = out[start : start + len(part)].mul_(scale).add_(shift)
                flip = flips[start : start + len(part)]
                here[flip] = here[flip].flip(3)
            yield out


def indexed_gather(images: Tensor) -> Iterator[Tensor]:
    """Gather all pixels of a batch from the padded images with one index."""
    padded = F.pad(images, [SHIFT] * 4)
    scale, shift = statistics_of_batches()
    side, channels = torch.arange(SIDE), torch.arange(3)[None, :, None, None]
    while True:
        for rows in torch.randperm(COUNT).split(BATCH):
            top, left = torch.randint(2 * SHIFT + 1, (2, len(rows), 1))
            flip = torch.randint(2, (len(rows), 1)).bool()
            y, x = top + side, left + torch.where(flip, SIDE - 1 - side, side)
            taken = padded[rows[:, None, None, None], channels, y[:, None, :, None], x[:, None, None, :]]
            yield taken.float().mul_(scale).add_(shift)


def statistics_of_batches() -> Tensor:
    mean, std = torch.tensor(MEAN) * 255, torch.tensor(STD) * 255
    return torch.stack((1 / std, -mean / std))[:, :, None, None]


def candidates(images: Tensor) -> dict[str, Callable[[], Any]]:
    pil = v1.Compose([v1.RandomCrop(SIDE, SHIFT), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(MEAN, STD)])
    floats = v2.ToDtype(torch.float32, scale=True)
    tensors = v2.Compose([v2.RandomCrop(SIDE, SHIFT), v2.RandomHorizontalFlip(), floats, v2.Normalize(MEAN, STD)])

    def by_timm() -> Any:
        return create_loader(
            ImageByImage(images, None), (3, SIDE, SIDE), BATCH, is_training=True, color_jitter=0.0,
            mean=MEAN, std=STD, num_workers=0, use_prefetcher=False, persistent_workers=False,
        )  # fmt: skip

    return {
        "torchvision v1, DataLoader": lambda: DataLoader(ImageByImage(images, pil), BATCH, shuffle=True),
        "torchvision v2 on tensors, DataLoader": lambda: DataLoader(
            ImageByImage(images, tensors, True), BATCH, shuffle=True
        ),
        "timm, its random resized crop": by_timm,
        "bare gather: one index": lambda: indexed_gather(images),
        "bare gather: padded buffer": lambda: padded_buffer(images),
        "lit_tricks CIFAR10": product,
    }


def forever(loader: Any) -> Iterator[Any]:
    for epoch in range(10**6):
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader


def cpu(rounds: int) -> str:
    torch.set_num_threads(1)
    images = RandomImages().load()[0]
    loaders = {name: forever(make()) for name, make in candidates(images).items()}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(rounds + 1):
        for name in np.random.RandomState(turn).permutation(list(loaders)):
            start = time.process_time()
            next(loaders[name])
            times[name].append(1e6 * (time.process_time() - start) / BATCH)
    habit, ours = times["torchvision v1, DataLoader"][1:], times["lit_tricks CIFAR10"][1:]
    rows = []
    for name, (_, *found) in times.items():
        faster, share = (ratio(habit, found), ratio(ours, found))
        rows.append(f"| {name} | {statistics.median(found):.2f} | {faster:.1f} | {share:.2f} |")
    head = [
        "| | us of CPU per image (lower is better) | x faster than torchvision v1 | lit_tricks over this |",
        "|---|---|---|---|",
    ]
    title = f"One core, one thread, no workers, batches of {BATCH}, medians of {rounds} batches:"
    return "\n".join([title, "", *head, *rows])


def ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def gpu(seconds: float) -> str:
    """Measure images per second of the loader, and the share of a ResNet-18 step that waits for the loader."""
    torch.backends.cudnn.benchmark = True
    rows = []
    for where in ("device", "host"):
        batches = forever(product("gpu", where))
        rate = per_second(batches, seconds)
        model = create_model("resnet", 10, depth=18, variant="D", small_input=True).cuda()
        model = model.to(memory_format=torch.channels_last)
        batch = next(batches)
        # the same batch again and again, and new ones, by turns, as clocks of GPUs drift
        turns = [
            (step_time(model, forever([batch]), seconds / 4), step_time(model, batches, seconds / 4)) for _ in range(4)
        ]
        wait = statistics.median(100 * (1 - still / new) for still, new in turns)
        rows.append(f"| images on the {where} | {rate:,.0f} | {1e3 * turns[-1][1]:.2f} | {wait:.1f} |")
    head = [
        "| | images per second, only the loader | ms of a ResNet-18 step in bf16 | % of it waiting for data |",
        "|---|---|---|---|",
    ]
    return "\n".join([f"On the GPU, batches of {BATCH}:", "", *head, *rows])


def per_second(batches: Iterator[Any], seconds: float) -> float:
    next(batches)
    torch.cuda.synchronize()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            images += len(next(batches)[1])
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def step_time(model: nn.Module, batches: Iterator[Any], seconds: float) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        images, labels = next(batches)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        steps += 5
    return (time.perf_counter() - start) / steps


def report(rounds: int, seconds: float) -> str:
    title = "# Small images in memory"
    return "\n\n".join([title, cpu(rounds), *([gpu(seconds)] if torch.cuda.is_available() else [])])
