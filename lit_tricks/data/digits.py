"""The handwritten digits of scikit-learn: a real data set that needs no download and trains in seconds."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lit_tricks.data.datamodule import ImageDataModule, Split, check_at_least_one, resize_size_for, stratified_split
from lit_tricks.data.samples import Source
from lit_tricks.data.transforms import Transform, to_rgb

__all__ = ["Digits"]

SIZE = 8
INK = 255 / 16  # the digits count ink from 0 to 16, images go to 255; exact in binary
NUM_TEST, NUM_VAL = 360, 180
MEAN, STD = 4.88, 6.02  # of the ink in the training images of split_seed=0


class Digits(ImageDataModule):
    """Handwritten digits: 1797 grey images of 8 x 8 pixels in 10 classes, bright ink on dark ground.

    They come with scikit-learn ([Alpaydin and Kaynak, 1998](https://doi.org/10.24432/C50P49)). 1257 are for training,
    180 for validation, 360 for the test, the classes in proportion. Training images are shifted by up to one pixel in
    each direction; they are not flipped. Normalised by mean 4.88 and standard deviation 6.02 on the ink scale 0-16.

    ``eval_transform`` takes any image: made grey, squeezed to 8 x 8 (antialiased), 255 counting as 16.

    Args:
        batch_size: images in a batch of one process, 1 to 1257.
        num_workers: loading processes; "auto" is 0 here, as the images are in memory and tiny.
        split_seed: decides which images are for training, validation and test; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is ``image_size``.
        image_size: side of the training images in pixels, at least 1; the digits are scaled to it (bilinear), and the
            shift grows with it.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if ``predict_dir`` is not a folder, or holds no image.

    Example:
        ``data: {class_path: Digits, init_args: {batch_size: 128}}``
    """

    crop_mode = "squash"

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int | Literal["auto"] = "auto",
        split_seed: int = 0,
        predict_dir: str | None = None,
        eval_size: int | None = None,
        image_size: int = SIZE,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        check_at_least_one("image_size", image_size)
        self.save_hyperparameters()
        self.split_seed = split_seed
        self.classes = [str(digit) for digit in range(10)]
        self.input_size = (1, image_size, image_size)
        self.mean, self.std = (MEAN * INK,), (STD * INK,)
        normalize = v2.Normalize([MEAN], [STD])
        # Padded with 0, which is the ground the digits are written on: hence before the normalisation.
        shift = v2.RandomCrop(image_size, padding=round(image_size / SIZE))
        self.train_transform = v2.Compose([partial(to_ink, size=image_size), shift, normalize])
        self.eval_transform = self.eval_transform_at(image_size if eval_size is None else eval_size)

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class)."""
        to_size = partial(to_ink, size=resize_size_for(image_size, crop_ratio))
        return v2.Compose([to_size, v2.CenterCrop(image_size), v2.Normalize([MEAN], [STD])])  # type: ignore[no-any-return]

    def auto_workers(self) -> int:
        """Return 0: the images are in memory."""
        return 0

    def _load(self, split: Split) -> dict[Split, Source]:
        return {name: _Ink(*part) for name, part in split_digits(self.split_seed).items()}


def split_digits(seed: int) -> dict[Split, tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """Ink (N, 8, 8) from 0 to 16 and labels (N,) of each split."""
    from sklearn.datasets import load_digits  # here, because its import takes more than half a second

    digits = load_digits()
    rest, test = stratified_split(digits.target, NUM_TEST, seed)
    train, val = stratified_split(digits.target[rest], NUM_VAL, seed)
    parts: dict[Split, npt.NDArray[np.intp]] = {
        "train": np.asarray(rest)[train],
        "val": np.asarray(rest)[val],
        "test": np.asarray(test),
    }
    return {name: (digits.images[part], digits.target[part]) for name, part in parts.items()}


def to_ink(image: Image.Image, size: int = SIZE) -> Tensor:
    """Turn any image into a float32 tensor of ink from 0 to 16, shape (1, size, size)."""
    if image.mode != "F":
        image = to_rgb(image).convert("L").convert("F")
    image = image.resize((size, size), Image.Resampling.BILINEAR)  # antialiased where it shrinks
    pixels: Tensor = v2.functional.pil_to_tensor(image)
    return pixels / INK


class _Ink:
    """Digits as images with 255 as full ink, in floating point because 8 bits would round the ink."""

    def __init__(self, images: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> None:
        self.images = (images * INK).astype(np.float32)
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]
