"""Objects in images: COCO, and whatever is in its format."""

from __future__ import annotations

import os
from typing import Literal

from lit_tricks.data.color import MEAN, STD, Triple
from lit_tricks.data.datamodule import Split
from lit_tricks.data.detection.base import DetectionDataModule
from lit_tricks.data.detection.boxes import BoxFiles, OnBadBox
from lit_tricks.data.detection.coco_file import read_coco
from lit_tricks.data.samples import Source

__all__ = ["CocoDetection"]


class CocoDetection(DetectionDataModule):
    """Images in a folder, and their objects in one JSON file for each split, in the format of COCO.

    As COCO 2017 lies on disk: ``root/train2017/*.jpg``, ``root/annotations/instances_train2017.json``, and the same
    with ``val2017``. The classes are the file's categories in the order of their ids, numbered from 1; train and val
    must have the same. Without annotations of a test, the test is on the validation images. Crowds are not trained on.
    Training images are flipped with probability 1/2. See the base class for what a batch is.

    Args:
        root: folder that the next two are in.
        images: folder of the images of a split; ``{split}`` stands for train, val or test.
        annotations: file of the annotations of a split.
        batch_size: images in a batch of one process, at least 1.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        flip: probability that a training image is flipped from left to right, 0 to 1.
        scale: range of the factor by which a training picture grows or shrinks in its frame, as (0.5, 2.0).
        on_bad_box: "raise" stops at a box outside of its image, or without an area; "skip" leaves such out, and tells
            how many. COCO has some.
        mean: of the channels R, G, B on the 0-255 scale: those that the backbone's weights were trained with.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).

    Raises:
        ValueError: if an argument is out of range, a file is damaged, or an annotation can not be right.
        FileNotFoundError: if a folder, a file or an image is missing.

    Example:
        ``data: {class_path: CocoDetection, init_args: {root: coco, on_bad_box: skip}}``
    """

    def __init__(
        self,
        root: str,
        images: str = "{split}2017",
        annotations: str = "annotations/instances_{split}2017.json",
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
        self.root, self.images, self.annotations, self.on_bad_box = root, images, annotations, on_bad_box
        self.classes: list[str] = []
        if predict_dir is None or os.path.isdir(root):  # to predict, the data need not be there
            # the smaller file of the two that must agree
            self.classes = self._read("val")

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and not os.path.isfile(self._path(self.annotations, "test")):
            return {"test": self._source("val")}
        classes = self._read(split)
        if classes != self.classes:
            raise ValueError(
                f"{self._path(self.annotations, split)!r} has {len(classes)} categories and "
                f"{self._path(self.annotations, 'val')!r} {len(self.classes)}, or others; only one of them has "
                f"{', '.join(sorted({*classes} ^ {*self.classes})[:5]) or 'them in this order'}: they must be the same"
            )
        return {split: self._sources[split]}

    def _read(self, split: Split) -> list[str]:
        """Keep the images of a split, and give its classes."""
        if split in self._sources:
            return self.classes
        file, folder = self._path(self.annotations, split), self._path(self.images, split)
        classes, pictures = read_coco(file, folder, self.on_bad_box)
        self._sources[split] = BoxFiles(pictures, self._read_image, split == "train", self.on_bad_box)
        return classes

    def _path(self, pattern: str, split: Split) -> str:
        return os.path.join(self.root, pattern.format(split=split))
