"""Tests whose predictions are kept: of a Classifier on the digits, and of a Segmenter on an odd number of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.fits import make_trainer
from helpers.segmenters import IGNORED, K, loader, pairs, segmenter, trainer
from lit_tricks import Classifier, Segmenter
from lit_tricks.data import Digits
from lit_tricks.run.evidence.callback import Evidence
from lit_tricks.run.reading.mask_predictions import MaskPredictions
from lit_tricks.run.reading.predictions import Predictions

DIGITS = {"num_classes": 10, "input_size": (1, 8, 8), "model_args": {"depth": 18, "width": 1 / 32, "small_input": True}}

NAMES = [f"class {i}" for i in range(K)]


def see_labels(folder: Path, **kwargs: Any) -> tuple[Classifier, Predictions]:
    torch.manual_seed(0)
    model, data, evidence = Classifier(**DIGITS), Digits(batch_size=100), Evidence()  # type: ignore[arg-type]
    trainer = make_trainer(evidence, **kwargs)
    trainer.test(model, data, verbose=False)
    evidence.save(folder / "predictions.npz", trainer, data.classes)
    return model, Predictions.read(folder / "predictions.npz")


def samples() -> list[Any]:
    """Eleven images: one has no pixel that counts, the masks of the others lack some classes."""
    found = pairs(11)
    found[3][1][:] = IGNORED
    found[5][1][:8] = 2
    return found


def see_masks(folder: Path, **kwargs: Any) -> tuple[Segmenter, MaskPredictions, dict[str, Any]]:
    module, evidence = segmenter(), Evidence()
    run = trainer(callbacks=[evidence], **kwargs)
    [metrics] = run.test(module, loader(samples(), 3), verbose=False)
    evidence.save(folder / "predictions.npz", run, NAMES)
    return module, MaskPredictions.read(folder / "predictions.npz"), dict(metrics)
