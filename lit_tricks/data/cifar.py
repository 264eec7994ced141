"""CIFAR-10 and CIFAR-100, on torchvision's reader."""

from __future__ import annotations

import os
from typing import Any, Literal

from torch.utils.data import Subset
from torchvision import datasets
from torchvision.transforms import v2

from lit_tricks.data.datamodule import ImageDataModule, Split, resize_size_for, stratified_split
from lit_tricks.data.samples import Source
from lit_tricks.data.transforms import Transform, eval_transform, to_pixels, to_rgb

__all__ = ["CIFAR10", "CIFAR100"]

SIZE = 32
Statistics = tuple[float, float, float]  # of the channels R, G, B


class CIFAR10(ImageDataModule):
    """CIFAR-10: 60,000 colour photographs of 32 x 32 pixels in 10 classes ([Krizhevsky, 2009][1]).

    Training images are padded by 4 pixels, cropped to 32 x 32 at random and flipped for every second image. All are
    normalised by mean (0.4914, 0.4822, 0.4465) and standard deviation (0.2470, 0.2435, 0.2616) on the scale 0-1.
    ``eval_transform`` takes any image: short side to 32 pixels (antialiased), centre crop.

    [1]: https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf

    Args:
        root: folder that holds ``cifar-10-batches-py``, or gets it by the download (170 MB).
        batch_size: images in a batch of one process, from 1 to the number of training images.
        download: download the files if they are not there.
        val_size: how many of the 50,000 training images are held out for validation, the classes in proportion.
            0 trains on all of them and validates on the test images: for a last run, when nothing is chosen any more.
            ``fit`` then reports their figures once, as validation.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of
            the machine, 16 at most; 0 loads in the main process.
        split_seed: decides which images are for validation; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is 32.

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
    ) -> None:
        root = os.fspath(root)  # a Path among the hyper-parameters would keep checkpoints from loading safely
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        if not isinstance(val_size, int) or val_size < 0:
            raise ValueError(f"val_size must be an integer of at least 0, got {val_size!r}")
        self.root = root
        self.download = download
        self.val_size = val_size
        self.split_seed = split_seed
        self.classes = self._class_names.split()
        self.input_size = (3, SIZE, SIZE)
        self.mean, self.std = self._pixel_statistics()
        augment = [v2.RandomCrop(SIZE, padding=4), v2.RandomHorizontalFlip()]
        self.train_transform = v2.Compose([to_rgb, *augment, to_pixels, v2.Normalize(*self._pixel_statistics())])
        self.eval_transform = self.eval_transform_at(SIZE if eval_size is None else eval_size)  # 32 leaves it as it is

    def prepare_data(self) -> None:
        """Download the files, or complain, if they are not there; to predict, they need not be."""
        if self.trainer is not None and self.trainer.predicting:
            return
        self._read(train=False, download=self.download)

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class)."""
        return eval_transform(image_size, resize_size_for(image_size, crop_ratio), *self._pixel_statistics())

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
        train, val = stratified_split(images.targets, self.val_size, self.split_seed)
        return {"train": Subset(images, train), "val": Subset(images, val)}

    def _pixel_statistics(self) -> tuple[Statistics, Statistics]:
        """Mean and standard deviation on the 0-255 scale."""
        mean, std = ((255 * r, 255 * g, 255 * b) for r, g, b in (self._mean, self._std))
        return mean, std

    def _read(self, train: bool, download: bool = False) -> Any:
        name, folder = type(self).__name__, os.path.join(self.root, self._reader.base_folder)
        by_hand = f"or unpack {self._reader.url} in root={self.root!r} yourself"
        try:
            return self._reader(self.root, train=train, download=download)
        except RuntimeError as error:  # what torchvision raises for missing and for damaged files
            remedy = "try again" if download else "call prepare_data()" if self.download else "set download=True"
            raise FileNotFoundError(
                f"files of {name} are missing or damaged in {folder!r}: {remedy}, {by_hand}"
            ) from error
        except OSError as error:
            raise OSError(f"{name} cannot be downloaded or read ({error}): try again, {by_hand}") from error


class CIFAR100(CIFAR10):
    """CIFAR-100: 60,000 colour photographs of 32 x 32 pixels in 100 classes ([Krizhevsky, 2009][1]).

    Training images are padded by 4 pixels, cropped to 32 x 32 at random and flipped for every second image. All are
    normalised by mean (0.5071, 0.4865, 0.4409) and standard deviation (0.2673, 0.2564, 0.2762) on the scale 0-1.
    ``eval_transform`` takes any image: short side to 32 pixels (antialiased), centre crop.

    [1]: https://www.cs.toronto.edu/~kriz/learning-features-2009-TR.pdf

    Args:
        root: folder that holds ``cifar-100-python``, or gets it by the download (169 MB).
        batch_size: images in a batch of one process, from 1 to the number of training images.
        download: download the files if they are not there.
        val_size: how many of the 50,000 training images are held out for validation, the classes in proportion.
            0 trains on all of them and validates on the test images: for a last run, when nothing is chosen any more.
            ``fit`` then reports their figures once, as validation.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of
            the machine, 16 at most; 0 loads in the main process.
        split_seed: decides which images are for validation; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is 32.

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
