"""Read predictions of the images of a split, and compute metrics of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lit_tricks.run.reading.checks import numbered
from lit_tricks.utils.bounded import read_arrays

__all__ = [
    "IMBALANCE",
    "SPLITS",
    "Calibration",
    "Confusion",
    "Floats",
    "Ints",
    "Predictions",
    "check_pictures",
    "clean",
]

IMBALANCE = 10  # times the images of the smallest class, from which on classes count as imbalanced

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


@dataclass
class Confusion:
    """Confusions: the number of images or pixels per true and predicted class, as three arrays of one length.

    Args:
        label: the true class.
        predicted: the most probable class.
        count: number of images, or of pixels.
    """

    label: Ints
    predicted: Ints
    count: Ints

    def dense(self, classes: int) -> Ints:
        """Return the matrix, (classes, classes): a row is a true class."""
        matrix = np.zeros((classes, classes), dtype=np.int64)
        matrix[self.label, self.predicted] = self.count
        return matrix

    def mistakes(self) -> list[tuple[int, int, int]]:
        """Label, predicted class and number of images, the most frequent mistake first."""
        triples = zip(self.label.tolist(), self.predicted.tolist(), self.count.tolist(), strict=True)
        return sorted((t for t in triples if t[0] != t[1]), key=lambda t: (-t[2], t[0], t[1]))


@dataclass
class Calibration:
    """Confidence and accuracy in bins of equal width over [0, 1], and how far they lie apart.

    Args:
        count: images in a bin.
        confidence: their mean probability of the most probable class; NaN without any.
        accuracy: how many of them were right, in [0, 1]; NaN without any.
    """

    count: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def error(self) -> float:
        """The expected calibration error ([Guo et al., 2017](https://arxiv.org/abs/1706.04599))."""
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((gap * self.count).sum() / max(1, self.count.sum()))


@dataclass
class Predictions:
    """Predictions of N images, in their order.

    Args:
        split: "test" or "val".
        classes: names of the C classes.
        label: (N,), the true classes.
        top: (N, up to 5), the most probable classes.
        confidence: (N,), probability of the most probable class.
        probability: (N,), probability of the true class.
        index: (N,), places of the images in the data set.
        wrong_index: places of the most wrong images, the worst first.
        wrong_image: uint8 (K, H, W, 3 or 1), those images; None where they are no images.
        wrong_file: their files, or "".
        weights: "best", "last" or "given": the best checkpoint, the last epoch, or a given checkpoint.
        train_counts: (up to C,), number of training images per class; None where it is unknown.
    """

    unit: ClassVar[str] = "images"

    split: str
    classes: list[str]
    label: Ints
    top: Ints
    confidence: Floats
    probability: Floats
    index: Ints
    wrong_index: Ints
    wrong_image: npt.NDArray[np.uint8] | None
    wrong_file: list[str]
    weights: str = "best"
    train_counts: Ints | None = None

    @classmethod
    def read(cls, path: Path) -> Predictions:
        """Read ``predictions.npz``."""
        arrays = read_arrays(path)
        _check(arrays)
        labels, top = arrays["label"].astype(np.int64), arrays["top"].astype(np.int64)
        known = 1 + max(int(labels.max(initial=0)), int(top.max(initial=0)))
        return cls(
            str(arrays["split"]),
            numbered([clean(name) for name in arrays["classes"]], known),
            labels,
            top,
            arrays["confidence"].astype(np.float64),
            arrays["probability"].astype(np.float64),
            arrays["index"],
            arrays.get("wrong_index", np.zeros(0, np.int64)),
            arrays.get("wrong_image"),
            [clean(file) for file in arrays.get("wrong_file", [])],
            str(arrays.get("weights", "best")),
            arrays.get("train_counts"),
        )

    @property
    def predicted(self) -> Ints:
        """The most probable class of each image."""
        found: Ints = self.top[:, 0]
        return found

    def confusion(self) -> Confusion:
        """Count each pair of a true and a predicted class."""
        pairs, count = np.unique(self.label * len(self.classes) + self.predicted, return_counts=True)
        return Confusion(pairs // len(self.classes), pairs % len(self.classes), count)

    def calibration(self, bins: int = 15) -> Calibration:
        """Compare confidence and accuracy."""
        right = (self.predicted == self.label).astype(np.float64)
        known = np.nan_to_num(self.confidence)  # of weights that are not finite
        places = np.clip(np.ceil(known * bins).astype(int) - 1, 0, bins - 1)  # ]a, b], as torchmetrics has it
        count = np.bincount(places, minlength=bins)
        with np.errstate(invalid="ignore"):
            confidence = np.bincount(places, self.confidence, bins) / count
            accuracy = np.bincount(places, right, bins) / count
        return Calibration(count, confidence, accuracy)

    def recalls(self) -> tuple[Floats, Ints]:
        """Return the recall per class, NaN without images, and the number of images."""
        count = np.bincount(self.label, minlength=len(self.classes))
        right = np.bincount(self.label[self.predicted == self.label], minlength=len(self.classes))
        with np.errstate(invalid="ignore"):
            return right / count, count

    def precisions(self) -> Floats:
        """Return the precision per class; NaN for classes that were not predicted."""
        taken = np.bincount(self.predicted, minlength=len(self.classes))
        right = np.bincount(self.label[self.predicted == self.label], minlength=len(self.classes))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(right / taken)

    @property
    def frequencies(self) -> Ints:
        """Number of training images per class, or of evaluated images where training is unknown, (C,)."""
        if self.train_counts is None:
            return self.recalls()[1]
        counts: Ints = np.zeros(len(self.classes), np.int64)
        known = self.train_counts[: len(counts)]
        counts[: len(known)] = known
        return counts

    @property
    def is_imbalanced(self) -> bool:
        """Return whether a class has more than ``IMBALANCE`` times the images of another class with images."""
        counts = self.frequencies[self.frequencies > 0]
        return len(counts) > 1 and bool(counts.max() > IMBALANCE * counts.min())

    def groups(self) -> dict[str, Ints]:
        """Return the classes of head, middle and tail: the most frequent, other and rarest third of the classes.

        Thirds exist for any data set. The bounds of 100 and 20 training images of
        [Liu et al., 2019](https://arxiv.org/abs/1904.05160) would leave groups of most data sets without a class.
        Classes without images are in no group.
        """
        counts = self.frequencies
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] > 0]
        third = max(1, len(order) // 3)
        return {"head": order[:third], "middle": order[third:-third], "tail": order[-third:]}

    def balanced_accuracy(self) -> float:
        """Return the mean recall of the classes that have images."""
        return _mean(self.recalls()[0])

    def macro_f1(self) -> float:
        """Return the mean F1 score of the classes that have images or were predicted. F1 is 0 if nothing is right."""
        taken = np.bincount(self.predicted, minlength=len(self.classes))
        count = np.bincount(self.label, minlength=len(self.classes))
        right = np.bincount(self.label[self.predicted == self.label], minlength=len(self.classes))
        with np.errstate(invalid="ignore"):
            return _mean(2 * right / (count + taken))

    def by_frequency(self) -> dict[str, float]:
        """Return balanced accuracy, macro F1, and the mean recall of the classes of each group, if imbalanced."""
        if not self.is_imbalanced:
            return {}
        recalls = self.recalls()[0]
        found = {f"{name}_recall": _mean(recalls[classes]) for name, classes in self.groups().items()}
        found = {"balanced_accuracy": self.balanced_accuracy(), "macro_f1": self.macro_f1(), **found}
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def wrong(self) -> Iterator[tuple[npt.NDArray[np.uint8], str, str, float, float, str]]:
        """Yield an image with a large loss: pixels, true class, predicted class, their probabilities, and its file."""
        places = {int(place): i for i, place in enumerate(self.index)}
        files = self.wrong_file or [""] * len(self.wrong_index)
        for image, place, file in zip(
            [] if self.wrong_image is None else self.wrong_image, self.wrong_index, files, strict=False
        ):
            i = places[int(place)]
            label, predicted = self.classes[self.label[i]], self.classes[self.predicted[i]]
            where = Path(file).name if file else f"image {place}"
            yield image, label, predicted, float(self.probability[i]), float(self.confidence[i]), where


def _mean(values: Floats) -> float:
    """Return the mean of the numbers that are not NaN, or NaN."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


SPLITS = ("test", "val")
LARGEST = 4096  # pixels of a side of an image that is kept


def clean(text: object) -> str:
    """Return text that can be written in any encoding of Unicode."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def check_pictures(images: npt.NDArray[Any], name: str, dims: int) -> None:
    """Raise ValueError unless images are uint8, of 1 or 3 channels, and not too large."""
    shape = images.shape
    sides = shape[dims - 3 : dims - 1]
    if (
        images.dtype != np.uint8
        or len(shape) != dims
        or shape[-1] not in (1, 3)
        or not all(0 < side <= LARGEST for side in sides)
    ):
        raise ValueError(f"{name} of type {images.dtype} and shape {shape} is no picture")


def _check(arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Raise ValueError unless the arrays are predictions."""
    if str(arrays["split"]) not in SPLITS:
        raise ValueError(f"split={str(arrays['split'])!r:.60} is not one of {', '.join(SPLITS)}")
    counts = arrays.get("train_counts", np.zeros(0, np.int64))
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
        raise ValueError(f"train_counts of type {counts.dtype} and shape {counts.shape} are no numbers of images")
    if arrays["classes"].ndim != 1:
        raise ValueError("classes is not a list of names")
    count = len(arrays["label"])
    for name, dims, kinds in (
        ("label", 1, "iu"), ("top", 2, "iu"), ("index", 1, "iu"), ("confidence", 1, "f"), ("probability", 1, "f"),
    ):  # fmt: skip
        found = arrays[name]
        if found.dtype.kind not in kinds or found.ndim != dims or len(found) != count:
            raise ValueError(f"{name} of type {found.dtype} and shape {found.shape} does not belong to {count} images")
    if not arrays["top"].shape[1]:
        raise ValueError("top has no columns")
    for name in ("label", "top", "index"):
        if arrays[name].min(initial=0) < 0:
            raise ValueError(f"{name} has numbers below 0")
    for name in ("confidence", "probability"):
        if not ((arrays[name] >= 0) & (arrays[name] <= 1 + 1e-3)).all():
            raise ValueError(f"{name} has numbers that are not in [0, 1]")
    wrong = arrays.get("wrong_index", np.zeros(0, np.int64))
    if wrong.ndim != 1 or not np.isin(wrong, arrays["index"]).all():
        raise ValueError("wrong_index names images that are not there")
    if "wrong_image" in arrays and len(wrong):
        check_pictures(arrays["wrong_image"], "wrong_image", 4)
    if "wrong_file" in arrays and arrays["wrong_file"].ndim != 1:
        raise ValueError("wrong_file is not a list of names")
