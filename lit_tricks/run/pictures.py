"""Pictures of what a model said, for W&B."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_tricks._compat import lightning_classes
from lit_tricks.run.reading.predictions import Predictions
from lit_tricks.run.reading.run import read_run_folder
from lit_tricks.run.report.figures import draw_confusion, draw_worst_masks, draw_wrong
from lit_tricks.run.report.style import draw

__all__ = ["send_pictures"]


def send_pictures(run: Path, loggers: Iterable[Any]) -> None:
    """Draw what the report shows of predictions, and log it to W&B, where a logger of it is there.

    That is the confusion matrix and the most wrong images, or of a segmentation those with the lowest IoU.

    Args:
        run: the folder of the run.
        loggers: of the Trainer.
    """
    loggers = [logger for logger in loggers if isinstance(logger, lightning_classes("loggers.WandbLogger"))]
    if not loggers:
        return
    found = read_run_folder(run)
    said = found.predictions or found.masks
    if said is None:
        return
    pictures = {"confusion": draw(draw_confusion, said, "")}
    if isinstance(said, Predictions):
        pictures |= {"most_wrong": draw(draw_wrong, said)} if list(said.wrong()) else {}
    else:
        pictures |= {"worst_images": draw(draw_worst_masks, said)} if said.worst else {}
    for name, picture in pictures.items():
        (run / f"{name}.png").write_bytes(picture)
        for logger in loggers:
            logger.log_image(key=f"{said.split}/{name}", images=[str(run / f"{name}.png")])
