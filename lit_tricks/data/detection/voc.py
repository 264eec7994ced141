"""Pascal VOC: the boxes of its objects, and their masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lit_tricks.data.color import MEAN, STD, Triple
from lit_tricks.data.datamodule import Split
from lit_tricks.data.detection.base import DetectionDataModule
from lit_tricks.data.detection.boxes import BoxFiles, OnBadBox, Picture
from lit_tricks.data.detection.voc_file import read_voc
from lit_tricks.data.samples import Source
from lit_tricks.data.segmentation.base import MaskFolders

__all__ = ["VOC_CLASSES", "VOCDetection", "VOCSegmentation"]

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
MASK_LAYOUT = "expected are JPEGImages, SegmentationClass and ImageSets/Segmentation, as in VOCdevkit/VOC2012"


class VOCDetection(DetectionDataModule):
    """Images and objects in the layout of [Pascal VOC](http://host.robots.ox.ac.uk/pascal/VOC/).

    That is ``FOLDER/JPEGImages/*.jpg``, ``FOLDER/Annotations/*.xml`` and lists of images in
    ``FOLDER/ImageSets/Main/SET.txt``. Its pixels are counted from 1, so that a box (1, 1, w, h) becomes (0, 0, w, h).
    Difficult objects are not trained on, and not counted in the evaluation. Training images are flipped with
    probability 1/2. See the base class for what a batch is.

    Args:
        root: folder that the folders below are in; of VOC it is ``VOCdevkit``.
        train: lists of the training images, as FOLDER/SET: the defaults are the paper's, both years' ``trainval``.
        val: lists of the validation images. There is none beside the test of 2007, so that this is it, as in published
            figures.
        test: lists of the test images; None is ``val``.
        classes: names of the classes in the order of their labels, which start at 1; None are the 20 of VOC.
        batch_size: images in a batch of one process, at least 1.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        flip: probability that a training image is flipped from left to right, 0 to 1.
        scale: range of the factor by which a training picture grows or shrinks in its frame, as (0.5, 2.0).
        on_bad_box: "raise" stops at a box outside of its image, or without an area; "skip" leaves such out, and tells
            how many.
        mean: of the channels R, G, B on the 0-255 scale: those that the backbone's weights were trained with.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).

    Raises:
        ValueError: if an argument is out of range, a file is damaged, or an annotation can not be right.
        FileNotFoundError: if a folder, a file or an image is missing.

    Example:
        ``data: {class_path: VOCDetection, init_args: {root: VOCdevkit}}``
    """

    def __init__(
        self,
        root: str,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] = ("VOC2007/test",),
        test: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        flip: float = 0.5,
        scale: tuple[float, float] = (1.0, 1.0),
        on_bad_box: OnBadBox = "raise",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
    ) -> None:
        root = os.fspath(root)
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self._set_transforms(mean, std, flip, scale, on_bad_box)
        self.root, self.on_bad_box = root, on_bad_box
        self.lists: dict[Split, list[str]] = {"train": list(train), "val": list(val), "test": list(test or val)}
        for split, lists in self.lists.items():
            if not lists or not all(isinstance(each, str) for each in lists):
                raise ValueError(f"{split}={lists!r} must be lists of images, as ['VOC2007/trainval']")
        self.classes = list(VOC_CLASSES if classes is None else classes)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes={self.classes!r} must be names, each once")
        if predict_dir is None and not os.path.isdir(root):
            raise FileNotFoundError(f"root={root!r} is not a folder: give that of VOC2007 and VOC2012, or of your own")

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and self.lists["test"] == self.lists["val"]:
            return {"test": self._source("val")}
        pictures: list[Picture] = []
        for each in self.lists[split]:
            folder, name = os.path.split(each)
            pictures += read_voc(os.path.join(self.root, folder), name, self.classes, self.on_bad_box)
        return {split: BoxFiles(pictures, self._read_image, split == "train", self.on_bad_box)}


class VOCSegmentation(MaskFolders):
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
        self.classes = ["background", *VOC_CLASSES]
        self._set_transforms(crop_size, base_size, scale, flip, mean, std, eval_size)

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            return {"test": self._source("val")}
        file = self.root / "ImageSets" / "Segmentation" / f"{self.sets[split]}.txt"
        if not file.is_file():
            raise FileNotFoundError(f"there is no {str(file)!r}, the list of the images for {split}; {MASK_LAYOUT}")
        names = file.read_text(encoding="utf-8").split()
        if not names:
            raise FileNotFoundError(f"{str(file)!r}, the list of the images for {split}, is empty")
        return {split: self._pairs(self.root / "JPEGImages", self.root / self.masks, names, MASK_LAYOUT)}
