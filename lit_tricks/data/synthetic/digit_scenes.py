"""Scenes of handwritten digits with a mask, or boxes: data for segmentation and detection that needs no download."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lit_tricks.data.checked_arguments import check_seed
from lit_tricks.data.datamodule import Split
from lit_tricks.data.detection.base import DetectionDataModule
from lit_tricks.data.detection.boxes import Target, target_of
from lit_tricks.data.digits import INK, split_digits
from lit_tricks.data.samples import Source
from lit_tricks.data.segmentation.base import MaskDataModule
from lit_tricks.utils.arguments import MAX_SIDE, integer

__all__ = ["DigitDetection", "DigitScenes", "DigitSegmentation", "Placed"]

COUNTS: dict[Split, int] = {"train": 1000, "val": 200, "test": 200}
MOST = 4  # digits of a scene
SCALES = (0.25, 0.45)  # side of a digit divided by the side of the scene
TRIES = 20  # to find room for a digit
NOISE = 24  # of the ground, at most, of 255
EDGE = 0.35  # of full ink: what is darker is ground


class Placed(NamedTuple):
    """A digit in a scene: its label, its box (x0, y0, x1, y1) in pixels, x1 and y1 outside, and where its ink is."""

    label: int
    box: tuple[int, int, int, int]
    mask: npt.NDArray[np.bool_]


class DigitScenes:
    """Gray scenes with one to four digits of a split at random places and sizes, which do not touch.

    There are 1000 scenes for training, and 200 each for validation and test, each from the digits of its split. A scene
    is drawn when it is requested, and is the same every time.

    Args:
        split: whose digits.
        split_seed: see ``Digits``.
        size: side of a scene in pixels.
    """

    def __init__(self, split: Split, split_seed: int = 0, size: int = 64) -> None:
        self.images, self.labels = split_digits(split_seed)[split]
        self.key: tuple[int, int] = (split_seed, list(COUNTS).index(split))
        self.count: int = COUNTS[split]
        self.size = size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, list[Placed]]:
        """Return an image of mode L, and the digits in it."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.default_rng((*self.key, index))
        canvas = rng.uniform(0, NOISE, (self.size, self.size))
        placed: list[Placed] = []
        for _ in range(int(rng.integers(1, MOST + 1))):
            which = int(rng.integers(len(self.labels)))
            side = round(rng.uniform(*SCALES) * self.size)
            for _ in range(TRIES):
                x, y = (int(at) for at in rng.integers(0, self.size - side + 1, 2))
                if not any(_touch((x, y, x + side, y + side), other.box) for other in placed):
                    placed.append(self._place(canvas, which, side, x, y))
                    break
        return Image.fromarray(np.rint(canvas).astype(np.uint8)), placed

    def _place(self, canvas: npt.NDArray[np.float64], which: int, side: int, x: int, y: int) -> Placed:
        small = Image.fromarray((self.images[which] * INK).astype(np.float32))
        ink = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), np.float64)
        room = canvas[y : y + side, x : x + side]
        np.maximum(room, ink, out=room)
        mask = np.zeros(canvas.shape, bool)
        mask[y : y + side, x : x + side] = ink > EDGE * 255
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        return Placed(int(self.labels[which]), box, mask)


def _touch(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


SIZE = 64  # side of a scene with a mask, in pixels
MEAN, STD = 31.97, 53.16  # of the pixels in the training scenes of split_seed=0


class DigitSegmentation(MaskDataModule):
    """Scenes of one to four handwritten digits: 64 x 64 gray pixels in 11 classes, the ground and the ten digits.

    The digits are scikit-learn's (see ``Digits``), of random sizes at random places on a noisy ground. A mask marks
    their ink. There are 1000 scenes for training, and 200 each for validation and test, each from the digits of its
    split. In training, the side is scaled by 0.8 to 1.25 and cropped to 64, without flips. Images are normalized by the
    mean and standard deviation of the pixels.

    Args:
        batch_size: images in a batch of one process, 1 to 1000.
        num_workers: loading processes; "auto" is 0 here, as a scene is drawn in less than a millisecond.
        split_seed: decides which digits are for training, validation and test; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (image, path), in gray.
        eval_size: side of the images in validation and test, and short side in prediction, in pixels; None is 64.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if ``predict_dir`` is not a folder, or holds no image.

    Example:
        ``data: {class_path: DigitSegmentation, init_args: {batch_size: 32}}``
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int | Literal["auto"] = "auto",
        split_seed: int = 0,
        predict_dir: str | None = None,
        eval_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self.split_seed = check_seed(self, split_seed)
        self.classes: list[str] = ["ground", *map(str, range(10))]
        self._set_transforms(SIZE, SIZE, (0.8, 1.25), False, (MEAN,), (STD,), eval_size)

    def auto_workers(self) -> int:
        """Return 0: the images are in memory."""
        return 0

    def _load(self, split: Split) -> dict[Split, Source]:
        return {split: _WithMasks(DigitScenes(split, self.split_seed, SIZE))}


class _WithMasks:
    """Scenes with their digits as a mask: 0 is the ground, 1 to 10 are the digits 0 to 9."""

    def __init__(self, scenes: DigitScenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor]:
        image, digits = self.scenes[index]
        mask = torch.zeros(image.size[::-1], dtype=torch.int64)
        for digit in digits:
            mask[torch.from_numpy(digit.mask)] = digit.label + 1
        return image, mask


class DigitDetection(DetectionDataModule):
    """Handwritten digits on gray canvases: one to four of ten classes, at random places and sizes.

    Scenes are drawn from scikit-learn's digits (see ``Digits``): 1000 for training, and 200 each for validation and
    test, each from the digits of its split, and the same every time. Labels are the digit plus 1. Scenes are not
    flipped. See the base class for what a batch is.

    Args:
        batch_size: images in a batch of one process, 1 to 1000.
        num_workers: loading processes; "auto" is 0 here, as the scenes are tiny.
        size: side of a canvas in pixels, at least 32.
        split_seed: decides which digits are for training, validation and test; any integer from 0 to 2**32 - 1.
        scale: range of the factor by which a training scene grows or shrinks in its frame.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths), gray.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if ``predict_dir`` is not a folder, or holds no image.

    Example:
        ``data: {class_path: DigitDetection, init_args: {batch_size: 16}}``
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        size: int = 64,
        split_seed: int = 0,
        scale: tuple[float, float] = (0.8, 1.25),
        predict_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        size = integer(self, "size", size, 32, "Fewer pixels leave no room for digits.", MAX_SIDE)
        split_seed = check_seed(self, split_seed)
        self._set_transforms((MEAN,), (STD,), 0.0, scale, "raise")
        self.classes: list[str] = [str(digit) for digit in range(10)]
        self.size = size
        self.split_seed = split_seed
        self.input_size: tuple[int, int, int] = (1, size, size)

    def auto_workers(self) -> int:
        """Return 0: the images are in memory."""
        return 0

    def _load(self, split: Split) -> dict[Split, Source]:
        return {split: _WithBoxes(DigitScenes(split, self.split_seed, self.size))}


class _WithBoxes:
    """Scenes with the boxes of their digits, whose labels are 1 to 10 for 0 to 9."""

    def __init__(self, scenes: DigitScenes) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        image, placed = self.scenes[index]
        boxes = torch.tensor([each.box for each in placed], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([each.label + 1 for each in placed], dtype=torch.int64)
        return image, target_of(boxes, labels, torch.zeros_like(labels), image.size)
