"""Objects in images: COCO, and other data in its format."""

from __future__ import annotations

import json
import os
from collections import Counter
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
from lit_tricks.data.samples import Source
from lit_tricks.utils.arguments import text
from lit_tricks.utils.class_names import permutation
from lit_tricks.utils.files import read_regular

__all__ = ["CocoDetection", "read_coco"]

MOST_BYTES = 2**34  # of the annotations of a split


class CocoDetection(DetectionFolders):
    """Images in a folder, and their objects in one JSON file for each split, in the format of COCO.

    The defaults fit COCO 2017: ``root/train2017/*.jpg``, ``root/annotations/instances_train2017.json``, and the same
    with ``val2017``. The classes are the file's categories in the order of their ids, numbered from 1; train and val
    must have the same. Without annotations of a test there is no test. Crowds are not trained on. Training images are
    flipped with probability 1/2. See the base class for what a batch is.

    Args:
        root: folder that the next two are in.
        images: folder of the images of a split; ``{split}`` is replaced by train, val or test.
        annotations: file of the annotations of a split.
        classes: names of the categories in the order of the labels, for a model that was trained in another order; None
            is the order of the ids.
        kwargs: ``batch_size``, ``num_workers``, ``flip``, ``scale``, ``on_bad_box``, ``mean``, ``std`` and
            ``predict_dir``, which ``lit-tricks show CocoDetection`` explains.

    Raises:
        ValueError: if an argument is out of range, a file is damaged, or an annotation is invalid.
        FileNotFoundError: if a folder, a file or an image is missing.

    Example:
        ``data: {class_path: CocoDetection, init_args: {root: coco, on_bad_box: skip}}``
    """

    def __init__(
        self,
        root: str,
        images: str = "{split}2017",
        annotations: str = "annotations/instances_{split}2017.json",
        *,
        classes: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        root = check_root(self, root)
        super().__init__(**kwargs)
        self.root = root
        fix = "Give a path below root; {split} is replaced by train, val and test."
        self.images = text(self, "images", images, fix)
        self.annotations = text(self, "annotations", annotations, fix)
        self._order = check_classes(self, classes, "the order of the annotations")
        self.classes: list[str] = []
        if self.predict_dir is None or os.path.isdir(root):  # prediction does not need the data set
            # the smaller file of the two that must agree
            self.classes = self._read("val")

    @property
    def has_test(self) -> bool:
        """Return whether there is a file of annotations for the test."""
        return os.path.isfile(self._path(self.annotations, "test"))

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and not self.has_test:
            raise self._no_test(self.root, f"Add {self._path(self.annotations, 'test')!r}")
        classes = self._read(split)
        if classes != self.classes:
            only = sorted({*classes} ^ {*self.classes})
            differing = f"; only one file has {', '.join(only[:5])}" if only else ""
            raise ValueError(
                f"{self._path(self.annotations, split)!r} has {len(classes)} categories and "
                f"{self._path(self.annotations, 'val')!r} has {len(self.classes)}. They must be the same, in the same "
                f"order{differing}. Correct the list of categories in one of the files"
            )
        return {split: self._sources[split]}

    def _read(self, split: Split) -> list[str]:
        """Keep the images of a split, and give its classes."""
        if split in self._sources:
            return self.classes
        file, folder = self._path(self.annotations, split), self._path(self.images, split)
        classes, pictures = read_coco(file, folder, self.on_bad_box)
        if self._order is not None:
            label_of = permutation(classes, self._order)
            for picture in pictures:
                picture.labels = [label_of[label - 1] + 1 for label in picture.labels]
            classes = self._order
        self._sources[split] = BoxFiles(pictures, self._file_reader(), split == "train", self.on_bad_box)
        return classes

    def _path(self, pattern: str, split: Split) -> str:
        return os.path.join(self.root, pattern.format(split=split))


def read_coco(file: str, folder: str, on_bad_box: OnBadBox) -> tuple[list[str], list[Picture]]:
    """Read annotations in COCO's format (https://cocodataset.org/#format-data).

    Args:
        file: the JSON file.
        folder: where the images are, whose names are in the file.
        on_bad_box: "raise", or "skip".

    Returns:
        The names of the classes, in the order of their ids in the file, and the images in its order.

    Raises:
        FileNotFoundError: if the file, the folder or an image is not there.
        ValueError: for a damaged file, or an invalid annotation; the message names the file and the image.
    """
    categories, pictures, objects = _content(file, folder)
    require_files(pictures.values(), folder)
    labels = {category: label for label, category in enumerate(sorted(categories), start=1)}
    skipped: Counter[str] = Counter()
    for each in objects:
        key, category, box = _object(each, file)
        number = f"annotation {each.get('id')!r} in {file!r}"
        if key not in pictures:
            raise ValueError(f"{number} is of image {key!r}, which it does not have")
        where = f"{number}, of {pictures[key].path!r}"
        if category not in labels:
            raise ValueError(f"{where}, has category {category!r}, and there are {some_of(sorted(categories))}")
        add_object(pictures[key], box, labels[category], bool(each.get("iscrowd")), where, on_bad_box, skipped)
    warn_of_skipped(skipped, file)
    return [categories[category] for category in sorted(categories)], list(pictures.values())


def _content(file: str, folder: str) -> tuple[dict[int, str], dict[int, Picture], list[dict[str, Any]]]:
    """Return the names of the categories by id, the images by id, and the annotations."""
    content = _json(file)
    try:
        categories = {int(each["id"]): str(each["name"]) for each in content["categories"]}
        images = {int(each["id"]): each for each in content["images"]}
        entries = [(str(each["file_name"]), each.get("width"), each.get("height")) for each in images.values()]
        objects: list[dict[str, Any]] = list(content["annotations"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file!r} is not in COCO's format ({type(error).__name__}: {error}): it must hold the lists 'images' (id, "
            "file_name), 'annotations' (image_id, category_id, bbox) and 'categories' (id, name)"
        ) from error
    if not images or not categories:
        raise ValueError(f"{file!r} has {len(images)} images and {len(categories)} categories: there must be some")
    if len(images) != len(content["images"]):
        raise ValueError(f"{file!r} gives {len(content['images'])} images {len(images)} ids: each needs its own id")
    pictures = {
        key: Picture(os.path.join(folder, name), file, (int(width), int(height)) if width and height else None)
        for key, (name, width, height) in zip(images, entries, strict=True)
    }
    return categories, pictures, objects


def _object(annotation: Any, file: str) -> tuple[Any, Any, Box]:
    """Return the image, the category and the box of an annotation."""
    try:
        x, y, width, height = map(float, annotation["bbox"])
        return annotation["image_id"], annotation["category_id"], (x, y, x + width, y + height)
    except (KeyError, TypeError, ValueError) as error:
        which = annotation.get("id") if isinstance(annotation, dict) else annotation
        raise ValueError(
            f"annotation {which!r} in {file!r} needs an image_id, a category_id and a bbox of four numbers "
            f"({type(error).__name__}: {error})"
        ) from error


def _json(file: str) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no file of annotations {file!r}: correct `root` or `annotations`")
    try:
        content = json.loads(read_regular(file, MOST_BYTES))
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file!r} is damaged, or not JSON ({error}): copy it again") from error
    return content if isinstance(content, dict) else {}
