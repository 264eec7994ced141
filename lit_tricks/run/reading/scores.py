"""The metrics that are scores: fractions in [0, 1], higher is better."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["SCORES", "scores_in"]

# The first that a run has is the one that it is judged by.
SCORES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "map": "mAP",
    "map50": "mAP50",
    "map75": "mAP75",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "head_recall": "recall of the head",
    "middle_recall": "recall of the middle",
    "tail_recall": "recall of the tail",
}


def scores_in(names: Iterable[str]) -> list[str]:
    """Return the metrics that are scores, the main score first."""
    found = set(names)
    return [name for name in SCORES if name in found]
