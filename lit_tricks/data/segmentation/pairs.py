"""Images with a mask each: what reads them, and what crops and resizes both alike.

A mask is a tensor of labels, (H, W). All resizing is antialiased bilinear for images and nearest for masks, the one
that is nearest to the middle of a pixel, so that both stay on one grid.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_tricks.data.crops import resize
from lit_tricks.data.io.file_index import Paths
from lit_tricks.data.io.jpeg import pixels_of, read_image
from lit_tricks.data.transforms import to_rgb
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.files import read_regular

__all__ = ["EvalPair", "Pairs", "RandomPair", "read_mask", "scaled"]

Labels = npt.NDArray[np.integer[Any]]
SHOWN = 5  # labels in a message


class Pairs:
    """Images, and masks as int64 tensors (H, W).

    Args:
        paths: of the images.
        masks: of their masks, PNG files of labels.
        num_classes: labels are below it, or ``ignore_index``.
        ignore_index: label of what is no class.
        offset: of the labels in the files: the first class is ``offset`` there, and what is below is to be ignored.
        order: new label of each label; None leaves the labels as they are.
    """

    def __init__(
        self,
        paths: Paths,
        masks: Paths,
        num_classes: int,
        ignore_index: int,
        offset: int = 0,
        order: Sequence[int] | None = None,
    ) -> None:
        self.paths = paths
        self.masks = masks
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.offset = offset
        self.order = order

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        """Return an image and its mask.

        Raises:
            ValueError: if they differ in size, or the mask has a label out of range; it names the file.
        """
        image, mask = read_image(self.paths[index]), self.labels(index)
        if mask.shape != image.size[::-1]:
            height, width = mask.shape
            raise ValueError(
                f"the mask {self.masks[index]!r} has {width} x {height} pixels, and its image {self.paths[index]!r} "
                f"{image.size[0]} x {image.size[1]}: they must be the same"
            )
        return image, torch.from_numpy(mask)

    def labels(self, index: int) -> npt.NDArray[np.int64]:
        """Return the labels of a mask, (H, W)."""
        found = read_mask(self.masks[index])
        labels: npt.NDArray[np.int64] = found.astype(np.int64) - self.offset
        if self.offset:
            labels[labels < 0] = self.ignore_index
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_classes))
        if wrong.any():
            seen = np.unique(found[wrong]).tolist()
            shown = ", ".join(map(str, seen[:SHOWN])) + (", ..." if len(seen) > SHOWN else "")
            known = f"{self.offset} to {self.num_classes - 1 + self.offset}"
            other = f"below {self.offset}" if self.offset else str(self.ignore_index)
            raise ValueError(
                f"the mask {self.masks[index]!r} has labels out of range: {shown}. The {self.num_classes} classes are "
                f"{known}, and {other} is ignored: correct the mask, or the list of classes"
            )
        if self.order is not None:
            inside = labels != self.ignore_index
            labels[inside] = np.array(self.order)[labels[inside]]
        return labels


def read_mask(path: str) -> Labels:
    """Read the labels of an image file, (H, W). A palette's indices are the labels, and its colors are ignored.

    Raises:
        ValueError: if it cannot be read, or has colors and no labels; it names the file.
    """
    try:
        data = read_regular(path)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # PIL's decoders fail with any type
        if isinstance(error, FileNotFoundError) or not is_about_input(error):
            raise
        raise ValueError(f"cannot read the mask {path!r} ({error}): replace the file or remove it") from error
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"the mask {path!r} has colors (mode {image.mode}) and no labels: save it as a PNG with one channel, or "
            "with a palette, whose values are the labels"
        )
    labels: Labels = np.array(image)
    if image.format == "PPM" and labels.dtype != np.bool_ and (maximum := _maximum(data)):
        # PIL stretches gray values to 255 or 65535, and labels are no gray values
        labels = np.rint(labels * (maximum / (65535 if image.mode == "I" else 255))).astype(labels.dtype)
    return labels.astype(np.uint8) if labels.dtype == np.bool_ else labels


def _maximum(data: bytes) -> int | None:
    """Return the largest value of a PGM file from its header, after the kind, the width and the height."""
    match = re.match(rb"P[25](?:(?:\s|#[^\n\r]*)+(\d+)){3}", data)
    return int(match[1]) if match else None


class EvalPair:
    """The evaluation transform: resize the short side to ``resize_size``, center crop, normalize.

    An image without a mask, as in prediction, is resized and not cropped.

    Args:
        size: side of the square result in pixels.
        resize_size: length of the short side before the crop in pixels, at least ``size``.
        mean: mean per channel on the 0-255 scale; one number for gray images.
        std: standard deviation of the channels on the 0-255 scale.
    """

    def __init__(self, size: int, resize_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = size
        self.resize_size = resize_size
        self.mean = mean
        self.std = std

    def __call__(self, image: Image.Image, mask: Tensor | None = None) -> Any:
        """Float32 image (C, H, W), and int64 mask (H, W) where there is one."""
        pixels, labels = scaled(image, mask, self.resize_size, len(self.mean))
        if labels is None:
            return _normalized(pixels, self.mean, self.std)
        top, left = (round((side - self.size) / 2) for side in labels.shape)
        window = (slice(top, top + self.size), slice(left, left + self.size))
        return _normalized(pixels[(..., *window)], self.mean, self.std), labels[window].contiguous()

    def __repr__(self) -> str:
        return f"EvalPair({self.size}, resize_size={self.resize_size})"


class RandomPair:
    """The random transform: the short side to a random length, a random crop, and perhaps a flip, normalized.

    What is missing in a crop, at the right and below, gets the mean color, and is ignored.

    Args:
        size: side of the square result in pixels.
        sides: least and greatest length of the short side in pixels.
        flip: whether every second image is flipped horizontally.
        mean: mean per channel on the 0-255 scale; one number for gray images.
        std: standard deviation of the channels on the 0-255 scale.
        ignore_index: label of what is missing.
    """

    def __init__(
        self,
        size: int,
        sides: tuple[int, int],
        flip: bool,
        mean: Sequence[float],
        std: Sequence[float],
        ignore_index: int,
    ) -> None:
        self.size = size
        self.sides = sides
        self.flip = flip
        self.mean = mean
        self.std = std
        self.ignore_index = ignore_index

    def __call__(self, image: Image.Image, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 image (C, size, size), and int64 mask (size, size)."""
        short = int(torch.randint(self.sides[0], self.sides[1] + 1, ()))
        pixels, labels = scaled(image, mask, short, len(self.mean))
        assert labels is not None
        top, left = (int(torch.randint(max(0, side - self.size) + 1, ())) for side in labels.shape)
        window = (slice(top, top + self.size), slice(left, left + self.size))
        result, labels = _normalized(pixels[(..., *window)], self.mean, self.std), labels[window]
        height, width = labels.shape
        missing = (0, self.size - width, 0, self.size - height)
        result, labels = F.pad(result, missing), F.pad(labels, missing, value=self.ignore_index)
        if self.flip and torch.rand(()) < 0.5:
            result, labels = result.flip(-1), labels.flip(-1)
        return result, labels

    def __repr__(self) -> str:
        return f"RandomPair({self.size}, sides={self.sides}, flip={self.flip})"


def scaled(image: Image.Image, mask: Tensor | None, short: int, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return an image as uint8 (channels, H, W), and its mask, with a short side of ``short`` pixels."""
    width, height = image.size
    new_width, new_height = (max(1, round(side * short / min(width, height))) for side in (width, height))
    pixels = pixels_of(image if channels == 3 else to_rgb(image).convert("L"))
    if (width, height) == (new_width, new_height):
        result = torch.from_numpy(pixels).permute(2, 0, 1)
    else:
        result = torch.empty(new_height, new_width, 3, dtype=torch.uint8).movedim(-1, 0)
        resize(pixels, result, new_height / height, new_width / width)
    if mask is not None:
        rows, columns = (
            ((torch.arange(new) + 0.5) * (old / new)).long()
            for new, old in zip((new_height, new_width), mask.shape, strict=True)
        )
        mask = mask[rows[:, None], columns]
    return result[:channels], mask


def _normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shape = (-1, 1, 1)
    return ((pixels.float() - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).contiguous()
