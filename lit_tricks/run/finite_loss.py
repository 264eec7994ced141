"""A loss that is not finite, reported in the first step that has one, or the end of the run."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lit_tricks.utils.arguments import choice
from lit_tricks.utils.finite import all_finite, first_not_finite_in
from lit_tricks.utils.transient import Transient

__all__ = ["FiniteLoss"]

PENDING = 64  # losses on their way from a GPU; it is never that far behind


class FiniteLoss(Transient, Callback):
    """Warn at the first training step whose loss is not finite, or stop there.

    The loss of each step is copied to the CPU, and compared once it is there: no step waits for a GPU. The weights are
    compared at the end of each epoch, which also serves modules whose ``training_step`` returns no loss.

    Args:
        on_nan: "warn", once a fit, or "stop" the run with an error.

    Raises:
        ValueError: if ``on_nan`` is neither.
        RuntimeError: in the step, or some steps later on a GPU, if the run is to stop.
    """

    _found: bool
    _memory: Tensor | None
    _pending: deque[tuple[int, Tensor, Any]]

    transient: ClassVar[dict[str, Any]] = {"_found": False, "_memory": None, "_pending": deque()}

    def __init__(self, on_nan: Literal["warn", "stop"] = "warn") -> None:
        self.on_nan: str = choice(self, "on_nan", on_nan, ("warn", "stop"))
        self.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to check the steps of this fit."""
        self.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss of this step, and losses of earlier steps that have arrived from a GPU."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._found or not isinstance(loss, Tensor) or not (loss.is_floating_point() and loss.numel() == 1):
            return
        if loss.is_cuda:
            self._send(loss, trainer.global_step)
            self._receive(wait=False)
        elif not math.isfinite(loss):
            self._report(f"the loss of step {trainer.global_step} is {float(loss):g}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also check the weights."""
        self._receive(wait=True)
        if not self._found and not all_finite(pl_module):
            self._report(f"{first_not_finite_in(pl_module)!r} is not finite after step {trainer.global_step}")

    def _send(self, loss: Tensor, step: int) -> None:
        if self._memory is None:
            self._memory = torch.zeros(PENDING, pin_memory=True)
        if len(self._pending) == PENDING:
            self._receive(wait=True)
        place = self._memory[step % PENDING]
        place.copy_(loss.detach().reshape(()), non_blocking=True)
        arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrival.record()
        self._pending.append((step, place, arrival))

    def _receive(self, wait: bool) -> None:
        while self._pending and not self._found and (wait or self._pending[0][2].query()):
            step, place, arrival = self._pending.popleft()
            arrival.synchronize()
            if not math.isfinite(place):
                self._report(f"the loss of step {step} is {float(place):g}")

    def _report(self, what: str) -> None:
        self._found = True
        remedy = "Lower the learning rate, clip gradients (gradient_clip_val=1), or check the data for such values"
        if self.on_nan == "stop":
            raise RuntimeError(f"{what}: on_nan='stop' ends the run. {remedy}.")
        rank_zero_only(warnings.warn)(f"{what}. {remedy}. on_nan='stop' ends a run here.", stacklevel=2)
