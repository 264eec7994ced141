"""One of two processes that test a Classifier on the digits: ``python tests/_evidence_distributed.py FOLDER``."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from test_evidence import see_test

from lit_tricks.reports.predictions import Predictions

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*use `Trainer\\(devices=1")
    folder = Path(sys.argv[1])
    rank = os.environ["RANK"]
    place = folder if rank == "0" else folder / rank
    place.mkdir(exist_ok=True)
    if rank != "0":
        Predictions.read = lambda path: None  # type: ignore[method-assign, assignment]  # rank zero writes alone
    see_test(place, devices=2, strategy="ddp")
    torch.save({"files": [p.name for p in place.iterdir()]}, folder / f"{rank}.pt")
