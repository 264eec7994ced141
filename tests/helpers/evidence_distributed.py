"""Test a Classifier on the digits in two processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.evidence import see_labels
from lit_tricks.run.reading.predictions import Predictions


def main(folder: Path) -> None:
    see_in_two(folder, see_labels, Predictions)


def see_in_two(folder: Path, see: Callable[..., Any], kept: Any) -> None:
    """Test in two processes, and note the files that each of them leaves."""
    rank = os.environ["RANK"]
    place = folder if rank == "0" else folder / rank
    place.mkdir(exist_ok=True)
    if rank != "0":
        kept.read = lambda path: None  # rank zero writes alone
    see(place, devices=2, strategy="ddp")
    torch.save({"files": [p.name for p in place.iterdir()]}, folder / f"{rank}.pt")
