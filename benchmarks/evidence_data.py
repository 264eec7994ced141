"""CIFAR-10 from JPEG files: images that are decoded once, and the library's data module with these images."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_tricks.data import CIFAR10
from lit_tricks.data.memory.stored import MemorySource

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Pixels:
    """A part of the arrays of ``load``: "train" or "val"."""

    arrays: Arrays
    part: str

    def load(self) -> tuple[Tensor, Tensor]:
        images, labels = (torch.from_numpy(self.arrays[f"{self.part}_{kind}"]) for kind in "xy")
        return images.contiguous(), labels.long()

    def to_image(self, pixels: Tensor) -> Image.Image:
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class Images(CIFAR10):
    """The library's data module with the arrays of ``load``. Their part "val" has the test images."""

    arrays: Arrays

    @classmethod
    def of(cls, arrays: Arrays, **arguments: Any) -> Images:
        """Return the data module. It validates on the test images, and keeps the side of the images by default."""
        module = cls(download=False, **{"val_size": 0, "image_size": arrays["train_x"].shape[-1], **arguments})
        module.arrays = arrays  # not an argument, because Lightning copies arguments
        return module

    def prepare_data(self) -> None:
        """Do nothing: the images are in memory."""

    def _read(self, train: bool) -> MemorySource:
        return MemorySource(Pixels(self.arrays, "train" if train else "val"))


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
