"""Objects in images: Pascal VOC."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lit_tricks.data.checked_arguments import check_classes, check_root
from lit_tricks.data.datamodule import Split
from lit_tricks.data.detection.base import DetectionFolders
from lit_tricks.data.detection.boxes import (
    Box,
    BoxFiles,
    OnBadBox,
    Picture,
    add_object,
    require_files,
    some_of,
    warn_of_skipped,
)
from lit_tricks.data.io.file_index import find_images
from lit_tricks.data.samples import Source
from lit_tricks.utils.arguments import texts
from lit_tricks.utils.files import read_regular, read_text

__all__ = ["VOC_CLASSES", "VOCDetection", "read_voc"]

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


class VOCDetection(DetectionFolders):
    """Images and objects in the layout of [Pascal VOC](http://host.robots.ox.ac.uk/pascal/VOC/).

    The layout has ``FOLDER/JPEGImages/*.jpg``, ``FOLDER/Annotations/*.xml`` and lists of images in
    ``FOLDER/ImageSets/Main/SET.txt``. VOC counts pixels from 1, so a box (1, 1, w, h) becomes (0, 0, w, h). Difficult
    objects are not trained on, and not counted in the evaluation. Training images are flipped with probability 1/2. See
    the base class for what a batch is.

    Args:
        root: folder of the folders below; for VOC it is ``VOCdevkit``.
        train: lists of the training images, as FOLDER/SET: the defaults are the paper's, both years' ``trainval``.
        val: lists of the validation images. VOC has no other split than the test of 2007, which published figures also
            use.
        test: lists of the test images. There is no test with None, or with the lists of ``val``.
        classes: names of the classes in the order of their labels, which start at 1; None are the 20 of VOC.
        kwargs: ``batch_size``, ``num_workers``, ``flip``, ``scale``, ``on_bad_box``, ``mean``, ``std`` and
            ``predict_dir``, which ``lit-tricks show VOCDetection`` explains.

    Raises:
        ValueError: if an argument is out of range, a file is damaged, or an annotation is invalid.
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
        **kwargs: Any,
    ) -> None:
        root = check_root(self, root)
        super().__init__(**kwargs)
        self.root = root
        fix = "Give lists of images, as ['VOC2007/trainval']."
        self.lists: dict[Split, list[str]] = {
            "train": texts(self, "train", train, fix), "val": texts(self, "val", val, fix)
        }  # fmt: skip
        if (tested := texts(self, "test", test, fix, "the lists of val")) is not None:
            self.lists["test"] = tested
        self.classes: list[str] = check_classes(self, classes, "the classes of VOC") or list(VOC_CLASSES)
        if self.predict_dir is None and not os.path.isdir(root):
            raise FileNotFoundError(
                f"root={root!r} is not a folder: set root to the folder of VOC2007 and VOC2012, or of your own data"
            )

    @property
    def has_test(self) -> bool:
        """Return whether ``test`` names other lists than ``val``."""
        return self.lists.get("test", self.lists["val"]) != self.lists["val"]

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and not self.has_test:
            raise self._no_test(self.root, "Give its lists as test=['FOLDER/SET']")
        pictures: list[Picture] = []
        for each in self.lists[split]:
            folder, name = os.path.split(each)
            pictures += read_voc(os.path.join(self.root, folder), name, self.classes, self.on_bad_box)
        return {split: BoxFiles(pictures, self._file_reader(), split == "train", self.on_bad_box)}


MOST_BYTES = 2**24  # of the annotations of one image
SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(folder: str, name: str, classes: Sequence[str], on_bad_box: OnBadBox) -> list[Picture]:
    """Read annotations in the layout of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/).

    VOC counts pixels from 1, and the last pixel belongs to the box: (1, 1, w, h) covers an image, and becomes (0, 0, w,
    h).

    Args:
        folder: with JPEGImages, Annotations and ImageSets/Main.
        name: of the list in ImageSets/Main, without ``.txt``.
        classes: names of the classes, in the order of their labels.
        on_bad_box: "raise", or "skip".

    Raises:
        FileNotFoundError: if a folder, the list, an annotation or an image is not there.
        ValueError: for an empty list, or a damaged or invalid annotation; the message names the file.
    """
    stems = _listed(folder, name)
    images = os.path.join(folder, "JPEGImages")
    if not os.path.isdir(images):
        raise FileNotFoundError(f"there is no folder {images!r} for the images that the list {name!r} names")
    known = {os.path.splitext(file)[0]: file for file in find_images(images)}
    labels = {each: label for label, each in enumerate(classes, start=1)}
    pictures = []
    skipped: Counter[str] = Counter()
    for stem in stems:
        file = os.path.join(folder, "Annotations", f"{stem}.xml")
        root = _xml(file)
        picture = Picture(os.path.join(images, known.get(stem, f"{stem}.jpg")), file, _size(root))
        for each in root.findall("object"):
            kind, box, difficult = _object(each, file)
            if kind not in labels:
                raise ValueError(
                    f"{file!r} has an object {kind!r}, which is not among the {len(classes)} classes, "
                    f"{some_of(list(classes))}: give all of them as `classes`"
                )
            add_object(picture, box, labels[kind], difficult, file, on_bad_box, skipped)
        pictures.append(picture)
    require_files(pictures, images)
    warn_of_skipped(skipped, folder)
    return pictures


def _listed(folder: str, name: str) -> list[str]:
    """Return the names of the images in a list, without extension."""
    listing = os.path.join(folder, "ImageSets", "Main", f"{name}.txt")
    if not os.path.isfile(listing):
        there = os.path.dirname(listing)
        found = sorted(each[:-4] for each in os.listdir(there) if each.endswith(".txt")) if os.path.isdir(there) else []
        raise FileNotFoundError(
            f"there is no {listing!r}; {'its folder has ' + some_of(found) if found else 'nor are there others'}: "
            "expected are FOLDER/ImageSets/Main/SET.txt, FOLDER/Annotations/*.xml and FOLDER/JPEGImages/*.jpg"
        )
    lines = read_text(listing).splitlines()
    stems = [line.split()[0] for line in lines if line.strip()]  # some lists have a second column
    if not stems:
        raise ValueError(f"{listing!r} names no image")
    return stems


def _object(element: Any, file: str) -> tuple[str, Box, bool]:
    """Return the class of an object, its box counted from 0, and whether it is difficult."""
    kind = (element.findtext("name") or "").strip()
    box = element.find("bndbox")
    try:
        left, top, right, bottom = (float((box.findtext(s) if box is not None else None) or "") for s in SIDES)
    except ValueError as error:
        raise ValueError(f"{file!r} has an object {kind!r} whose bndbox lacks {', '.join(SIDES)}") from error
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return kind, (left - 1, top - 1, right, bottom), difficult


def _xml(file: str) -> Any:
    try:
        return ET.fromstring(read_regular(file, MOST_BYTES))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no annotation {file!r}, and the list of images names it") from None
    except (ET.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"{file!r} is damaged, or not XML ({error}): copy it again") from error


def _size(root: Any) -> tuple[int, int] | None:
    try:
        width, height = int(root.findtext("size/width") or 0), int(root.findtext("size/height") or 0)
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None  # some tools write 0
