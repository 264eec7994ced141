"""What two processes do to test a Segmenter on an odd number of images."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from test_mask_evidence import see_test

from lit_tricks.reports.masks import MaskPredictions


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    place = folder if rank == "0" else folder / rank
    place.mkdir(exist_ok=True)
    if rank != "0":
        MaskPredictions.read = lambda path: None  # type: ignore[method-assign, assignment]  # rank zero writes alone
    see_test(place, devices=2, strategy="ddp")
    torch.save({"files": [p.name for p in place.iterdir()]}, folder / f"{rank}.pt")
