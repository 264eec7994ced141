"""Reading images, and samples whose randomness is tied to (seed, epoch, index)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lit_tricks.data.transforms import Transform, to_rgb

__all__ = ["Files", "Samples", "Source", "derive_seed", "find_images", "load_image", "read_image", "seeded"]


class Source(Protocol):
    """Anything that gives pairs of an untransformed image and its label or path."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Any]: ...


def derive_seed(seed: int, *key: int) -> int:
    """Mix a seed and a key, such as (epoch, index), into 64 bits that differ for every key."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def find_images(folder: str) -> list[str]:
    """List all image files below a folder, sorted by path."""
    paths = (os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in paths if has_file_allowed_extension(path, IMG_EXTENSIONS))


def read_image(path: str) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Raises:
        RuntimeError: if it cannot be read; the message names the file.
    """
    try:
        return load_image(path)
    except Exception as error:  # PIL's decoders fail in many ways: OSError, SyntaxError, ValueError, struct.error, ...
        raise RuntimeError(f"cannot read the image {path!r} ({error}): replace the file or remove it") from error


def load_image(file: str | BinaryIO) -> Image.Image:
    """Read an image as 8-bit RGB; what PIL raises goes on."""
    with Image.open(file) as image:
        image.load()
        return to_rgb(image)


@contextlib.contextmanager
def seeded(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Let torch's generator of the CPU draw what belongs to a sample, and put it back afterwards.

    (``torch.manual_seed`` would reseed the accelerators as well, in the middle of training.)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, epoch, index))
        yield


class Samples(Dataset[tuple[Tensor, Any]]):
    """Transformed samples; random transforms give the same for the same (seed, epoch, index), in any process.

    The index carries the epoch: ``index + epoch * len(samples)``, so that workers that live on from epoch to epoch
    know it.

    Args:
        source: gives (image, label).
        transform: image to tensor. May be replaced at any time before the workers start.
        seed: of the random transforms.
    """

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        epoch, index = divmod(index, len(self))
        image, label = self.source[index]
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


class Files:
    """Pairs of image and path, for prediction."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return read_image(self.paths[index]), self.paths[index]
