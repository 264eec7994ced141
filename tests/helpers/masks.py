"""Small images with masks, in each of the layouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "red", "green", "blue")


def write_pair(
    image: Path,
    mask: Path,
    size: tuple[int, int] = (24, 20),
    mask_size: tuple[int, int] | None = None,
    labels: Sequence[int] = (0, 1, 2, 3, 255),
    mode: str = "L",
    seed: int = 0,
) -> None:
    """An image whose color says the label, with noise, and its mask in vertical stripes of random width."""
    rng = np.random.default_rng(seed)
    width, height = mask_size or size
    ends = np.sort(rng.choice(np.arange(1, width), len(labels) - 1, replace=False))
    stripes = np.repeat(np.array(labels), np.diff([0, *ends, width]))
    stored = np.broadcast_to(stripes, (height, width)).astype(np.uint8)
    colors = np.zeros((256, 3))
    for label in (1, 2, 3):
        colors[label, label - 1] = 200
    pixels = np.resize(colors[stored], (size[1], size[0], 3)) + rng.uniform(0, 40, (size[1], size[0], 3))
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(image)
    picture = Image.fromarray(stored)
    if mode == "P":
        picture.putpalette(list(rng.integers(0, 256, 768)))
    (picture if mode in ("L", "P") else picture.convert(mode)).save(mask)


def write_folder(root: Path, count: int = 4) -> Path:
    """For ``SegmentationFolder``: as many images for training, two for validation."""
    for split, number in (("train", count), ("val", 2)):
        for i in range(number):
            name = f"{i}"
            write_pair(root / split / "images" / f"{name}.jpg", root / split / "masks" / f"{name}.png", seed=i)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def write_voc(root: Path) -> Path:
    """For ``VOCSegmentation``: two images for training, two for validation, one that is in no list."""
    for seed, name in enumerate("abcde"):
        mask = root / "SegmentationClass" / f"{name}.png"
        write_pair(root / "JPEGImages" / f"{name}.jpg", mask, labels=(0, 255, 20, 255), mode="P", seed=seed)
    (root / "SegmentationClass" / "e.png").unlink()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\nd\n")
    return root


def write_ade(root: Path) -> Path:
    """For ``ADE20KSegmentation``: two images for training, two for validation."""
    for split in ("training", "validation"):
        for seed, name in enumerate("ab"):
            mask = root / "annotations" / split / f"{name}.png"
            write_pair(root / "images" / split / f"{name}.jpg", mask, labels=(0, 1, 150), seed=seed)
    return root
