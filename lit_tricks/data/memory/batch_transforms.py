"""Transforms of whole batches of equal uint8 images: crop, shift, flip, cutout and normalization, in a few operations.

Every step is a plain tensor operation of a fixed shape. So the same code serves CPU, GPU and ``torch.compile``, and no
step waits for a device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_tricks.data.memory.draws import Key, below, draw
from lit_tricks.utils.image_size import resize
from lit_tricks.utils.transient import Transient

__all__ = ["BatchTransform", "EvalBatch", "Flip", "Padding", "TrainBatch", "boxes"]

Flip = Literal["random", "alternating", "none"]
Padding = Literal["zero", "reflect"]
TOP, LEFT, FLIP, CUT_Y, CUT_X, BOX, BOX_TOP, BOX_LEFT = range(8)  # what the numbers of an image are for
RATIO = 3 / 4, 4 / 3  # of width and height of a crop
AREAS, RATIOS = 512, 64  # steps of the grid that crops are drawn from
CHUNK = 64  # images whose pixels stay in the cache of a core


class BatchTransform(Transient, ABC):
    """Base: a transform of a batch that also takes a single PIL image, like torchvision's transforms.

    Args:
        to_pixels: turns a PIL image into a tensor (C, H, W), in the units of the stored images.
        mean: of the channels, in these units.
        std: standard deviation of the channels, in these units.
    """

    transient: ClassVar[dict[str, Any]] = {"_constants": {}}

    def __init__(self, to_pixels: Callable[[Image.Image], Tensor], mean: Sequence[float], std: Sequence[float]) -> None:
        self.to_pixels = to_pixels
        self.mean: tuple[float, ...] = tuple(mean)
        self.std: tuple[float, ...] = tuple(std)
        self._constants: dict[Any, Tensor] = {}  # by device and name

    def batch(self, images: Tensor, rows: Tensor | None, key: Key) -> Tensor:
        """Transform a batch.

        Args:
            images: shape (M, C, H, W), uint8 or floats.
            rows: which of the images, int64, shape (N,); None takes all of them.
            key: decides the draws; on the device of the images.

        Returns:
            Normalized images, float32, shape (N, C, height, width).
        """
        numbers = self._draw(key)
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._part(images if rows is None else images.index_select(0, rows), numbers, None)
        count = len(images) if rows is None else len(rows)
        out = torch.empty(count, images.shape[1], *self._size(images))
        for start in range(0, count, CHUNK):
            here = slice(start, start + CHUNK)
            part = images[here] if rows is None else images.index_select(0, rows[here])
            self._part(part, numbers[:, here], out[here])
        return out

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform a PIL image; its draws come from a key that is drawn from torch's generator of the CPU."""
        zero = torch.zeros(1, dtype=torch.int64)
        return self.batch(self.to_pixels(image)[None], None, Key(int(torch.randint(2**62, ())), zero, zero))[0]

    @abstractmethod
    def _draw(self, key: Key) -> Tensor:
        """Return the numbers of each image, int64, shape (K, N)."""

    @abstractmethod
    def _size(self, images: Tensor) -> tuple[int, int]:
        """Return height and width of the result."""

    @abstractmethod
    def _part(self, images: Tensor, numbers: Tensor, out: Tensor | None) -> Tensor:
        """Transform images by their numbers, into ``out`` if there is one."""

    def _normalized(self, images: Tensor, out: Tensor | None) -> Tensor:
        """Return ``(images - mean) / std`` as one product and one sum, in float32."""
        scale, shift = self._constant(images.device, "statistics", self._statistics)
        out = images.to(torch.float32, copy=True) if out is None else out.copy_(images)
        return out.mul_(scale).add_(shift)

    def _statistics(self) -> Tensor:
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return torch.stack((1 / std, -mean / std)).float()[:, :, None, None]

    def _constant(self, device: torch.device, name: Any, make: Callable[[], Tensor]) -> Tensor:
        if (device, name) not in self._constants:
            self._constants[device, name] = make().to(device)
        return self._constants[device, name]


class EvalBatch(BatchTransform):
    """Resize the short side, crop the center, normalize.

    Args:
        crop_size: side of the square result in pixels.
        resize_size: length of the short side before the crop in pixels, at least ``crop_size``.
        to_pixels: see the base class.
        mean: see the base class.
        std: see the base class.
        squash: resize both sides to ``resize_size``, at any aspect ratio.
    """

    def __init__(
        self,
        crop_size: int,
        resize_size: int,
        to_pixels: Callable[[Image.Image], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        squash: bool = False,
    ) -> None:
        super().__init__(to_pixels, mean, std)
        self.crop_size = crop_size
        self.resize_size = resize_size
        self.squash = squash

    def __repr__(self) -> str:
        return f"EvalBatch({self.crop_size}, resize_size={self.resize_size})"

    def _draw(self, key: Key) -> Tensor:
        return key.indices[None]

    def _size(self, images: Tensor) -> tuple[int, int]:
        return self.crop_size, self.crop_size

    def _part(self, images: Tensor, numbers: Tensor, out: Tensor | None) -> Tensor:
        sides = tuple(images.shape[-2:])
        size = tuple(self.resize_size if self.squash else self.resize_size * side // min(sides) for side in sides)
        if size != sides:
            images = resize(images.float(), (size[0], size[1]))
        top, left = (round((side - self.crop_size) / 2) for side in size)
        return self._normalized(images[..., top : top + self.crop_size, left : left + self.crop_size], out)


class TrainBatch(BatchTransform):
    """Crop and resize at random, shift, flip, normalize, cut out; every step but the normalization may be left out.

    Args:
        size: side of the square result in pixels.
        to_pixels: see the base class.
        mean: see the base class.
        std: see the base class.
        translate: most pixels by which an image is shifted, up or down and left or right, 0 to ``size - 1``.
        padding: what comes in at the sides of a shifted image: "zero" is black, "reflect" mirrors the image.
        flip: "random" flips half of the images; "alternating" flips each image in every second epoch; "none".
        cutout: side of the square that is set to the mean, in pixels, 0 to ``size``; the square lies in the image.
        crop_scale: least and largest share of the area that is cropped and resized; None resizes the whole image.
    """

    def __init__(
        self,
        size: int,
        to_pixels: Callable[[Image.Image], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
        translate: int = 0,
        padding: Padding = "zero",
        flip: Flip = "random",
        cutout: int = 0,
        crop_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(to_pixels, mean, std)
        self.size = size
        self.translate = translate
        self.padding = padding
        self.flip = flip
        self.cutout = cutout
        self.crop_scale = crop_scale

    def __repr__(self) -> str:
        names = ("translate", "padding", "flip", "cutout", "crop_scale")
        return f"TrainBatch({self.size}, {', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def _draw(self, key: Key) -> Tensor:
        numbers = draw(key)
        if self.flip == "alternating":
            phases = draw(Key(key.seed, torch.full_like(key.epochs, -1), key.indices))[FLIP]
            numbers[FLIP] = phases + key.epochs
        numbers[FLIP] %= 2
        return numbers

    def _size(self, images: Tensor) -> tuple[int, int]:
        return self.size, self.size

    def _part(self, images: Tensor, numbers: Tensor, out: Tensor | None) -> Tensor:
        if self.crop_scale:
            images = self._crop(images, numbers, self.crop_scale)
        elif images.shape[-2:] != (self.size, self.size):
            images = resize(images.float(), (self.size, self.size))
        if self.translate:
            images = self._shift(images, numbers)
        if self.flip != "none":
            flipped = torch.cat((images, images.flip(3)))
            images = flipped.index_select(
                0, torch.arange(len(images), device=images.device) + numbers[FLIP] * len(images)
            )
        result = self._normalized(images, out)
        return result.mul_(self._around_cutout(numbers)) if self.cutout else result

    def _shift(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Shift images: take each row of pixels from its place in the image with a border around it."""
        count, channels, side, _ = images.shape
        border = self.translate
        wide = side + 2 * border
        top, left = below(numbers[TOP : LEFT + 1], 2 * border + 1)
        framed = F.pad(images, [border] * 4) if self.padding == "zero" else _mirrored(images, border)
        area = wide * wide
        device = images.device
        firsts = torch.arange(0, count * channels * area, channels * area, device=device) + top * wide + left
        rows = torch.arange(0, channels * area, area, device=device)[:, None] + torch.arange(side, device=device) * wide
        windows = framed.view(-1).as_strided((framed.numel() - side + 1, side), (1, 1))
        return windows.index_select(0, (firsts[:, None] + rows.view(-1)).view(-1)).view_as(images)

    def _crop(self, images: Tensor, numbers: Tensor, scale: tuple[float, float]) -> Tensor:
        """Crop boxes and resize them, antialiased and bilinear, as a product with a matrix for each direction."""
        count, channels, height, width = images.shape
        table = self._constant(images.device, (height, width), lambda: boxes(height, width, *scale))
        heights, widths = table[below(numbers[BOX], len(table))].unbind(1)
        top, left = below(numbers[BOX_TOP], height - heights + 1), below(numbers[BOX_LEFT], width - widths + 1)
        down, across = self._weights(top, heights, height), self._weights(left, widths, width)
        pixels = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # row by row
        pixels = (down @ pixels.flatten(2)).view(count, self.size * channels, width) @ across.mT
        return pixels.view(count, self.size, channels, self.size).transpose(1, 2)

    def _weights(self, start: Tensor, length: Tensor, side: int) -> Tensor:
        """Return the weight of each pixel of a side in each pixel of the result, shape (N, size, side)."""
        start, length = start[:, None, None], length[:, None, None]
        scale = length.float() / self.size
        centers = start + (torch.arange(self.size, device=start.device)[:, None] + 0.5) * scale
        pixels = torch.arange(side, device=start.device)
        weights = (1 - (pixels + 0.5 - centers).abs() / scale.clamp(min=1)).clamp_(min=0)
        weights *= (pixels >= start) & (pixels < start + length)
        weights /= weights.sum(2, keepdim=True)
        return weights

    def _around_cutout(self, numbers: Tensor) -> Tensor:
        """0 in a square, 1 around it."""
        corners = below(numbers[CUT_Y : CUT_X + 1], self.size - self.cutout + 1)
        distance = torch.arange(self.size, device=numbers.device) - corners[:, :, None]
        y, x = ((distance < 0) | (distance >= self.cutout)).unbind()
        return torch.logical_or(y[:, None, :, None], x[:, None, None, :]).float()


def _mirrored(images: Tensor, border: int) -> Tensor:
    """Pad images by their reflection, without the pixels at the border. F.pad supports only floats."""
    for dim in (2, 3):
        size = images.shape[dim]
        before, after = images.narrow(dim, 1, border), images.narrow(dim, size - border - 1, border)
        images = torch.cat((before.flip(dim), images, after.flip(dim)), dim)
    return images


@lru_cache
def boxes(height: int, width: int, least: float, most: float) -> Tensor:
    """List heights and widths of crops, int64, shape (K, 2), each as likely as the others.

    The distribution is torchvision's ``RandomResizedCrop``, with area and ratio on a fine grid: areas are uniform in
    ``least`` to ``most`` of the image, logarithms of the ratio are uniform in log(3/4) to log(4/3), and crops that
    exceed the image are excluded. If no crop fits, the list has only the largest crop of an allowed ratio.
    """
    areas = height * width * (least + (most - least) * (np.arange(AREAS) + 0.5) / AREAS)
    low, high = np.log(RATIO)
    ratios = np.exp(low + (high - low) * (np.arange(RATIOS) + 0.5) / RATIOS)[:, None]
    heights, widths = (np.rint(np.sqrt(area)).astype(np.int64).ravel() for area in (areas / ratios, areas * ratios))
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    if not fits.any():
        ratio = min(max(width / height, RATIO[0]), RATIO[1])
        return torch.tensor([[min(height, round(width / ratio)), min(width, round(height * ratio))]])
    return torch.from_numpy(np.stack((heights[fits], widths[fits]), 1))
