"""A tiny data set on disk for each data module."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from helpers import boxes, masks
from helpers.cli import write_image_folder, write_images
from lit_tricks.commands.data import shard
from lit_tricks.data import CIFAR10, CIFAR100

SMALL = {"batch_size": 2, "num_workers": 0}


def write_cifar(root: Path) -> Path:
    """Write tiny files in the format of CIFAR. Their checksums are not the real ones."""
    rng = np.random.RandomState(0)

    def write(path: Path, count: int, key: str, labels: int) -> None:
        path.parent.mkdir(exist_ok=True, parents=True)
        data = rng.randint(0, 256, (count, 3072), dtype=np.uint8)
        path.write_bytes(pickle.dumps({"data": data, key: [index % labels for index in range(count)]}))

    for number in range(1, 6):
        write(root / "cifar-10-batches-py" / f"data_batch_{number}", 20, "labels", 10)
    write(root / "cifar-10-batches-py" / "test_batch", 30, "labels", 10)
    write(root / "cifar-100-python" / "train", 300, "fine_labels", 100)
    write(root / "cifar-100-python" / "test", 100, "fine_labels", 100)
    names = {"label_names": CIFAR10().classes}
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names))
    names = {"fine_label_names": CIFAR100().classes}
    (root / "cifar-100-python" / "meta").write_bytes(pickle.dumps(names))
    return root


def write_data(root: Path, cifar: Path) -> dict[str, dict[str, Any]]:
    """Write the data sets.

    Args:
        root: empty folder for them.
        cifar: folder with CIFAR's files.

    Returns:
        Arguments of the data modules, by the names of their classes.
    """
    photos = write_image_folder(root / "photos")
    for name in ("ant", "bee", "cow"):
        write_images(photos / "test" / name, 2)
    shard(str(photos), str(root / "shards"), shard_mb=0.004)
    write_images(root / "new", 2)
    rows = [f"{path.relative_to(photos)},{path.parent.name}" for path in sorted(photos.rglob("*.jpg"))]
    table = photos / "labels.csv"
    table.write_text("\n".join(["file,label", *rows]))
    segmentation = {"crop_size": 16, "base_size": 20}
    known: dict[str, dict[str, Any]] = {
        "Digits": {"batch_size": 500},
        "DigitSegmentation": {"batch_size": 500},
        "DigitDetection": {"batch_size": 500},
        "CIFAR10": {"root": cifar, "download": False, "val_size": 20},
        "CIFAR100": {"root": cifar, "download": False, "val_size": 100},
        "ImageFolder": {"root": photos, "image_size": 16},
        "ImageTable": {"table": table, "image_size": 16},
        "Streaming": {"root": root / "shards", "image_size": 16},
        "SegmentationFolder": {"root": masks.write_folder(root / "masks")} | segmentation,
        "VOCSegmentation": {"root": masks.write_voc(root / "voc masks")} | segmentation,
        "ADE20KSegmentation": {"root": masks.write_ade(root / "ade")} | segmentation,
        "CocoDetection": {"root": boxes.write_coco(root / "coco")},
        "VOCDetection": {
            "root": boxes.write_voc(root / "voc", ("a/train", "a/val")),
            "train": ["a/train"],
            "val": ["a/val"],
            "classes": boxes.CLASSES,
        },
    }
    new = {"predict_dir": str(root / "new")}
    return {
        name: SMALL | new | {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
        for name, args in known.items()
    }
