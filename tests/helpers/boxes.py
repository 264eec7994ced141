"""Small data sets of objects on disk, in the layouts of COCO and VOC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Boxes (x0, y0, x1, y1) and labels from 1, of three images of 40 x 30 pixels. The second one has none.
OBJECTS: list[list[tuple[tuple[int, int, int, int], int]]] = [
    [((2, 3, 12, 23), 1), ((20, 0, 40, 30), 2)],
    [],
    [((5, 5, 9, 9), 2)],
]
CLASSES = ["ant", "bee"]
SIZE = (40, 30)


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco_content(objects: Any = OBJECTS) -> dict[str, Any]:
    """Annotations whose ids have gaps, and whose categories are not in the order of their ids."""
    images = [{"id": 10 * i + 7, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(len(objects))]
    annotations = [
        {"image_id": 10 * i + 7, "category_id": (3, 8)[label - 1], "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
        for i, of_image in enumerate(objects)
        for (x0, y0, x1, y1), label in of_image
    ]
    annotations = [each | {"id": 100 + i} for i, each in enumerate(annotations)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 8, "name": "bee"}, {"id": 3, "name": "ant"}],
    }


def write_coco(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    for split in splits:
        for i in range(len(OBJECTS)):
            write_image(root / f"{split}2017" / f"{i}.jpg", i)
        change_coco(root, split, coco_content())
    return root


def change_coco(root: Path, split: str, content: Any) -> Path:
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def voc_xml(objects: Any, names: list[str] = CLASSES, difficult: int = 0, size: tuple[int, int] = SIZE) -> str:
    """An annotation, whose pixels are counted from 1."""
    inside = "".join(
        f"<object><name>{names[label - 1]}</name><difficult>{difficult}</difficult><bndbox><xmin>{x0 + 1}</xmin>"
        f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for (x0, y0, x1, y1), label in objects
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{inside}</annotation>"


def write_voc(root: Path, lists: tuple[str, ...], names: list[str] = CLASSES) -> Path:
    for each in lists:
        folder, _, name = each.partition("/")
        for i, objects in enumerate(OBJECTS):
            write_image(root / folder / "JPEGImages" / f"{name}{i}.jpg", i)
            path = root / folder / "Annotations" / f"{name}{i}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(voc_xml(objects, names))
        listing = root / folder / "ImageSets" / "Main" / f"{name}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("".join(f"{name}{i}\n" for i in range(len(OBJECTS))))
    return root
