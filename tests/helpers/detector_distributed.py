"""One of two processes that train a Detector, and count what it finds in seven images: four in one, three in the other.

Run by ``_two.py`` for ``test_detector.py``. It leaves ``FOLDER/<rank>.pt``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from helpers.detectors import detector, trainer
from lit_tricks.data import DigitDetection
from lit_tricks.tasks.detection import _AveragePrecision


class Few:
    """The first images of a source."""

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


def found_and_wanted() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return some boxes per image, and detections near them or far from them."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for count in (3, 1, 0, 2, 4, 1, 2):
        corners = 60 * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corners, corners + 10 + 20 * torch.rand(count, 2, generator=generator)], 1)
        labels = torch.randint(1, 3, (count,), generator=generator)
        near = boxes + 3 * torch.randn(count, 4, generator=generator)
        found = {"boxes": near, "labels": labels, "scores": torch.rand(count, generator=generator)}
        pairs.append((found, {"boxes": boxes, "labels": labels}))
    return pairs


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    module, data = detector(), DigitDetection(batch_size=4)
    data._sources.update(data._load("val"))
    data._sources["val"] = Few(data._sources["val"], 7)
    run = trainer(strategy="ddp", devices=2, limit_train_batches=2, limit_val_batches=None)
    run.fit(module, data)
    metric = _AveragePrecision()
    for found, wanted in found_and_wanted()[rank::2]:
        metric.update([found], [wanted])
    left = {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "precision": {name: float(value) for name, value in metric.compute().items()},
    }
    torch.save(left, folder / f"{rank}.pt")
