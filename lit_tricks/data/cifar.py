"""CIFAR-10 and CIFAR-100, on torchvision's reader, in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from lit_tricks.data.checked_arguments import check_eval_size, check_root, check_seed
from lit_tricks.data.datamodule import Split, resize_size_for, stratified_split
from lit_tricks.data.memory.base import ImagesOn, MemoryDataModule
from lit_tricks.data.memory.batch_transforms import EvalBatch, Flip, Padding, TrainBatch
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.data.samples import Source
from lit_tricks.data.transforms import Transform, to_rgb
from lit_tricks.utils.arguments import MAX_SIDE, choice, flag, integer, invalid, numbers
from lit_tricks.utils.files import open_regular

__all__ = ["CIFAR10", "CIFAR100"]

SIZE = 32
ROOM = "An eighth of the side is usual."


MOST_BYTES = 2**30  # of the archive, or a file in it


@dataclass(frozen=True)
class CIFARFiles:
    """The training or the test images of a data set of torchvision's.

    Attributes:
        reader: class of torchvision.
        root: folder of the files.
        train: whether they are the training images.
        stamps: times of the last changes of the files, so that changed files are loaded anew.
    """

    reader: Any
    root: str
    train: bool
    stamps: tuple[int, ...]

    @classmethod
    def of(cls, reader: Any, root: str, train: bool) -> CIFARFiles:
        """Note the files that are there now."""
        names = reader.train_list if train else reader.test_list
        paths = (os.path.join(root, reader.base_folder, name) for name, _ in names)
        return cls(
            reader, root, train, tuple(os.stat(path).st_mtime_ns if os.path.exists(path) else 0 for path in paths)
        )

    def load(self) -> tuple[Tensor, Tensor]:
        """Load images (N, 3, 32, 32) and labels."""
        found = self.reader(self.root, train=self.train)
        images = torch.from_numpy(found.data.transpose(0, 3, 1, 2))  # which is the order that they have in the files
        return images.contiguous(), torch.tensor(found.targets)

    def to_image(self, pixels: Tensor) -> Image.Image:
        """Turn the pixels of one image into an RGB image."""
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def rgb_pixels(image: Image.Image) -> Tensor:
    """Turn any image into a uint8 tensor (3, H, W)."""
    pixels: Tensor = v2.functional.pil_to_tensor(to_rgb(image))
    return pixels


class CIFAR10(MemoryDataModule):
    """CIFAR-10: 60,000 color photographs of 32 x 32 pixels in 10 classes ([Krizhevsky, 2009][1]).

    The images are kept in memory, and whole batches are made at once, on the device that trains: training images are
    shifted by up to 4 pixels in each direction, black coming in, and half of them are flipped. All are normalized by
    mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435, 0.2616) on the scale 0-1.
    ``eval_transform`` takes any image: short side to ``eval_size`` (antialiased), center crop.

    [1]: https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf

    Args:
        root: folder that holds the files of the data set, or gets them by the download (170 MB).
        batch_size: images in a batch of one process, from 1 to the number of training images.
        download: download the files if they are not there.
        val_size: how many of the 50,000 training images are held out for validation, the classes in proportion.
            0 trains on all of them and validates on the test images: for a last run, when nothing is chosen any more.
            ``fit`` then reports their figures once, as validation.
        num_workers: processes that load, for each loader. "auto" is 0, which loads in the process that trains and is
            the fastest; for prediction from files, or if ``train_transform`` is replaced by a transform of single
            images, it shares the available cores among the processes of the machine, 16 at most.
        split_seed: decides which images are for validation; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is ``image_size``.
        image_size: side of the training images in pixels, at least 1.
        translate: most pixels by which a training image is shifted, up or down and left or right, from 0 to
            ``image_size - 1``. None is an eighth of ``image_size``, or 0 with ``crop_scale``.
        padding: what comes in at the sides of a shifted image: "zero" is black, "reflect" mirrors the image.
        flip: "random" flips half of the training images; "alternating" flips each image in every second epoch, half of
            them in the first ([Jordan, 2024](https://arxiv.org/abs/2404.00498)); "none" flips none.
        cutout: side of the square in a training image that is set to the mean, in pixels, from 0 to ``image_size``
            ([DeVries and Taylor, 2017](https://arxiv.org/abs/1708.04552)); it lies in the image.
        crop_scale: least and largest share of the area of a random crop, each in (0, 1], which is resized to
            ``image_size`` before all else. None crops nothing, and resizes the whole image.
        images_on: "device" keeps the images on the device that trains (154 MB), "host" in the host's memory, from where
            each batch is copied. "auto" is "device" if they take at most half of its free memory, and ``num_workers``
            is "auto" or 0. Where there is no room on the device, they stay in the host's memory.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the files are not there and ``download`` is false, or ``predict_dir`` holds no image.
        OSError: if the download fails.

    Example:
        ``data: {class_path: CIFAR10, init_args: {root: data, batch_size: 128}}``
    """

    _reader: Any = datasets.CIFAR10
    _class_names = "airplane automobile bird cat deer dog frog horse ship truck"
    _mean = (0.4914, 0.4822, 0.4465)
    _std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        download: bool = True,
        val_size: int = 5000,
        num_workers: int | Literal["auto"] = "auto",
        split_seed: int = 0,
        predict_dir: str | None = None,
        eval_size: int | None = None,
        image_size: int = SIZE,
        translate: int | None = None,
        padding: Padding = "zero",
        flip: Flip = "random",
        cutout: int = 0,
        crop_scale: tuple[float, float] | None = None,
        images_on: ImagesOn = "auto",
    ) -> None:
        root = check_root(self, root)
        super().__init__(batch_size, num_workers, predict_dir, images_on)
        image_size = integer(self, "image_size", image_size, 1, "32 keeps the images as they are.", MAX_SIDE)
        if crop_scale is not None:
            crop_scale = (least, most) = tuple(
                numbers(self, "crop_scale", crop_scale, "(0, 1]", "[0.25, 1.0] suits small images.", 2)
            )
            if least > most:
                raise invalid(self, "the least share of the area comes first. Swap them.", crop_scale=crop_scale)
        translate = integer(
            self, "translate", translate, 0, ROOM, image_size - 1, "an eighth of the side, or 0 with crop_scale"
        )
        cutout = integer(self, "cutout", cutout, 0, "Half the side or less is usual.", image_size)
        choice(self, "padding", padding, get_args(Padding))
        choice(self, "flip", flip, get_args(Flip))
        val_size = integer(self, "val_size", val_size, 0, "5000 is usual; 0 validates on the test images.", 50_000)
        download, split_seed = flag(self, "download", download), check_seed(self, split_seed)
        eval_size = check_eval_size(self, eval_size)
        self.save_hyperparameters()
        self.root = root
        self.download = download
        self.val_size = val_size
        self.split_seed = split_seed
        self.classes: list[str] = self._class_names.split()
        self.input_size: tuple[int, int, int] = (3, image_size, image_size)
        self.mean, self.std = (tuple(255 * share for share in shares) for shares in (self._mean, self._std))
        if translate is None:
            translate = 0 if crop_scale else round(image_size / 8)
        self.train_transform = TrainBatch(
            image_size, rgb_pixels, self.mean, self.std, translate, padding, flip, cutout, crop_scale
        )
        self.eval_transform = self.eval_transform_at(image_size if eval_size is None else eval_size)

    def prepare_data(self) -> None:
        """Download the files if they are not there, or raise an error; to predict, they are not needed."""
        if self.trainer is not None and self.trainer.predicting:
            return
        with self._explained(self.download):
            self._reader(self.root, train=False, download=self.download)

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class)."""
        return EvalBatch(image_size, resize_size_for(image_size, crop_ratio), rgb_pixels, self.mean, self.std)

    @property
    def has_test(self) -> bool:
        """False with ``val_size=0``, where the test images are the validation images."""
        return self.val_size > 0

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            return {"test": self._read(train=False)}
        if self.val_size == 0:
            return {"train": self._read(train=True)} if split == "train" else {"val": self.source("test")}
        images = self._read(train=True)
        most = len(images) - self.num_classes
        if not self.num_classes <= self.val_size <= most:
            raise ValueError(
                f"val_size={self.val_size} leaves a class without an image in validation or training: "
                f"use 0, or {self.num_classes} to {most}"
            )
        train, val = stratified_split(images.stored.labels.tolist(), self.val_size, self.split_seed)
        return {"train": MemorySource(images.image_set, train), "val": MemorySource(images.image_set, val)}

    def _read(self, train: bool) -> MemorySource:
        with self._explained():
            return MemorySource(CIFARFiles.of(self._reader, self.root, train))

    @contextlib.contextmanager
    def _explained(self, download: bool = False) -> Iterator[None]:
        """Explain the errors of torchvision's reader."""
        name, folder = type(self).__name__, os.path.join(self.root, self._reader.base_folder)
        by_hand = f"or unpack {self._reader.url} in root={self.root!r} yourself"
        try:
            self._require_regular_files(folder)
            yield
        except RuntimeError as error:  # what torchvision raises for missing and for damaged files
            remedy = "try again" if download else "call prepare_data()" if self.download else "set download=True"
            raise FileNotFoundError(
                f"files of {name} are missing or damaged in {folder!r}: {remedy}, {by_hand}"
            ) from error
        except OSError as error:
            raise OSError(f"{name} cannot be downloaded or read ({error}): try again, {by_hand}") from error

    def _require_regular_files(self, folder: str) -> None:
        """Raise an error for files that torchvision's reader would wait for, or read without an end."""
        reader = self._reader
        files = [*reader.train_list, *reader.test_list, (reader.meta["filename"],)]
        for path in (os.path.join(self.root, reader.filename), *(os.path.join(folder, name) for name, *_ in files)):
            if os.path.exists(path):
                open_regular(path, MOST_BYTES).close()


class CIFAR100(CIFAR10):
    """CIFAR-100: 60,000 color photographs of 32 x 32 pixels in 100 classes ([Krizhevsky, 2009][1]).

    Training, evaluation and arguments are the same as of ``CIFAR10``. Mean (0.5071, 0.4865, 0.4409) and standard
    deviation (0.2673, 0.2564, 0.2762) are of these images. The files take 169 MB.

    [1]: https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the files are not there and ``download`` is false, or ``predict_dir`` holds no image.
        OSError: if the download fails.

    Example:
        ``data: {class_path: CIFAR100, init_args: {root: data, batch_size: 128}}``
    """

    _reader: Any = datasets.CIFAR100
    _class_names = (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    )
    _mean = (0.5071, 0.4865, 0.4409)
    _std = (0.2673, 0.2564, 0.2762)
