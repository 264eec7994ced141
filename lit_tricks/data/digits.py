"""The handwritten digits of scikit-learn: a real data set that needs no download and trains in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lit_tricks.data.checked_arguments import check_eval_size, check_seed, check_side
from lit_tricks.data.datamodule import Split, resize_size_for, stratified_split
from lit_tricks.data.memory.base import ImagesOn, MemoryDataModule
from lit_tricks.data.memory.batch_transforms import EvalBatch, TrainBatch
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.data.samples import Source
from lit_tricks.data.transforms import Transform, to_rgb

__all__ = ["Digits"]

SIZE = 8
INK = 255 / 16  # the digits count ink from 0 to 16, images go to 255; exact in binary
NUM_TEST, NUM_VAL = 360, 180
MEAN, STD = 4.88, 6.02  # of the ink in the training images of split_seed=0


@dataclass(frozen=True)
class DigitImages:
    """The images of scikit-learn, in units of ink."""

    def load(self) -> tuple[Tensor, Tensor]:
        """Load images (1797, 1, 8, 8), whose ink is whole numbers, and labels."""
        from sklearn.datasets import load_digits  # here, because its import takes more than half a second

        digits = load_digits()
        return torch.from_numpy(digits.images.astype(np.uint8))[:, None], torch.from_numpy(digits.target)

    def to_image(self, pixels: Tensor) -> Image.Image:
        """Turn the ink of one digit into an image in floating point, as 8 bits would round it."""
        return Image.fromarray(pixels[0].numpy() * np.float32(INK))


class Digits(MemoryDataModule):
    """Handwritten digits: 1797 gray images of 8 x 8 pixels in 10 classes, bright ink on dark ground.

    They come with scikit-learn ([Alpaydin and Kaynak, 1998](https://doi.org/10.24432/C50P49)). 1257 are for training,
    180 for validation, 360 for the test, the classes in proportion. Training images are shifted by up to one pixel in
    each direction; they are not flipped. Normalized by mean 4.88 and standard deviation 6.02 on the ink scale 0-16.

    ``eval_transform`` takes any image: made gray, squeezed to 8 x 8 (antialiased), 255 counting as 16.

    Args:
        batch_size: images in a batch of one process, 1 to 1257.
        num_workers: loading processes; "auto" is 0, which is the fastest, as the images are in memory and tiny.
        split_seed: decides which images are for training, validation and test; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is ``image_size``.
        image_size: side of the training images in pixels, at least 1; the digits are scaled to it (bilinear), and the
            shift grows with it.
        images_on: "device" keeps the images on the device that trains, "host" in the host's memory, from where each
            batch is copied. "auto" is "device" if they take at most half of its free memory, and ``num_workers`` is
            "auto" or 0.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if ``predict_dir`` is not a folder, or holds no image.

    Example:
        ``data: {class_path: Digits, init_args: {batch_size: 128}}``
    """

    crop_mode: Literal["center", "squash"] = "squash"

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int | Literal["auto"] = "auto",
        split_seed: int = 0,
        predict_dir: str | None = None,
        eval_size: int | None = None,
        image_size: int = SIZE,
        images_on: ImagesOn = "auto",
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir, images_on)
        image_size, eval_size = check_side(self, "image_size", image_size), check_eval_size(self, eval_size)
        split_seed = check_seed(self, split_seed)
        self.save_hyperparameters()
        self.split_seed = split_seed
        self.classes: list[str] = [str(digit) for digit in range(10)]
        self.input_size: tuple[int, int, int] = (1, image_size, image_size)
        self.mean, self.std = (MEAN * INK,), (STD * INK,)
        # 0, which comes in at the sides, is the ground that the digits are written on.
        shift = round(image_size / SIZE)
        self.train_transform = TrainBatch(image_size, to_ink, [MEAN], [STD], translate=shift, flip="none")
        self.eval_transform = self.eval_transform_at(image_size if eval_size is None else eval_size)

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class)."""
        return EvalBatch(image_size, resize_size_for(image_size, crop_ratio), to_ink, [MEAN], [STD], squash=True)

    def auto_workers(self) -> int:
        """Return 0: the images are in memory."""
        return 0

    def _load(self, split: Split) -> dict[Split, Source]:
        digits = MemorySource(DigitImages())
        rows = split_rows(digits.stored.labels.numpy(), self.split_seed)
        return {name: MemorySource(digits.image_set, part.tolist()) for name, part in rows.items()}


def split_digits(seed: int) -> dict[Split, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Ink (N, 8, 8) from 0 to 16 and labels (N,) of each split."""
    images, labels = (part.numpy() for part in DigitImages().load())
    return {name: (images[rows, 0], labels[rows]) for name, rows in split_rows(labels, seed).items()}


def split_rows(labels: npt.NDArray[np.int64], seed: int) -> dict[Split, npt.NDArray[np.intp]]:
    """Split the digits, the classes in proportion: which of them are for training, validation and test."""
    rest, test = stratified_split(labels.tolist(), NUM_TEST, seed)
    train, val = stratified_split(labels[rest].tolist(), NUM_VAL, seed)
    return {"train": np.asarray(rest)[train], "val": np.asarray(rest)[val], "test": np.asarray(test)}


def to_ink(image: Image.Image) -> Tensor:
    """Turn any image into a float32 tensor of ink from 0 to 16, shape (1, H, W)."""
    if image.mode != "F":
        image = to_rgb(image).convert("L").convert("F")
    pixels: Tensor = v2.functional.pil_to_tensor(image)
    return pixels / INK
