"""Finding images, and samples whose randomness is tied to (seed, epoch, index)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from lit_tricks._compat import new_shared_storage
from lit_tricks.data.crops import Crop, generator_at
from lit_tricks.data.io import file_index
from lit_tricks.data.io.bad_images import BadImages
from lit_tricks.data.io.file_index import Paths
from lit_tricks.data.io.jpeg import BadImageError, read_image
from lit_tricks.data.transforms import Transform
from lit_tricks.utils.rng import seeded
from lit_tricks.utils.transient import Transient

__all__ = [
    "Files",
    "JointSamples",
    "PredictSamples",
    "Reader",
    "Samples",
    "Source",
    "WholeBatch",
    "collate",
    "derive_seed",
    "find_images",
]

Reader = Callable[[str], Image.Image]

TRIES = 20  # images in a row that may be bad where bad ones are replaced


class Source(Protocol):
    """Anything that gives pairs of an untransformed image and its label or path."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Any]: ...


def derive_seed(seed: int, *key: int) -> int:
    """Mix a seed and a key, such as (epoch, index), into 64 bits that differ for every key."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def find_images(folder: str) -> Paths:
    """List all image files below a folder, sorted by path."""
    return Paths(folder, map(os.fsencode, file_index.find_images(folder)))


class Samples(Transient, Dataset[tuple[Any, ...]]):
    """Transformed samples. Random transforms depend only on (seed, epoch, index), in any process.

    The index carries the epoch: ``index + epoch * len(samples)``, for workers that persist across epochs. A ``Crop``
    draws from its own generator, and fills its part of a batch in memory that is shared between processes. For any
    other transform, torch's CPU generator is seeded and restored.

    A sample is (image, label), or (image, label, matrix) where the transform has a jitter of the colors; the matrix is
    the bits of float32, shape (3, 4).

    Args:
        source: gives (image, label).
        transform: PIL image to tensor. May be replaced at any time before the workers start.
        seed: of the random transforms.
        threads: number of threads that transform the samples of a batch, in a worker process.
        bad: record of bad images, which are skipped: another sample replaces a bad one, chosen by (seed, epoch, index),
            or the batch is smaller. None raises the error.
    """

    transient: ClassVar[dict[str, Any]] = {"_pool": None}

    def __init__(
        self, source: Source, transform: Transform, seed: int, threads: int = 1, bad: BadImages | None = None
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.threads = threads
        self.bad = bad
        self._pool: ThreadPoolExecutor | None = None

    @property
    def targets(self) -> Tensor | None:
        """Labels of the images, (N,), as torchvision's data sets list them; None for masks and paths."""
        labels = getattr(self.source, "labels", None)
        return labels if isinstance(labels, Tensor) else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample: tuple[Any, ...] = self.__getitems__([index])[0]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Give the samples of a batch, as views of one that is whole (see ``collate``)."""
        transform = self.transform
        if not isinstance(transform, Crop):
            return [sample for sample in self._map(self._any, indices) if sample is not None]
        with torch.inference_mode(False):  # in which a worker may be born, but not its threads
            images = _shared(transform.empty(len(indices)))
        loaded = self._map(self._crop, indices, images)
        kept = [place for place, each in enumerate(loaded) if each is not None]
        if len(kept) < len(indices):
            images = images[kept]
        labels, draws = zip(*(loaded[place] for place in kept), strict=True)
        whole = [images, default_collate(list(labels))]
        if transform.jitter:
            # As bits: Lightning rounds all floats of a batch where the precision of the run is half.
            whole.append(transform.jitter.matrices(np.stack(draws)).view(torch.int32))
        samples = WholeBatch(zip(images, labels, *whole[2:], strict=True))
        samples.whole = whole
        return samples

    def _any(self, index: int, sample: tuple[Image.Image, Any], epoch: int) -> tuple[Any, ...]:
        """Transform one sample by a transform that may draw from torch's generator."""
        image, label = sample
        with seeded(derive_seed(self.seed, epoch, index)):
            return self.transform(image), label

    def _crop(self, index: int, sample: tuple[Image.Image, Any], epoch: int, out: Tensor) -> tuple[Any, Any]:
        """Crop one sample, and give its label and what was drawn for its colors."""
        transform = self.transform
        assert isinstance(transform, Crop)
        image, label = sample
        generator = generator_at(self.seed, epoch, index)
        transform(image, generator, out)
        return label, transform.jitter.draw(generator) if transform.jitter else None

    def _load(self, function: Callable[..., Any], replace: bool, index: int, *args: Any) -> Any:
        """Call a function with what is at an index; None if that is a bad image that nothing takes the place of."""
        epoch, index = divmod(index, len(self))
        place = index
        for attempt in range(1, TRIES + 1):
            try:
                return function(index, self.source[place], epoch, *args)
            except BadImageError as error:
                if self.bad is None:
                    raise
                self.bad.mark(place)
                if not replace:
                    return None
                last = error
            place = derive_seed(self.seed, epoch, index, attempt) % len(self)
        raise BadImageError(f"{TRIES} images in a row were bad, which is too many to skip: {last}") from last

    def _map(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the result of ``_load`` for an index, and its context."""
        load = partial(self._load, function, self.bad is not None and self.bad.replace)
        if self.threads == 1 or not get_worker_info():
            loaded = list(map(load, *args))
        else:
            self._pool = self._pool or ThreadPoolExecutor(self.threads)
            loaded = list(self._pool.map(load, *args))
        if all(each is None for each in loaded):
            loaded[0] = self._stand_in(function, *(arg[0] for arg in args))
        return loaded

    def _stand_in(self, function: Callable[..., Any], index: int, *args: Any) -> Any:
        """Load another image for a batch of bad ones: a mean over no image is not defined."""
        return self._load(function, True, index, *args)


class PredictSamples(Samples):
    """Samples to predict. A batch in which no image can be read holds a black one, with an empty path."""

    def _stand_in(self, function: Callable[..., Any], index: int, *args: Any) -> Any:
        return function(index, (Image.new("RGB", (8, 8)), ""), 0, *args)


class JointSamples(Samples):
    """Samples whose target lies in the image, and is transformed with it: ``transform(image, target)``."""

    def _any(self, index: int, sample: tuple[Image.Image, Any], epoch: int) -> tuple[Any, ...]:
        transform: Callable[..., Any] = self.transform
        with seeded(derive_seed(self.seed, epoch, index)):
            image, target = transform(*sample)
        return image, target


def collate(samples: list[Any]) -> Any:
    """Make a batch of samples, or give the one that they are part of."""
    return samples.whole if isinstance(samples, WholeBatch) else default_collate(samples)


class WholeBatch(list[Any]):
    """Samples that are views of a batch.

    Attributes:
        whole: the batch.
    """

    whole: list[Any]


def _shared(batch: Tensor) -> Tensor:
    """Move room for a batch of a worker to where the main process finds it."""
    if not get_worker_info():
        return batch
    storage = new_shared_storage(batch.numel())
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, batch.shape, batch.stride())


class Files:
    """Pairs of an image and its label, or its path.

    Args:
        paths: of the image files.
        read: reads an image.
        labels: of the images, int64; None gives the paths in their place, for prediction.
    """

    def __init__(self, paths: Paths, read: Reader = read_image, labels: Tensor | None = None) -> None:
        self.paths = paths
        self.read = read
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        path = self.paths[index]
        return self.read(path), path if self.labels is None else int(self.labels[index])
