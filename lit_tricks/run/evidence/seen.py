"""Images of a split in one process: their positions and files, and thumbnails of some."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Seen", "pixels_of", "smaller"]


class Seen:
    """Base of what is kept of a split.

    Args:
        dataset: of the loader.
        rank: of the process.
        replicas: how many processes take turns with the images.
    """

    def __init__(self, dataset: Any, rank: int, replicas: int) -> None:
        self.dataset = dataset
        self.rank = rank
        self.replicas = replicas
        self.places = 0  # images that were seen
        self.low: Tensor | None = None  # of each channel, over all images
        self.high: Tensor | None = None

    def note_range(self, images: Tensor) -> None:
        """Widen the range of the channels by the range of images (N, C, H, W)."""
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def size(self) -> int | None:
        """Return the number of images, where it is known and matters: a place from there on is a repetition.

        A sampler repeats some images, so that all processes have as many.
        """
        return len(self.dataset) if self.replicas > 1 and hasattr(self.dataset, "__len__") else None

    def file_of(self, index: int) -> str:
        """Return the file of an image, or "".

        The file is known if the data set, or a data set inside it, stores files as torchvision's folders or this
        library do.
        """
        dataset = self.dataset
        while dataset is not None:
            samples: Any = getattr(dataset, "samples", None)
            paths: Any = getattr(dataset, "paths", None)
            if isinstance(samples, list) and index < len(samples) and isinstance(samples[index], tuple):
                return str(samples[index][0])
            if hasattr(paths, "__getitem__") and hasattr(paths, "__len__") and index < len(paths):
                return str(paths[index])
            if hasattr(dataset, "indices") and index < len(dataset.indices):
                index = dataset.indices[index]
            dataset = getattr(dataset, "source", None) or getattr(dataset, "dataset", None)
        return ""


def smaller(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Images (N, C, H, W) of at most ``side`` pixels a side, resized where they are larger."""
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(images, size, mode=mode, antialias=mode == "bilinear")


def pixels_of(images: npt.NDArray[Any], low: npt.NDArray[Any], high: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return normalized images (N, C, H, W) as uint8 (N, H, W, 3), or (N, H, W, 1) for other than three channels.

    The smallest and the largest value of a channel over the whole split become 0 and 255. Over many images this
    reverses any normalization per channel.
    """
    span = np.where(high > low, high - low, 1)
    scaled = (images - low[:, None, None]) / span[:, None, None]
    if scaled.shape[1] != 3:
        scaled = scaled.mean(1, keepdims=True)
    pixels: npt.NDArray[np.uint8] = np.rint(255 * scaled.clip(0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels
