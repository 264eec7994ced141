"""CIFAR-10 for evidence.py: real images, decoded once, on the device as uint8, and augmented there in batches."""

from __future__ import annotations

import io
import math
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Arrays = dict[str, np.ndarray]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class RandomCrop:
    """Apply RandomResizedCrop and flip to a batch: (N, 3, H, W) of uint8 -> (N, 3, size, size), normalized.

    The area is uniform in ``scale`` of the image and the logarithm of the ratio in ±log(4/3), as in torchvision; a side
    that is longer than the image is cut to it, where torchvision would draw again.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.25, 1.0)) -> None:
        self.size, self.scale = size, scale

    def __call__(self, images: Tensor) -> Tensor:
        n, device = len(images), images.device
        area, ratio, x, y, flip = torch.rand(5, n, device=device)
        side = (self.scale[0] + (self.scale[1] - self.scale[0]) * area).sqrt()
        stretch = ((2 * ratio - 1) * math.log(4 / 3) / 2).exp()
        width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        theta = torch.zeros(n, 2, 3, device=device)  # from the crop's coordinates to the image's, both in [-1, 1]
        theta[:, 0, 0] = torch.where(flip < 0.5, width, -width)
        theta[:, 1, 1] = height
        theta[:, 0, 2], theta[:, 1, 2] = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)
        grid = F.affine_grid(theta, [n, 3, self.size, self.size], align_corners=False)
        crops = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return normalized(crops)


class Whole:
    """Resize whole images with antialiasing: (N, 3, H, W) of uint8 -> (N, 3, size, size), normalized."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        images = images.float()
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        return normalized(images)


def normalized(images: Tensor) -> Tensor:
    mean, std = moments(images.device)
    return (images - mean) / std


@lru_cache
def moments(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) * 255 for x in (MEAN, STD))
    return mean, std


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels on the device. A batch is gathered and transformed at once."""

    def __init__(self, images: Tensor, labels: Tensor, transform: RandomCrop | Whole) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        where = torch.tensor(indices, device=self.labels.device)
        return [self.transform(self.images[where]), self.labels[where]]


def as_is(batch: list[Tensor]) -> list[Tensor]:
    return batch


def loaders(
    data: Arrays, device: str, batch_size: int, train_size: int, test_size: int
) -> tuple[DataLoader[tuple[Tensor, Tensor]], list[DataLoader[tuple[Tensor, Tensor]]]]:
    """Return the training batches, and the validation images at both sizes."""
    on_device = {name: torch.from_numpy(array).to(device) for name, array in data.items()}
    train = Images(on_device["train_x"], on_device["train_y"], RandomCrop(train_size))
    val = [Images(on_device["val_x"], on_device["val_y"], Whole(size)) for size in (train_size, test_size)]
    return (
        DataLoader(train, batch_size, shuffle=True, drop_last=True, collate_fn=as_is),
        [DataLoader(dataset, 1000, collate_fn=as_is) for dataset in val],
    )


def load(source: Path, cache: Path) -> Arrays:
    """Return all images of ``{train,val}/CLASS/*.jpg`` from a folder or tar file as arrays. They are decoded once.

    Raises:
        FileNotFoundError: if there are none.
    """
    if not cache.exists():
        parts: dict[str, list[tuple[str, bytes]]] = {"train": [], "val": []}
        for name, data in _files(source):
            part, label, _ = Path(name).parts[-3:]
            if part in parts:
                parts[part].append((label, data))
        if not all(parts.values()):
            raise FileNotFoundError(f"no train/CLASS/*.jpg and val/CLASS/*.jpg in {source}")
        classes = sorted({label for label, _ in parts["train"]})
        arrays: Arrays = {}
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for part, files in parts.items():
                arrays[f"{part}_x"] = np.stack(list(pool.map(decode, [data for _, data in files], chunksize=500)))
                arrays[f"{part}_y"] = np.array([classes.index(label) for label, _ in files])
        half = cache.with_suffix(".part.npz")
        np.savez(half, **arrays)  # type: ignore[arg-type]
        half.replace(cache)
    with np.load(cache) as arrays_in_file:
        return dict(arrays_in_file)


def decode(data: bytes) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1))


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents in an order that is the same on all machines."""
    if source.is_dir():
        for path in sorted(source.glob("*/*/*.jpg")):
            yield str(path), path.read_bytes()
    else:
        with tarfile.open(source) as tar:
            found = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".jpg")}
            contents = {name: stream.read() for name, stream in found.items() if stream}
        yield from sorted(contents.items())
