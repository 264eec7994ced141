"""Finding images, and samples whose randomness is tied to (seed, epoch, index)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lit_tricks.data._crops import Crop, generator_at, seeded
from lit_tricks.data._jpeg import read_image
from lit_tricks.data.transforms import Transform

__all__ = ["Files", "Samples", "Source", "collate", "derive_seed", "find_images"]


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


class Samples(Dataset[tuple[Any, ...]]):
    """Transformed samples; random transforms give the same for the same (seed, epoch, index), in any process.

    The index carries the epoch: ``index + epoch * len(samples)``, so that workers that live on from epoch to epoch
    know it. A transform of ours (a ``Crop``) draws from a generator of its own, and fills its part of one batch, in
    memory that is shared between processes. For any other, torch's generator of the CPU is seeded, and put back.

    A sample is (image, label), or (image, label, matrix) where the transform has a jitter of the colours; the matrix is
    the bits of float32, shape (3, 4).

    Args:
        source: gives (image, label).
        transform: PIL image to tensor. May be replaced at any time before the workers start.
        seed: of the random transforms.
        threads: how many transform the samples of a batch, in a worker process.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, threads: int = 1) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample: tuple[Any, ...] = self.__getitems__([index])[0]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Give the samples of a batch, as views of one that is whole (see ``collate``)."""
        transform = self.transform
        if not isinstance(transform, Crop):
            return self._map(self._any, indices)
        with torch.inference_mode(False):  # in which a worker may be born, but not its threads
            images = _shared(transform.empty(len(indices)))
        labels, draws = zip(*self._map(self._crop, indices, images), strict=True)
        whole = [images, default_collate(list(labels))]
        if transform.jitter:
            # As bits: Lightning rounds all floats of a batch where the precision of the run is half.
            whole.append(transform.jitter.matrices(np.stack(draws)).view(torch.int32))
        samples = _Samples(zip(images, labels, *whole[2:], strict=True))
        samples.whole = whole
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pool": None}

    def _any(self, index: int) -> tuple[Any, ...]:
        """Transform one sample by a transform that may draw from torch's generator."""
        epoch, index = divmod(index, len(self))
        image, label = self.source[index]
        with seeded(derive_seed(self.seed, epoch, index)):
            return self.transform(image), label

    def _crop(self, index: int, out: Tensor) -> tuple[Any, Any]:
        """Crop one sample, and give its label and what was drawn for its colours."""
        transform = self.transform
        assert isinstance(transform, Crop)
        epoch, index = divmod(index, len(self))
        image, label = self.source[index]
        generator = generator_at(self.seed, epoch, index)
        transform(image, generator, out)
        return label, transform.jitter.draw(generator) if transform.jitter else None

    def _map(self, function: Callable[..., Any], *args: Iterable[Any]) -> list[Any]:
        if self.threads == 1 or not get_worker_info():
            return list(map(function, *args))
        if not self._pool:
            self._pool = ThreadPoolExecutor(self.threads)
        return list(self._pool.map(function, *args))


def collate(samples: list[Any]) -> Any:
    """Make a batch of samples, or give the one that they are part of."""
    return samples.whole if isinstance(samples, _Samples) else default_collate(samples)


class _Samples(list[Any]):
    whole: list[Any]


def _shared(batch: Tensor) -> Tensor:
    """Move room for a batch of a worker to where the main process finds it."""
    if not get_worker_info():
        return batch
    storage = torch.UntypedStorage._new_shared(batch.numel())  # type: ignore[no-untyped-call]  # as torch's default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, batch.shape, batch.stride())


class Files:
    """Pairs of image and path, for prediction."""

    def __init__(self, paths: Sequence[str], read: Callable[[str], Image.Image] = read_image) -> None:
        self.paths = list(paths)
        self.read = read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return self.read(self.paths[index]), self.paths[index]
