"""Masks of images: Pascal VOC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_tricks.data.checked_arguments import check_root
from lit_tricks.data.datamodule import Split
from lit_tricks.data.detection.voc import VOC_CLASSES
from lit_tricks.data.samples import Source
from lit_tricks.data.segmentation.base import MaskFolders
from lit_tricks.utils.arguments import text
from lit_tricks.utils.files import read_text

__all__ = ["VOCSegmentation"]

MASK_LAYOUT = "expected are JPEGImages, SegmentationClass and ImageSets/Segmentation, as in VOCdevkit/VOC2012"


class VOCSegmentation(MaskFolders):
    """Pascal VOC ([Everingham et al., 2010](http://host.robots.ox.ac.uk/pascal/VOC/)): 20 classes and the background.

    Masks are the indices of their palette; 255, the border of objects, is ignored. Its test set has no masks,
    so there is no test. All else is as in ``SegmentationFolder``.

    Args:
        root: folder with ``JPEGImages``, ``SegmentationClass`` and ``ImageSets/Segmentation``.
        train_set: file in ``ImageSets/Segmentation`` that lists the training images: "train", or "trainval", which
            makes the figures of validation worthless, or "train_aug" of the [SBD](http://home.bharathh.info/pubs/codes/SBD).
        val_set: the same for validation.
        masks: folder of the masks, such as "SegmentationClassAug" for the SBD.
        kwargs: ``crop_size``, ``base_size``, ``scale``, ``flip``, ``batch_size``, ``num_workers``, ``mean``, ``std``,
            ``predict_dir`` and ``eval_size``, which ``lit-tricks show VOCSegmentation`` explains.

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
        **kwargs: Any,
    ) -> None:
        root = check_root(self, root)
        super().__init__(**kwargs)
        fix = "Give a name of VOC's folders."
        train_set, val_set = text(self, "train_set", train_set, fix), text(self, "val_set", val_set, fix)
        masks = text(self, "masks", masks, fix)
        self.root: Path = Path(root)
        self.masks = masks
        self.sets: dict[str, str] = {"train": train_set, "val": val_set}
        self.classes: list[str] = ["background", *VOC_CLASSES]

    @property
    def has_test(self) -> bool:
        """False: the masks of the test images are not public."""
        return False

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            raise self._no_test(self.root)
        file = self.root / "ImageSets" / "Segmentation" / f"{self.sets[split]}.txt"
        if not file.is_file():
            raise FileNotFoundError(f"there is no {str(file)!r}, the list of the images for {split}; {MASK_LAYOUT}")
        names = read_text(file).split()
        if not names:
            raise FileNotFoundError(f"{str(file)!r}, the list of the images for {split}, is empty")
        return {split: self._pairs(self.root / "JPEGImages", self.root / self.masks, names, MASK_LAYOUT)}
