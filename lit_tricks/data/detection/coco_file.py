"""Objects read from annotations in the format of COCO."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from lit_tricks.data.detection.boxes import OnBadBox, Picture, add_object, require_files, some_of, warn_of_skipped

__all__ = ["read_coco"]


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
    require_files(pictures.values(), folder)
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
                f"are {some_of(sorted(categories))}"
            )
        where, box = f"annotation {each.get('id')!r} in {file!r}, of {picture.path!r}", (x, y, x + width, y + height)
        add_object(picture, box, label_of[category], bool(each.get("iscrowd")), where, on_bad_box, skipped)
    warn_of_skipped(skipped, file)
    return [categories[category] for category in sorted(categories)], list(pictures.values())


def _json(file: str) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no file of annotations {file!r}: correct `root` or `annotations`")
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file!r} is damaged, or not JSON ({error}): copy it again") from error
    return content if isinstance(content, dict) else {}
