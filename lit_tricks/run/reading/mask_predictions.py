"""Read predictions of the pixels of a split, and compute metrics of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lit_tricks.run.reading.predictions import SPLITS, Confusion, Floats, Ints, check_pictures, clean
from lit_tricks.utils.bounded import read_arrays

__all__ = ["MaskPredictions", "WorstMask", "palette"]


def palette(size: int = 256) -> npt.NDArray[np.uint8]:
    """Return the colors of Pascal VOC, uint8 (size, 3): black, dark red, dark green, ...

    The bits of a label, from the lowest, become bits of red, green and blue in turn, from the highest.
    """
    labels = np.arange(size)
    colors = np.zeros((size, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors


@dataclass
class WorstMask:
    """One of the images with the lowest IoU.

    Args:
        where: its file, or its place in the data set.
        iou: mean over the classes that occur in it, in [0, 1].
        image: uint8 (H, W, 3 or 1).
        mask: (H, W), the true classes; -1 is none.
        predicted: (H, W), the predicted classes.
    """

    where: str
    iou: float
    image: npt.NDArray[np.uint8]
    mask: Ints
    predicted: Ints


@dataclass
class MaskPredictions:
    """Predictions of the pixels of images.

    Args:
        split: "test" or "val".
        classes: names of the C classes.
        images: their number.
        pixels: (C, C), number of pixels by true (rows) and predicted class, without pixels of no class.
        worst: the images with the lowest IoU, the lowest first.
        weights: "best", "last" or "given": the best checkpoint, the last epoch, or a given checkpoint.
    """

    unit: ClassVar[str] = "pixels"

    split: str
    classes: list[str]
    images: int
    pixels: Ints
    worst: list[WorstMask]
    weights: str = "best"

    @classmethod
    def read(cls, path: Path) -> MaskPredictions:
        """Read ``predictions.npz`` of a segmentation."""
        arrays: dict[str, Any] = read_arrays(path)
        _check(arrays)
        pixels = arrays["confusion"].astype(np.int64)
        names = [clean(name) for name in arrays["classes"]]
        worst = [
            WorstMask(
                Path(clean(file)).name or f"image {index}", float(iou), *(arrays[f"{part}_{i}"] for part in PARTS)
            )
            for i, (file, index, iou) in enumerate(
                zip(arrays["worst_file"], arrays["worst_index"], arrays["worst_iou"], strict=True)
            )
        ]
        classes = names if len(names) == len(pixels) else [str(i) for i in range(len(pixels))]
        weights = str(arrays.get("weights", "best"))
        return cls(str(arrays["split"]), classes, int(arrays["images"]), pixels, worst, weights)

    def confusion(self) -> Confusion:
        """Pixels of each pair of a true and a predicted class."""
        label, predicted = np.nonzero(self.pixels)
        return Confusion(label, predicted, self.pixels[label, predicted])

    def ious(self) -> Floats:
        """Return the intersection over union per class; NaN for classes in neither the masks nor the predictions."""
        return _over(self._right, self.pixels.sum(0) + self.pixels.sum(1) - self._right)

    def recalls(self) -> tuple[Floats, Ints]:
        """Return the recall per class, NaN without pixels, and the number of pixels."""
        count = self.pixels.sum(1)
        return _over(self._right, count), count

    def precisions(self) -> Floats:
        """Return the precision per class; NaN for classes that were not predicted."""
        return _over(self._right, self.pixels.sum(0))

    @property
    def _right(self) -> Ints:
        return self.pixels.diagonal()


PARTS = ("image", "mask", "predicted")


def _check(arrays: dict[str, Any]) -> None:
    """Raise ValueError unless the arrays are predictions of pixels."""
    if str(arrays["split"]) not in SPLITS:
        raise ValueError(f"split={str(arrays['split'])!r:.60} is not one of {', '.join(SPLITS)}")
    pixels = arrays["confusion"]
    if pixels.dtype.kind not in "iu" or pixels.ndim != 2 or pixels.shape[0] != pixels.shape[1] or not pixels.size:
        raise ValueError(f"confusion of type {pixels.dtype} and shape {pixels.shape} is not a matrix of numbers")
    if pixels.min() < 0 or pixels.max() > 2**48 or arrays["classes"].ndim != 1:
        raise ValueError("confusion has numbers of pixels that cannot be, or classes are no names")
    if arrays["images"].ndim or arrays["images"].dtype.kind not in "iu":
        raise ValueError("images is not a number")
    shapes = [arrays[f"worst_{name}"].shape for name in ("file", "index", "iou")]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes) or arrays["worst_iou"].dtype.kind != "f":
        raise ValueError(f"worst_file, worst_index and worst_iou have the shapes {shapes}")
    for i in range(shapes[0][0]):
        check_pictures(arrays[f"image_{i}"], f"image_{i}", 3)
        for name in ("mask", "predicted"):
            labels = arrays[f"{name}_{i}"]
            if labels.dtype.kind not in "iu" or labels.shape != arrays[f"image_{i}"].shape[:2]:
                raise ValueError(f"{name}_{i} of type {labels.dtype} and shape {labels.shape} is no mask of its image")
            if labels.min() < -1 or labels.max() >= len(pixels):
                raise ValueError(f"{name}_{i} has labels that are no classes")


def _over(part: Ints, whole: Ints) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(part / whole)
