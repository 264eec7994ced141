"""Images with masks: any folder, Pascal VOC, ADE20K, and scenes of digits that need no download."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_tricks.data._base import ImageDataModule, Split, check_at_least_one, resize_size_for
from lit_tricks.data._listing import Paths
from lit_tricks.data._pairs import EvalPair, Pairs, RandomPair
from lit_tricks.data._samples import JointSamples, Source
from lit_tricks.data._scenes import DigitScenes
from lit_tricks.data._workers import EvalLoader
from lit_tricks.data.transforms import Transform

__all__ = ["ADE20KSegmentation", "DigitSegmentation", "MaskDataModule", "SegmentationFolder", "VOCSegmentation"]

Triple = tuple[float, float, float]

MEAN: Triple = (123.68, 116.779, 103.939)
STD: Triple = (58.393, 57.12, 57.375)
SCENE, SCENE_MEAN, SCENE_STD = 64, 31.97, 53.16  # side of a scene in pixels, and of the pixels in the training scenes
SHOWN = 3  # files in an error message
LOOKED_AT = 32  # masks
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_LAYOUT = "expected are JPEGImages, SegmentationClass and ImageSets/Segmentation, as in VOCdevkit/VOC2012"
FOLDER_LAYOUT = "expected are ROOT/train/images/NAME.jpg, ROOT/train/masks/NAME.png, and the same below ROOT/val"
ADE_LAYOUT = (
    "expected are images/training, images/validation, and the same below annotations, as in ADEChallengeData2016"
)
ADE_FOLDERS = {"train": "training", "val": "validation", "test": "validation"}


class MaskDataModule(ImageDataModule, ABC):
    """Base: batches are (images, masks): float32 (N, C, H, W), normalised, and int64 (N, H, W).

    A label of a mask is a class or ``ignore_index``. Training images have their short side resized to a random length
    and are cropped at random; those of validation and test are resized and cropped at the centre. An image for
    prediction is resized, not cropped, and a batch of its own, as sizes differ.
    """

    sample_type = JointSamples
    ignore_index = 255

    def _set_transforms(
        self,
        size: int,
        base_size: int,
        scale: tuple[float, float],
        flip: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        eval_size: int | None,
    ) -> None:
        """Make the transforms (see ``SegmentationFolder`` for the arguments)."""
        check_at_least_one("crop_size", size)
        check_at_least_one("base_size", base_size)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be the least and the greatest factor, above 0, got {scale}")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must be a number for each channel, those of std above 0, got {mean}, {std}")
        self.input_size = (len(mean), size, size)
        self.mean, self.std = mean, std
        self.eval_transform = self.eval_transform_at(size if eval_size is None else eval_size)
        least, most = (max(1, int(base_size * factor)) for factor in scale)
        self.train_transform = RandomPair(size, (least, most), flip, mean, std, self.ignore_index)  # type: ignore[assignment]

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class); it takes images with their masks."""
        return EvalPair(image_size, resize_size_for(image_size, crop_ratio), self.mean, self.std)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Give (image, path) of the files below ``predict_dir``, sorted by path, one at a time."""
        loader = super().predict_dataloader()
        samples: Any = loader.dataset
        return EvalLoader(samples, **self._loader_args(samples) | {"batch_size": 1})


class _Folders(MaskDataModule, ABC):
    """Base of what is in files."""

    def _pairs(self, images: Path, masks: Path, names: Iterable[str], layout: str, offset: int = 0) -> Pairs:
        """Pair images and masks by their names without ending."""
        found = {"image": _files(images, layout), "mask": _files(masks, layout)}
        names = list(names)
        for kind, folder in (("image", images), ("mask", masks)):
            missing = [name for name in names if name not in found[kind]]
            if missing:
                more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
                raise FileNotFoundError(
                    f"no {kind} in {str(folder)!r} for {', '.join(map(repr, missing[:SHOWN]))}{more}: each image needs "
                    "a mask of the same name (the ending may differ)"
                )
        paths = {
            kind: Paths(str(folder), [os.fsencode(found[kind][name]) for name in names])
            for kind, folder in (("image", images), ("mask", masks))
        }
        return Pairs(paths["image"], paths["mask"], self.num_classes, self.ignore_index, offset)


class SegmentationFolder(_Folders):
    """Images and masks of one name: ``root/train/images/NAME.jpg``, ``root/train/masks/NAME.png``, ``root/val/...``.

    A mask has one channel, or a palette, whose values are labels: 0 for the first class. Without ``root/test`` the test
    is on ``root/val``. The defaults are those of the FCN in [Bag of Tricks](https://arxiv.org/abs/1812.01187), section
    6.2, as in GluonCV: in training the short side is resized to 0.5 to 2 times 520 pixels, and a crop of 480 is flipped
    for every second image (their rotation by up to 10 degrees and blur are left out); otherwise the short side is
    resized to 480, and the centre cropped, masks alike.

    Args:
        root: folder with ``train``, ``val`` and perhaps ``test``.
        classes: their names, in the order of the labels; None reads ``root/classes.txt``, a name a line.
        crop_size: side of the images as the model sees them in pixels, at least 1.
        base_size: length of the short side that ``scale`` multiplies, in pixels, at least 1.
        scale: least and greatest factor on the short side in training, above 0; [1, 1] scales nothing.
        flip: whether every second training image is flipped horizontally; not where left and right matter.
        batch_size: images in a batch of one process, from 1 to the number of training images.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        ignore_index: label of pixels that are no class, as borders; the model's must be the same. Where a training
            image is smaller than the crop, the rest gets it.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (image, path).
        eval_size: side of the images in validation and test, and short side in prediction, in pixels; None is
            ``crop_size``.

    Raises:
        ValueError: if an argument is out of range, and while loading for a mask with another size than its image, or
            with labels out of range; the message names the file.
        FileNotFoundError: if a folder is missing or empty, or an image has no mask, or a mask no image.
        RuntimeError: while loading, for an image that cannot be read, which the message names.

    Example:
        ``data: {class_path: SegmentationFolder, init_args: {root: cells, classes: [ground, cell]}}``
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | None = None,
        crop_size: int = 480,
        base_size: int = 520,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        ignore_index: int = 255,
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
        eval_size: int | None = None,
    ) -> None:
        root = os.fspath(root)
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self.root = Path(root)
        self.ignore_index = ignore_index
        self.classes = list(classes) if classes else self._read_classes()
        if 0 <= ignore_index < len(self.classes):
            raise ValueError(f"ignore_index={ignore_index} is one of the {len(self.classes)} classes: take another one")
        self._set_transforms(crop_size, base_size, scale, flip, mean, std, eval_size)

    def _read_classes(self) -> list[str]:
        if self.predict_dir is not None and not self.root.is_dir():
            return []  # a checkpoint knows its classes, and the folders that it was trained on need not be there
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={str(self.root)!r} is not a folder; {FOLDER_LAYOUT}")
        file = self.root / "classes.txt"
        if not file.is_file():
            raise FileNotFoundError(
                f"no classes.txt in root={str(self.root)!r}: write one, with the name of a class in each line, that of "
                "label 0 first; or give classes=[...]"
            )
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"{str(file)!r} must have two names or more, each once, and has {names}")
        return names

    def _load(self, split: Split) -> dict[Split, Source]:
        folder = self.root / split
        if split == "test" and not folder.is_dir():
            return {"test": self._source("val")}
        images, masks = folder / "images", folder / "masks"
        names = _files(images, FOLDER_LAYOUT).keys() | _files(masks, FOLDER_LAYOUT).keys()
        pairs = self._pairs(images, masks, sorted(names), FOLDER_LAYOUT)
        if split == "train":
            self._require_classes(pairs)
        return {split: pairs}

    def _require_classes(self, pairs: Pairs) -> None:
        """Find masks of 0 and 255, black and white, of which the latter would be ignored."""
        looked = np.linspace(0, len(pairs) - 1, min(LOOKED_AT, len(pairs))).astype(int)
        seen = set().union(*(np.unique(pairs.labels(index)).tolist() for index in looked))
        if self.ignore_index in seen and len(seen) <= 2:
            raise ValueError(
                f"the masks in {pairs.masks.root!r} have the labels {sorted(seen)}, of which {self.ignore_index} is "
                "ignored, so that there is nothing to tell apart: number the classes 0, 1, ..., or give another "
                "ignore_index, as -1"
            )


class VOCSegmentation(_Folders):
    """Pascal VOC ([Everingham et al., 2010](http://host.robots.ox.ac.uk/pascal/VOC/)): 20 classes and the background.

    Masks are the indices of their palette; 255, the border of objects, is ignored. Its test set has no masks: the test
    is on the validation images. All else is as in ``SegmentationFolder``.

    Args:
        root: folder with ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation``.
        train_set: file in ``ImageSets/Segmentation`` that lists the training images: "train", or "trainval", which
            makes the figures of validation worthless, or "train_aug" of the [SBD](http://home.bharathh.info/pubs/codes/SBD).
        val_set: the same for validation.
        masks: folder of the masks, such as "SegmentationClassAug" for the SBD.
        crop_size: see ``SegmentationFolder``, as for all that follows.
        base_size: length of the short side that ``scale`` multiplies, in pixels.
        scale: least and greatest factor on the short side in training.
        flip: whether every second training image is flipped.
        batch_size: images in a batch of one process.
        num_workers: processes that load, for each loader.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
        predict_dir: folder of images to predict.
        eval_size: side of the images in validation and test, and short side in prediction; None is ``crop_size``.

    Raises:
        ValueError: as ``SegmentationFolder``.
        FileNotFoundError: as ``SegmentationFolder``, and for a list of images that is missing or empty.

    Example:
        ``data: {class_path: VOCSegmentation, init_args: {root: VOCdevkit/VOC2012}}``
    """

    def __init__(
        self,
        root: str,
        train_set: str = "train",
        val_set: str = "val",
        masks: str = "SegmentationClass",
        crop_size: int = 480,
        base_size: int = 520,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
        eval_size: int | None = None,
    ) -> None:
        root = os.fspath(root)
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self.root, self.masks = Path(root), masks
        self.sets = {"train": train_set, "val": val_set, "test": val_set}
        self.classes = list(VOC_CLASSES)
        self._set_transforms(crop_size, base_size, scale, flip, mean, std, eval_size)

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            return {"test": self._source("val")}
        file = self.root / "ImageSets" / "Segmentation" / f"{self.sets[split]}.txt"
        if not file.is_file():
            raise FileNotFoundError(f"there is no {str(file)!r}, the list of the images for {split}; {VOC_LAYOUT}")
        names = file.read_text(encoding="utf-8").split()
        if not names:
            raise FileNotFoundError(f"{str(file)!r}, the list of the images for {split}, is empty")
        return {split: self._pairs(self.root / "JPEGImages", self.root / self.masks, names, VOC_LAYOUT)}


class ADE20KSegmentation(_Folders):
    """ADE20K as in the Scene Parsing Challenge ([Zhou et al., 2017](https://arxiv.org/abs/1608.05442)): 150 classes.

    Label 0 of the files, "other", is ignored, and 1 to 150 become 0 to 149. Names are read from ``objectInfo150.txt``
    where it is there. The test is on the validation images. All else is as in ``SegmentationFolder``.

    Args:
        root: folder with ``images`` and ``annotations``, each with ``training`` and ``validation``.
        crop_size: see ``SegmentationFolder``, as for all that follows.
        base_size: length of the short side that ``scale`` multiplies, in pixels.
        scale: least and greatest factor on the short side in training.
        flip: whether every second training image is flipped.
        batch_size: images in a batch of one process.
        num_workers: processes that load, for each loader.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
        predict_dir: folder of images to predict.
        eval_size: side of the images in validation and test, and short side in prediction; None is ``crop_size``.

    Raises:
        ValueError: as ``SegmentationFolder``.
        FileNotFoundError: as ``SegmentationFolder``.

    Example:
        ``data: {class_path: ADE20KSegmentation, init_args: {root: ADEChallengeData2016}}``
    """

    def __init__(
        self,
        root: str,
        crop_size: int = 480,
        base_size: int = 520,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
        eval_size: int | None = None,
    ) -> None:
        root = os.fspath(root)
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self.root = Path(root)
        self.classes = _ade_classes(self.root / "objectInfo150.txt")
        self._set_transforms(crop_size, base_size, scale, flip, mean, std, eval_size)

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            return {"test": self._source("val")}
        images, masks = (self.root / kind / ADE_FOLDERS[split] for kind in ("images", "annotations"))
        names = _files(images, ADE_LAYOUT).keys() | _files(masks, ADE_LAYOUT).keys()
        return {split: self._pairs(images, masks, sorted(names), ADE_LAYOUT, offset=1)}


class DigitSegmentation(MaskDataModule):
    """Scenes of one to four handwritten digits: 64 x 64 grey pixels in 11 classes, the ground and the ten digits.

    The digits are scikit-learn's (see ``Digits``), of random sizes at random places on a noisy ground, and a mask is
    where their ink is. 1000 scenes of the training digits, 200 of those for validation, 200 of those for the test. In
    training the side is scaled by 0.8 to 1.25, and a crop of 64 taken; nothing is flipped. Normalised by the mean and
    standard deviation of the pixels.

    Args:
        batch_size: images in a batch of one process, 1 to 1000.
        num_workers: loading processes; "auto" is 0 here, as a scene is drawn in less than a millisecond.
        split_seed: decides which digits are for training, validation and test; any integer from 0 to 2**32 - 1.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (image, path), in grey.
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
        self.split_seed = split_seed
        self.classes = ["ground", *map(str, range(10))]
        self._set_transforms(SCENE, SCENE, (0.8, 1.25), False, (SCENE_MEAN,), (SCENE_STD,), eval_size)

    def _auto_workers(self) -> int:
        return 0

    def _load(self, split: Split) -> dict[Split, Source]:
        return {split: _Scenes(DigitScenes(split, self.split_seed, SCENE))}


class _Scenes:
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


def _files(folder: Path, layout: str) -> dict[str, str]:
    """The image files in a folder, at any depth, by their path in it without the ending.

    Raises:
        FileNotFoundError: if it is missing or empty.
        ValueError: if two have the same name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; {layout}")
    found: dict[str, str] = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for name in names:
            stem, ending = os.path.splitext(os.path.relpath(os.path.join(root, name), folder))
            if ending.lower() not in IMG_EXTENSIONS:
                continue
            if stem in found:
                raise ValueError(f"{str(folder)!r} has both {found[stem]!r} and {stem + ending!r}: remove one of them")
            found[stem] = stem + ending
    if not found:
        raise FileNotFoundError(f"no image in {str(folder)!r}: files must end in {' '.join(IMG_EXTENSIONS)}; {layout}")
    return found


def _ade_classes(file: Path) -> list[str]:
    """Names of the 150 classes: the last column of the file, or their numbers in it."""
    if not file.is_file():
        return [str(number) for number in range(1, 151)]
    _, *rows = file.read_text(encoding="utf-8").splitlines()
    names = [row.split("\t")[-1].strip() for row in rows if row.strip()]
    if len(names) != 150:
        raise ValueError(f"{str(file)!r} must have a head and 150 classes, and has {len(names)}")
    return names
