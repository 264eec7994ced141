"""Objects read from annotations in the layout of Pascal VOC."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_tricks.data.detection.boxes import OnBadBox, Picture, add_object, require_files, some_of, warn_of_skipped

__all__ = ["read_voc"]

SIDES = ("xmin", "ymin", "xmax", "ymax")


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
            f"there is no {listing!r}; {'its folder has ' + some_of(found) if found else 'nor are there others'}: "
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
                    f"{some_of(list(classes))}: give all of them as `classes`"
                )
            box = each.find("bndbox")
            try:
                sides = [float((box.findtext(side) if box is not None else None) or "") for side in SIDES]
            except ValueError as error:
                raise ValueError(f"{file!r} has an object {kind!r} whose bndbox lacks {', '.join(SIDES)}") from error
            inside = (sides[0] - 1, sides[1] - 1, sides[2], sides[3])
            difficult = (each.findtext("difficult") or "0").strip() == "1"
            add_object(picture, inside, label_of[kind], difficult, file, on_bad_box, skipped)
        pictures.append(picture)
    require_files(pictures, images)
    warn_of_skipped(skipped, folder)
    return pictures


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
