"""Predictions of the pixels of a split: the confusion matrix, and the images with the lowest IoU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_tricks.run.evidence.seen import Seen, pixels_of, smaller
from lit_tricks.utils.batch import find

__all__ = ["MaskSplit", "joined_masks"]

WORST = 8  # images that are kept
SIDE = 160  # of an image that is kept, at most, in pixels

Arrays = dict[str, npt.NDArray[Any]]


class MaskSplit(Seen):
    """The predictions of one process for a split of images with masks.

    The pixels are counted per image. This gives the IoU of each image, and excludes images that a sampler repeats,
    which the metrics of a module count twice.
    """

    def __init__(self, dataset: Any, rank: int, replicas: int) -> None:
        super().__init__(dataset, rank, replicas)
        self.confusion: Tensor | None = None  # pixels by true and predicted class
        self.images = 0
        self.worst: list[dict[str, Any]] = []

    def add(self, batch: Any, outputs: list[Tensor]) -> None:
        """Count the pixels of a batch, if it has masks (N, H, W) and one of the outputs is their logits."""
        try:
            inputs, _, masks = find(batch, "the report")
        except RuntimeError:
            return
        masks = (masks[:, 0] if masks.dim() == 4 else masks).long()
        logits = next((o for o in outputs if o.dim() == 4 and masks.shape == (o.size(0), *o.shape[2:])), None)
        if logits is None:
            return
        predicted, classes = logits.argmax(1), logits.size(1)
        masks = torch.where((masks >= 0) & (masks < classes), masks, -1)
        if self.confusion is None:
            self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=masks.device)
        first, size = self.places * self.replicas + self.rank, self.size()
        self.places += len(masks)
        indices = range(first, first + len(masks) * self.replicas, self.replicas)
        once = [i for i in indices if size is None or i < size]
        self.images += len(once)
        ious = []
        for _, mask, guess in zip(once, masks, predicted, strict=False):
            matrix = _confusion(mask, guess, classes)
            self.confusion += matrix
            ious.append(_mean_iou(matrix))
        pictures = next((x for x in inputs.values() if x.dim() == 4), None)
        if pictures is not None and once:
            self.note_range(pictures)
            found = torch.stack(ious).tolist()
            for index, iou, *parts in zip(once, found, pictures, masks, predicted, strict=False):
                self._keep_worst(index, iou, *parts)

    def _keep_worst(self, index: int, iou: float, image: Tensor, mask: Tensor, predicted: Tensor) -> None:
        if math.isnan(iou) or iou == 1 or (len(self.worst) == WORST and iou >= self.worst[-1]["iou"]):
            return
        found: dict[str, Any] = {"iou": iou, "index": index, "file": self.file_of(index)}
        found["image"] = smaller(image[None].float(), SIDE)[0].cpu().numpy()
        for name, labels in (("mask", mask), ("predicted", predicted)):
            small = smaller(labels[None, None].float(), SIDE, "nearest-exact")[0, 0]
            found[name] = small.cpu().numpy().astype(np.int16)
        self.worst = sorted([*self.worst, found], key=lambda each: (each["iou"], each["index"]))[:WORST]

    def part(self) -> dict[str, Any] | None:
        """Return all of it, in memory of the CPU; None if there were no masks."""
        if self.confusion is None:
            return None
        ends = {"low": self.low, "high": self.high}
        return {
            "confusion": self.confusion.cpu().numpy(),
            "images": self.images,
            "worst": self.worst,
            **{name: None if end is None else end.float().cpu().numpy() for name, end in ends.items()},
        }


def joined_masks(parts: list[dict[str, Any]]) -> Arrays:
    """Return the predictions of all processes. The images with the lowest IoU are numbered from the lowest."""
    arrays: Arrays = {name: np.sum([part[name] for part in parts], 0) for name in ("confusion", "images")}
    worst = sorted((each for part in parts for each in part["worst"]), key=lambda each: (each["iou"], each["index"]))
    worst = worst[:WORST]
    arrays |= {f"worst_{name}": np.array([each[name] for each in worst]) for name in ("iou", "index", "file")}
    known = [part for part in parts if part["low"] is not None]
    for i, each in enumerate(worst):  # of one size or not
        low, high = np.min([part["low"] for part in known], 0), np.max([part["high"] for part in known], 0)
        arrays[f"image_{i}"] = pixels_of(each["image"][None], low, high)[0]
        arrays |= {f"{name}_{i}": each[name] for name in ("mask", "predicted")}
    return arrays


def _confusion(mask: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the pixels of an image by true and predicted class, (classes, classes), without label -1."""
    pairs = torch.where(mask >= 0, mask * classes + predicted, classes**2)
    return torch.bincount(pairs.flatten(), minlength=classes**2 + 1)[:-1].view(classes, classes)


def _mean_iou(confusion: Tensor) -> Tensor:
    """Return the mean IoU over the classes in the mask or the prediction; NaN without any."""
    both = confusion.diagonal()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).nanmean()
