"""Crops in uint8 from partly decoded images: the part of the pipeline that runs in workers.

The antialiased bilinear resizing is torch's, in fixed point, which differs from PIL's by 2 of 255 at most.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_tricks._compat import resize_antialiased_into
from lit_tricks.data.color import Jitter
from lit_tricks.data.io.jpeg import Pixels, pixels_of
from lit_tricks.utils.rng import seeded

__all__ = ["CentreCrop", "Crop", "RandomCrop", "generator_at"]

SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


class Crop(ABC):
    """Base: a transform of a PIL image to uint8 pixels of shape (3, size, size), normalized later, in the batch.

    Args:
        size: side of the square result in pixels.
    """

    jitter: Jitter | None = None  # of the colors, later

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def __call__(
        self, image: Image.Image, generator: np.random.Generator | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Crop an image.

        Args:
            image: to be cropped.
            generator: of what is random; None makes one by a draw from torch's.
            out: where the result is written; uint8, (3, size, size), channels last.
        """

    def empty(self, *sizes: int) -> Tensor:
        """Make room for results, channels last."""
        return torch.empty(*sizes, self.size, self.size, 3, dtype=torch.uint8).movedim(-1, -3)


class RandomCrop(Crop):
    """Crop 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, resize, and flip every second image.

    The draws have the distribution of torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip``.

    Args:
        size: side of the square result in pixels.
        jitter: color jitter, applied later.
        augment: function applied to the uint8 result, with draws from torch's generator.
    """

    def __init__(
        self, size: int, jitter: Jitter | None = None, augment: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__(size)
        self.jitter = jitter
        self.augment = augment

    def __call__(
        self, image: Image.Image, generator: np.random.Generator | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Crop an image at random (see the base class)."""
        generator = generator or generator_at(int(torch.randint(2**62, ())))
        box = top, left, height, width = self.box(*image.size, generator)
        flip = generator.random() < 0.5
        out = self.empty() if out is None else out
        pixels = pixels_of(image, box)[top:, left : left + width]
        resize(pixels, out, self.size / height, self.size / width)
        if flip:
            out.copy_(out.flip(-1))
        if self.augment:
            with seeded(int(generator.integers(2**62))):
                out.copy_(self.augment(out))
        return out

    def __repr__(self) -> str:
        return f"RandomCrop({self.size}, jitter={self.jitter}, augment={self.augment})"

    @staticmethod
    def box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) in pixels; the largest in the middle if all tries stick out."""
        for _ in range(TRIES):
            area = width * height * generator.uniform(*SCALE)
            ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
        ratio = min(max(width / height, RATIO[0]), RATIO[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, h, w


class CentreCrop(Crop):
    """Resize the short side, and crop the center, on the grid of the whole image.

    Args:
        size: side of the square result in pixels.
        resize_size: length of the short side before the crop in pixels, at least ``size``.
    """

    def __init__(self, size: int, resize_size: int) -> None:
        super().__init__(size)
        self.resize_size = resize_size

    def __call__(
        self, image: Image.Image, generator: np.random.Generator | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Crop the center of an image (see the base class)."""
        width, height = image.size
        short = min(width, height)
        new_width, new_height = self.resize_size * width // short, self.resize_size * height // short
        left, top = round((new_width - self.size) / 2), round((new_height - self.size) / 2)
        x_scale, y_scale = new_width / width, new_height / height
        # Pixels to the right of the crop and below it are not computed. A pixel of the result depends on input pixels
        # within one pixel of the result, or of the image, around its middle.
        right, bottom = left + self.size, top + self.size
        first_row, last_row = _reach(top, bottom, y_scale, height)
        first_column, last_column = _reach(left, right, x_scale, width)
        box = first_row, first_column, last_row - first_row, last_column - first_column
        resized = torch.empty(bottom, right, 3, dtype=torch.uint8).movedim(-1, 0)
        resize(pixels_of(image, box), resized, y_scale, x_scale)
        out = self.empty() if out is None else out
        return out.copy_(resized[:, top:, left:])

    def __repr__(self) -> str:
        return f"CentreCrop({self.size}, resize_size={self.resize_size})"


def _reach(start: int, end: int, scale: float, length: int) -> tuple[int, int]:
    """Return the first pixel of an image, and the one after the last, that pixels of the resized one are made of."""
    return max(0, math.floor((start - 1) / scale) - 2), min(length, math.ceil((end + 1) / scale) + 2)


def resize(pixels: Pixels, out: Tensor, y_scale: float, x_scale: float) -> None:
    """Resize, antialiased and bilinear, to the upper left part of the result that fits into ``out``.

    Args:
        pixels: RGB values, shape (height, width, 3).
        out: uint8, shape (3, height, width), channels last.
        y_scale: height of the whole result divided by the height of ``pixels``.
        x_scale: width of the whole result divided by the width of ``pixels``.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resize_antialiased_into(out[None], image, y_scale, x_scale)


def generator_at(seed: int, *key: int) -> np.random.Generator:
    """Make the generator of a seed (of 64 bits) and a key, such as (epoch, index)."""
    words = [seed & 2**64 - 1, *key, 0, 0]
    return np.random.Generator(np.random.Philox(key=words[:2], counter=[0, 0, words[2], 0]))
