"""Test a Segmenter on an odd number of images in two processes."""

from __future__ import annotations

from pathlib import Path

from helpers.evidence import see_masks
from helpers.evidence_distributed import see_in_two
from lit_tricks.run.reading.mask_predictions import MaskPredictions


def main(folder: Path) -> None:
    see_in_two(folder, see_masks, MaskPredictions)
