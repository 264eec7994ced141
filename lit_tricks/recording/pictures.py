"""Pictures of what a model said, for W&B."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_tricks.reports.figures import draw_confusion, draw_wrong
from lit_tricks.reports.run import read_run_folder
from lit_tricks.reports.style import draw

__all__ = ["send_pictures"]


def send_pictures(run: Path, loggers: Iterable[Any]) -> None:
    """Draw the confusion matrix and the most wrong images, and log them to W&B, where a logger of it is there.

    Args:
        run: the folder of the run.
        loggers: of the Trainer.
    """
    loggers = [logger for logger in loggers if type(logger).__name__ == "WandbLogger"]
    said = read_run_folder(run).predictions if loggers else None
    if said is None:
        return
    pictures = {"confusion": draw(draw_confusion, said, "")}
    pictures |= {"most_wrong": draw(draw_wrong, said)} if list(said.wrong()) else {}
    for name, picture in pictures.items():
        (run / f"{name}.png").write_bytes(picture)
        for logger in loggers:
            logger.log_image(key=f"{said.split}/{name}", images=[str(run / f"{name}.png")])
