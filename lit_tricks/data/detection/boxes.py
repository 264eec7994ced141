"""Objects in images: what is annotated, checked, and held in a few tensors. ``_coco_boxes`` and ``_voc_boxes`` read it.

Boxes are (x0, y0, x1, y1) in pixels, from the left and upper edge of the image to where they end: x1 - x0 is the width.
Labels start at 1, as 0 is the background in torchvision's detectors.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes

from lit_tricks.data.io.file_index import Paths
from lit_tricks.utils.log import log

__all__ = [
    "BoxFiles",
    "OnBadBox",
    "Picture",
    "Target",
    "add_object",
    "require_files",
    "some_of",
    "target_of",
    "warn_of_skipped",
]


OnBadBox = Literal["raise", "skip"]
Box = tuple[float, float, float, float]
Target = dict[str, Tensor]

SLACK = 1.0  # pixels that a box may stick out by: annotations are rounded
REMEDY = 'mend the annotation, or leave such boxes out with on_bad_box="skip"'


@dataclass
class Picture:
    """The annotation of one image.

    Args:
        path: of the image.
        where: the annotation, for messages.
        size: width and height in the annotation; None if it has none.
        boxes: boxes of the objects.
        labels: labels of the objects.
        ignored: whether an object is used neither in training nor in evaluation: a crowd, or a difficult object.
    """

    path: str
    where: str
    size: tuple[int, int] | None
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)


def target_of(boxes: Tensor, labels: Tensor, iscrowd: Tensor, size: tuple[int, int]) -> Target:
    """Return a target as torchvision's detectors take it, with boxes that its transforms move along with the image.

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
        self.paths: Paths = Paths("", (os.fsencode(picture.path) for picture in pictures))
        self.read = read
        self.on_bad_box = on_bad_box
        kept = [
            (box, label, ignored)
            for picture in pictures
            for box, label, ignored in zip(picture.boxes, picture.labels, picture.ignored, strict=True)
            if not (train and ignored)
        ]
        counts = [len(p.boxes) - (sum(p.ignored) if train else 0) for p in pictures]
        self.boxes: Tensor = torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(-1, 4)
        self.labels: Tensor = torch.tensor([label for _, label, _ in kept], dtype=torch.int64)
        self.iscrowd: Tensor = torch.tensor([int(ignored) for _, _, ignored in kept], dtype=torch.int64)
        self.ends: Tensor = torch.tensor(counts, dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        path = self.paths[index]
        image = self.read(path)
        mine = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        boxes, keep = self.boxes[mine].clone(), []
        for i, box in enumerate(boxes.tolist()):
            # the annotation may lack the size of the image, or have a wrong size
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
    shown = ", ".join(f"{side:g}" for side in box)
    raise ValueError(f"{where}: the box (x0, y0, x1, y1) = ({shown}) {fault}: {REMEDY}")


def add_object(
    picture: Picture, box: Box, label: int, ignored: bool, where: str, on_bad_box: OnBadBox, skipped: Counter[str]
) -> None:
    """Put an object into a picture, its box fitted (see ``fit``), or count it among those that are skipped there."""
    fitting = fit(box, picture.size, where, on_bad_box)
    if fitting is None:
        skipped[picture.path] += 1
        return
    picture.boxes.append(fitting)
    picture.labels.append(label)
    picture.ignored.append(ignored)


def warn_of_skipped(skipped: Counter[str], where: str) -> None:
    """Log how many boxes were skipped, if any, and in which images."""
    if skipped:
        log.warning(
            "%s: %d boxes outside of their image or without an area were skipped, in %s",
            where,
            sum(skipped.values()),
            some_of(list(skipped)),
        )


def require_files(pictures: Iterable[Picture], folder: str) -> None:
    """Raise if images are missing. The folder is listed once, since network file systems are slow."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder of images {folder!r}: correct `root` or `images`")
    there = {os.path.join(folder, name) for name in os.listdir(folder)}
    missing = [p for p in pictures if p.path not in there and not os.path.isfile(p.path)]
    if missing:
        more = f", and {len(missing) - 1} more are not there" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0].where!r} names an image {missing[0].path!r} that is not there{more}")


def some_of(names: Sequence[Any]) -> str:
    """Return the first five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more
