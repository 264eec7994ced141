"""Objects in images: read from the annotations of COCO and Pascal VOC, checked, and held in a few tensors.

Boxes are (x0, y0, x1, y1) in pixels, from the left and upper edge of the image to where they end: x1 - x0 is the width.
Labels start at 1, as 0 is the background in torchvision's detectors.
"""

from __future__ import annotations

import json
import logging
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.tv_tensors import BoundingBoxes

from lit_tricks.data._listing import Paths

__all__ = ["BoxFiles", "OnBadBox", "Picture", "read_coco", "read_voc", "target_of"]

log = logging.getLogger("lit_tricks")

OnBadBox = Literal["raise", "skip"]
Box = tuple[float, float, float, float]

SLACK = 1.0  # pixels that a box may stick out by: annotations are rounded
REMEDY = 'mend the annotation, or leave such boxes out with on_bad_box="skip"'


@dataclass
class Picture:
    """What is annotated of one image.

    Args:
        path: of the image.
        where: the annotation, for messages.
        size: width and height as the annotation has them; None if it does not say.
        boxes: of the objects.
        labels: of the objects.
        ignored: whether an object is neither to be learnt nor to be found: a crowd, or a difficult one.
    """

    path: str
    where: str
    size: tuple[int, int] | None
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)


def target_of(boxes: Tensor, labels: Tensor, iscrowd: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """A target as torchvision's detectors take it, with boxes that its transforms move along with the image.

    Args:
        boxes: float32 (n, 4).
        labels: int64 (n,).
        iscrowd: int64 (n,), 1 where an object is not counted.
        size: width and height of the image.
    """
    canvas = size[::-1]
    return {
        "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=canvas),
        "labels": labels,
        "iscrowd": iscrowd,
    }


class BoxFiles:
    """Pairs of an image and its target.

    Args:
        pictures: what is annotated.
        read: reads an image.
        train: leave out what is to be ignored; otherwise it is marked by ``iscrowd``.
        on_bad_box: what is done where a box does not fit its image.
    """

    def __init__(
        self, pictures: Sequence[Picture], read: Callable[[str], Image.Image], train: bool, on_bad_box: OnBadBox
    ) -> None:
        self.paths = Paths("", (os.fsencode(picture.path) for picture in pictures))
        self.read, self.on_bad_box = read, on_bad_box
        kept = [
            (box, label, ignored)
            for picture in pictures
            for box, label, ignored in zip(picture.boxes, picture.labels, picture.ignored, strict=True)
            if not (train and ignored)
        ]
        counts = [len(p.boxes) - (sum(p.ignored) if train else 0) for p in pictures]
        self.boxes = torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(-1, 4)
        self.labels = torch.tensor([label for _, label, _ in kept], dtype=torch.int64)
        self.iscrowd = torch.tensor([int(ignored) for _, _, ignored in kept], dtype=torch.int64)
        self.ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        path = self.paths[index]
        image = self.read(path)
        mine = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        boxes, keep = self.boxes[mine].clone(), []
        for i, box in enumerate(boxes.tolist()):
            # the annotation may have been wrong about the size of the image, or not have told it
            if (fitting := fit(box, image.size, f"the annotation of {path!r}", self.on_bad_box)) is not None:
                boxes[i] = torch.tensor(fitting)
                keep.append(i)
        return image, target_of(boxes[keep], self.labels[mine][keep], self.iscrowd[mine][keep], image.size)


def fit(box: Sequence[float], size: tuple[int, int] | None, where: str, on_bad_box: OnBadBox) -> Box | None:
    """Cut off of a box what sticks out of its image by rounding.

    Returns:
        The box; None for one that is bad and shall be skipped.

    Raises:
        ValueError: for a bad one: outside of the image, without an area, or no numbers.
    """
    x0, y0, x1, y1 = box
    width, height = size or (math.inf, math.inf)
    if not all(map(math.isfinite, box)):
        fault = "is not made of numbers"
    elif x1 <= x0 or y1 <= y0:
        fault = "has no area"
    elif x0 < -SLACK or y0 < -SLACK or x1 > width + SLACK or y1 > height + SLACK:
        fault = f"lies outside of the image of {width} x {height} pixels"
    else:
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
        if x1 > x0 and y1 > y0:
            return x0, y0, x1, y1
        fault = f"lies outside of the image of {width} x {height} pixels"
    if on_bad_box == "skip":
        return None
    told = ", ".join(f"{side:g}" for side in box)
    raise ValueError(f"{where}: the box (x0, y0, x1, y1) = ({told}) {fault}: {REMEDY}")


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
        ValueError: for a damaged file, or an annotation that can not be right; it names the file and the image.
    """
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
        raise ValueError(f"{file!r} gives {len(content['images'])} images {len(images)} ids: each needs one of its own")
    label_of = {category: label for label, category in enumerate(sorted(categories), start=1)}
    pictures = {
        key: Picture(os.path.join(folder, name), file, (int(width), int(height)) if width and height else None)
        for key, (name, width, height) in zip(images, entries, strict=True)
    }
    _require_files(pictures.values(), folder)
    skipped: Counter[str] = Counter()
    for each in objects:
        try:
            key, category, bbox = each["image_id"], each["category_id"], each["bbox"]
            x, y, width, height = map(float, bbox)
        except (KeyError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            which = each.get("id") if isinstance(each, dict) else each
            raise ValueError(
                f"annotation {which!r} in {file!r} needs an image_id, a category_id and a bbox of four numbers ({told})"
            ) from error
        if key not in pictures:
            raise ValueError(f"annotation {each.get('id')!r} in {file!r} is of image {key!r}, which it does not have")
        picture = pictures[key]
        if category not in label_of:
            raise ValueError(
                f"annotation {each.get('id')!r} in {file!r}, of {picture.path!r}, has category {category!r}, and there "
                f"are {_some(sorted(categories))}"
            )
        where, box = f"annotation {each.get('id')!r} in {file!r}, of {picture.path!r}", (x, y, x + width, y + height)
        _add(picture, box, label_of[category], bool(each.get("iscrowd")), where, on_bad_box, skipped)
    _tell(skipped, file)
    return [categories[category] for category in sorted(categories)], list(pictures.values())


def read_voc(folder: str, name: str, classes: Sequence[str], on_bad_box: OnBadBox) -> list[Picture]:
    """Read annotations in the layout of Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/).

    Its pixels are counted from 1, and the last one belongs to the box: (1, 1, w, h) is all of an image, here
    (0, 0, w, h).

    Args:
        folder: with JPEGImages, Annotations and ImageSets/Main.
        name: of the list in ImageSets/Main, without ``.txt``.
        classes: names of the classes, in the order of their labels.
        on_bad_box: "raise", or "skip".

    Raises:
        FileNotFoundError: if a folder, the list, an annotation or an image is not there.
        ValueError: for an empty list, a damaged annotation, or one that can not be right; it names the file.
    """
    label_of = {each: label for label, each in enumerate(classes, start=1)}
    listing = os.path.join(folder, "ImageSets", "Main", f"{name}.txt")
    if not os.path.isfile(listing):
        there = os.path.dirname(listing)
        found = sorted(each[:-4] for each in os.listdir(there) if each.endswith(".txt")) if os.path.isdir(there) else []
        raise FileNotFoundError(
            f"there is no {listing!r}; {'its folder has ' + _some(found) if found else 'nor are there others'}: "
            "expected are FOLDER/ImageSets/Main/SET.txt, FOLDER/Annotations/*.xml and FOLDER/JPEGImages/*.jpg"
        )
    with open(listing, encoding="utf-8") as stream:
        stems = [line.split()[0] for line in stream if line.strip()]
    if not stems:
        raise ValueError(f"{listing!r} names no image")
    images = os.path.join(folder, "JPEGImages")
    if not os.path.isdir(images):
        raise FileNotFoundError(f"there is no folder {images!r} for the images that {listing!r} names")
    known = {os.path.splitext(file)[0]: file for file in os.listdir(images) if file.lower().endswith(IMG_EXTENSIONS)}
    pictures = []
    skipped: Counter[str] = Counter()
    for stem in stems:
        file = os.path.join(folder, "Annotations", f"{stem}.xml")
        picture = Picture(os.path.join(images, known.get(stem, f"{stem}.jpg")), file, None)
        root = _xml(file)
        picture.size = _size(root)
        for each in root.findall("object"):
            kind = (each.findtext("name") or "").strip()
            if kind not in label_of:
                raise ValueError(
                    f"{file!r} has an object {kind!r}, which is not among the {len(classes)} classes, "
                    f"{_some(list(classes))}: give all of them as `classes`"
                )
            box = each.find("bndbox")
            try:
                sides = [float((box.findtext(side) if box is not None else None) or "") for side in SIDES]
            except ValueError as error:
                raise ValueError(f"{file!r} has an object {kind!r} whose bndbox lacks {', '.join(SIDES)}") from error
            inside = (sides[0] - 1, sides[1] - 1, sides[2], sides[3])
            difficult = (each.findtext("difficult") or "0").strip() == "1"
            _add(picture, inside, label_of[kind], difficult, file, on_bad_box, skipped)
        pictures.append(picture)
    _require_files(pictures, images)
    _tell(skipped, folder)
    return pictures


SIDES = ("xmin", "ymin", "xmax", "ymax")


def _add(
    picture: Picture, box: Box, label: int, ignored: bool, where: str, on_bad_box: OnBadBox, skipped: Counter[str]
) -> None:
    fitting = fit(box, picture.size, where, on_bad_box)
    if fitting is None:
        skipped[picture.path] += 1
        return
    picture.boxes.append(fitting)
    picture.labels.append(label)
    picture.ignored.append(ignored)


def _tell(skipped: Counter[str], where: str) -> None:
    if skipped:
        log.warning(
            "%s: %d boxes outside of their image or without an area were skipped, in %s",
            where,
            sum(skipped.values()),
            _some(list(skipped)),
        )


def _json(file: str) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no file of annotations {file!r}: correct `root` or `annotations`")
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file!r} is damaged, or not JSON ({error}): copy it again") from error
    return content if isinstance(content, dict) else {}


def _xml(file: str) -> Any:
    try:
        return ET.parse(file).getroot()
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


def _require_files(pictures: Iterable[Picture], folder: str) -> None:
    """See that all images are there: by one look into their folder, since a network answers slowly."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder of images {folder!r}: correct `root` or `images`")
    there = {os.path.join(folder, name) for name in os.listdir(folder)}
    missing = [p for p in pictures if p.path not in there and not os.path.isfile(p.path)]
    if missing:
        more = f", and {len(missing) - 1} more are not there" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0].where!r} names an image {missing[0].path!r} that is not there{more}")


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more
