"""The progress bar of the command line: one line that is no wider than a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from lit_tricks.run.reading.scores import SCORES

__all__ = ["OneLineBar"]

REFRESHES = 10  # a second, at most
BAR = 10  # columns


class OneLineBar(RichProgressBar):
    """Show a bar, the time, the loss and the score. A text that does not fit is cut.

    Lightning's bar wraps its metrics over several lines, and shows validation in a further line.
    """

    def __init__(self, console_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(refresh_rate=REFRESHES, console_kwargs=console_kwargs)
        self._metrics = ""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return the columns, of which Lightning's own for the metrics stays empty."""
        return [
            _TextColumn(lambda task: task.description.rstrip()),
            BarColumn(bar_width=BAR),
            _TextColumn(_progress),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
            _TextColumn(lambda task: self._metrics if task.id == self.train_progress_bar_id else ""),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Keep the metrics in a short form, and return none to Lightning."""
        self._metrics = _short(trainer.progress_bar_metrics)
        return {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hide the bar of the training."""
        super().on_validation_start(trainer, pl_module)
        self._show_training(visible=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the training again."""
        super().on_validation_end(trainer, pl_module)
        self._show_training(visible=True)

    def _show_training(self, visible: bool) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, visible=visible)


class _TextColumn(ProgressColumn):
    """A text that is cut, not wrapped."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task), no_wrap=True, overflow="ellipsis")


def _progress(task: Task) -> str:
    total = task.total if task.total is not None else float("inf")
    return f"{int(task.completed)}/{'?' if total == float('inf') else int(total)}"


def _short(metrics: Mapping[str, float]) -> str:
    """Return metrics as text, the training loss first: "loss 0.531, val loss 0.512, top1 98.3%"."""
    shown: dict[str, float] = {}
    for name, value in sorted(metrics.items(), key=lambda pair: not pair[0].startswith("train")):
        if not name.endswith("_epoch"):  # the step has its own
            split, _, metric = name.removesuffix("_step").rpartition("/")
            shown[metric if metric not in shown else f"{split} {metric}"] = value
    return ", ".join(
        f"{name} {value:.1%}" if name in SCORES else f"{name} {value:.3g}" for name, value in shown.items()
    )
