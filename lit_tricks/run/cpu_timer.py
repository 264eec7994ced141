"""The CPU time of a training, which compares runs on a busy machine better than the clock."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_tricks.utils.cpu_seconds import cpu_seconds

__all__ = ["CPUTimer"]


class CPUTimer(Callback):
    """Count the CPU seconds of training and validation, including the runs that a run resumes."""

    def __init__(self) -> None:
        self._before = 0.0  # seconds of the parts that have ended
        self._start: float | None = None
        self._on_cpu = False

    @property
    def seconds(self) -> float | None:
        """CPU seconds so far. None where a GPU trains, since the CPU then waits."""
        if not self._on_cpu:
            return None
        return self._before + (0.0 if self._start is None else cpu_seconds() - self._start)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._on_cpu = trainer.strategy.root_device.type == "cpu"
        self._start = cpu_seconds()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._before, self._start = self.seconds or 0.0, None

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far, for the run that resumes this one."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the seconds of the run before."""
        self._before = state_dict["seconds"] or 0.0
