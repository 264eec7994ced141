"""Base of the tricks that average weights: when they update, what is validated and saved, and the final weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_tricks._compat import saves_in_shards
from lit_tricks.callbacks.averaging.conflicts import (
    reject_conflicting_callbacks,
    reject_hidden_steps,
    reject_hidden_weights,
)
from lit_tricks.callbacks.averaging.kept_average import KeptAverage
from lit_tricks.callbacks.averaging.raw_validation import validate_trained
from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.utils.arguments import choice
from lit_tricks.utils.modes import modes_kept
from lit_tricks.utils.processes import broadcasts_buffers
from lit_tricks.utils.training_length import is_fast_dev_run

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Averaging"]


class Averaging(KeptAverage):
    """Averages the weights of a run; the average is what is validated, saved, and left in the module.

    After the first update, the average is swapped into the module before the first hook of a validation, and swapped
    out after its last hook. It is swapped in for good before ``on_train_end``. Every checkpoint has the average as its
    ``state_dict``. Full checkpoints also have the trained weights, in the state of the callback. After an error the
    module has its trained weights.

    Args:
        buffers: the floating-point buffers that are averaged: "statistics", "average" for all, "copy" for none.
        validate: whether the average is validated, saved and left in the module. False keeps it only in the state of
            the callback. "both" also validates the trained weights before, and logs their metrics as ``raw/...``.
        name: name of the average, if a run has several.
        on_cpu: keep the average on the CPU.
    """

    _handles: list[Any]
    _raw_metrics: dict[str, float]  # logged with the metrics of the average

    def __init__(self, buffers: str, validate: bool | str, name: str | None, on_cpu: bool = False) -> None:
        validate = choice(self, "validate", validate, (True, False, "both"))
        super().__init__(buffers, bool(validate), name)
        self.validate = validate
        self._on_cpu = on_cpu

    # The life of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the trained weights before another fit of the same module."""
        if stage != "fit":
            return
        self._end_fit()
        weights = self._weights
        same = self._run is not None and self._run[0]() is trainer and self._run[1]() is pl_module
        if not same or weights is None or not weights.is_as_left():
            self._forget()
        else:
            weights.swap(False)
            weights.leave()
        self._run = weakref.ref(trainer), weakref.ref(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or resume the average, and wrap validation, saving and the end of the fit.

        Raises:
            RuntimeError: if another average is also validated and saved, or the strategy or optimizer hides weights or
                steps.
        """
        reject_conflicting_callbacks(self, trainer)
        reject_hidden_weights(self, trainer, pl_module)
        reject_hidden_steps(self, trainer)
        if self._weights is None or not self._weights.belongs_to(pl_module):
            self._weights = AveragedWeights(pl_module, self.buffers, self._on_cpu)
            self._steps = self._updates = 0
        self._weights.follow()
        self._saved_names = set(pl_module.state_dict())
        self._in_shards = saves_in_shards(trainer)
        if self._restored is not None:
            self._restore(self._restored)
        self._handles = [optimizer.register_step_post_hook(self._on_step) for optimizer in trainer.optimizers]
        # Other callbacks' on_exception may still save a checkpoint; the strategy's comes last.
        self.wrap(trainer.strategy, "on_exception", self._around_exception)
        if self._in_shards:
            # on_save_checkpoint does not get the path, to which every process writes its shards.
            self.wrap(trainer.strategy, "save_checkpoint", self._around_writing)
        if self.validate:
            # It precedes on_validation_start of all callbacks, in any order of the list.
            self.wrap(pl_module, "on_validation_model_eval", self._around_validation_start)
            # Weights-only checkpoints skip the hooks of callbacks.
            self.wrap(pl_module, "on_save_checkpoint", self._around_saving)
            # It precedes on_train_end of all callbacks, in any order of the list.
            self.wrap(trainer.fit_loop, "on_run_end", self._around_run_end)
            # Afterwards the modules are in training mode. No hook runs that late, or before the first validation hook.
            self.wrap(trainer.fit_loop.epoch_loop.val_loop, "run", partial(self._around_validation, trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if the batch stepped an optimizer."""
        self._catch_up()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the trained weights, if they were also validated."""
        metrics, self._raw_metrics = self._raw_metrics, {}
        if metrics:
            raw = {f"raw/{key}": value for key, value in metrics.items()}
            pl_module.log_dict(raw, sync_dist=True, add_dataloader_idx=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there is no average."""
        if not self._updates and not is_fast_dev_run(trainer):
            rank_zero_only(warnings.warn)(
                f"{self.state_key} averaged nothing in {self._steps} steps: the model keeps the weights it was "
                f"trained to. {self._why_nothing()}",
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the trained weights. The wrappers stay for checkpoints that other callbacks now write."""
        if self._weights and self._wrappers:
            self._catch_up()
            self._weights.swap(False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the average in the module, and remove the wrappers."""
        if stage == "fit" and self._wrappers:
            if self._weights and self._updates and self.validate:
                self._weights.swap(True)  # a resumed run that was already complete skips on_run_end
            self._end_fit()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average also in checkpoints that are written after a fit."""
        weights = self._weights
        if self.validate and not self._wrappers and weights and weights.belongs_to(pl_module) and weights.is_as_left():
            self._put_average(trainer, checkpoint)

    # The wrappers: each is called instead of a method

    def _around_validation(self, trainer: Trainer, run: Callable[[], Any]) -> Any:
        self._catch_up()
        is_resumed = trainer.fit_loop.epoch_loop.val_loop.restarting  # in the middle: the first part was seen before
        is_due = self.validate == "both" and self._updates and not trainer.sanity_checking and not is_resumed
        if is_due:
            self._sync()
            self._showing_raw = True
            try:
                with modes_kept(trainer.lightning_module):
                    self._raw_metrics = validate_trained(trainer, trainer.lightning_module, run)
            finally:
                self._showing_raw = False
        result = run()
        if self._weights:
            self._weights.swap(False)  # modules are in training mode again, so adapters have unmerged
        return result

    def _around_validation_start(self, on_validation_model_eval: Callable[..., Any]) -> Any:
        self._catch_up()
        if self._weights and self._updates and not self._showing_raw:
            self._sync()
            self._weights.swap(True)
        return on_validation_model_eval()

    def _around_saving(self, on_save_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        if self._trainer:
            self._put_average(self._trainer, checkpoint)
        return on_save_checkpoint(checkpoint)

    def _around_run_end(self, on_run_end: Callable[..., Any]) -> Any:
        self._catch_up()
        if self._weights and self._updates:
            self._weights.sync()
            self._weights.swap(True)
        return on_run_end()

    def _around_exception(self, on_exception: Callable[..., Any], exception: BaseException) -> Any:
        self._end_fit()
        return on_exception(exception)

    def _sync(self) -> None:
        # DDP would broadcast in the next forward pass, and not again before training. While the average is shown, this
        # would miss the module's own buffers.
        if self._weights and self._trainer:
            self._weights.sync(own=broadcasts_buffers(self._trainer))

    def _end_fit(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._wrappers and self._weights:
            self._weights.follow()
            self._weights.leave()
        self.unwrap()

    def _forget(self) -> None:
        super()._forget()
        self._handles = []
        self._showing_raw = False
        self._raw_metrics = {}

    def _what_for(self) -> str:
        uses = {True: "validated and saved", "both": "validated in addition to the trained weights, and saved"}
        buffers = self._weights.describe_buffers() if self._weights else ""
        return uses.get(self.validate, "kept only") + (f"; {buffers}" if buffers else "")

    def _why_nothing(self) -> str:
        return ""
