"""Predictions for W&B: its own chart of the confusion matrix, and tables that can be sorted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lit_tricks._compat import lightning_classes
from lit_tricks.run.reading.mask_predictions import MaskPredictions
from lit_tricks.run.reading.predictions import Predictions
from lit_tricks.run.reading.run import read_run_folder

__all__ = ["send_predictions"]

MOST_CLASSES = 100  # of a confusion matrix; of more classes only the pairs that occur are in it
MOST_ROWS = 10_000  # of a table, which is all that W&B shows


def send_predictions(run: Path, loggers: Iterable[Any]) -> None:
    """Log the confusion matrix, the predictions and the worst images to W&B, where a logger of it is there.

    Args:
        run: the folder of the run.
        loggers: of the Trainer.
    """
    loggers = [logger for logger in loggers if isinstance(logger, lightning_classes("loggers.WandbLogger"))]
    if not loggers:
        return
    found = read_run_folder(run)
    predictions = found.predictions or found.masks
    if predictions is None:
        return
    for logger in loggers:
        parts = {"confusion": _confusion(predictions)}
        parts |= _tables(predictions) if isinstance(predictions, Predictions) else _mask_tables(predictions)
        logger.experiment.log({f"{predictions.split}/{name}": part for name, part in parts.items()})


def _confusion(predictions: Predictions | MaskPredictions) -> Any:
    import wandb

    names, found = predictions.classes, predictions.confusion()
    cells = zip(found.label.tolist(), found.predicted.tolist(), found.count.tolist(), strict=True)
    if len(names) <= MOST_CLASSES:
        cells = ((*pair, count) for pair, count in np.ndenumerate(found.dense(len(names))))  # type: ignore[assignment]
    rows = [[names[label], names[predicted], int(count)] for label, predicted, count in cells]
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows[: MOST_CLASSES**2]),
        {name: name for name in ("Actual", "Predicted", "nPredictions")},
        {"title": f"Confusion matrix, {predictions.unit}"},
    )


def _tables(predictions: Predictions) -> dict[str, Any]:
    import wandb

    columns = zip(
        predictions.index,
        predictions.label,
        predictions.predicted,
        predictions.confidence,
        predictions.probability,
        strict=True,
    )
    rows = [
        [
            int(index),
            predictions.classes[label],
            predictions.classes[predicted],
            bool(label == predicted),
            float(sure),
            float(true),
        ]
        for index, label, predicted, sure, true in columns
    ]
    header: list[str | int] = ["image", "label", "predicted", "right", "confidence", "probability of the label"]
    worst = [
        [wandb.Image(pixels.squeeze()), where, label, predicted, sure, true]
        for pixels, label, predicted, true, sure, where in predictions.wrong()
    ]
    found = {"predictions": wandb.Table(columns=header, data=rows[:MOST_ROWS])}
    if worst:
        header = ["image", "file", "label", "predicted", "confidence", "probability of the label"]
        found["most_wrong"] = wandb.Table(columns=header, data=worst)
    return found


def _mask_tables(predictions: MaskPredictions) -> dict[str, Any]:
    import wandb

    names = dict(enumerate(predictions.classes)) | {255: "ignored"}

    def masks(truth: Any, predicted: Any) -> dict[str, Any]:
        both = {"truth": truth, "predicted": predicted}
        return {
            name: {"mask_data": np.where(labels < 0, 255, labels).astype(np.uint8), "class_labels": names}
            for name, labels in both.items()
        }

    if not predictions.worst:
        return {}
    rows = [
        [wandb.Image(each.image.squeeze(), masks=masks(each.mask, each.predicted)), each.where, each.iou]
        for each in predictions.worst
    ]
    return {"worst_images": wandb.Table(columns=["image", "file", "IoU"], data=rows)}
