"""Base of a trick that estimates buffers for validation, checkpoints and the end of a fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.batchnorm.buffers import BufferOverride

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Estimating"]


class Estimating(Trick):
    """Separates the buffers of training from the estimates for the validated weights.

    After a validation, the buffers of training are restored. Checkpoints before the next step have the estimate in
    their ``state_dict``, and the buffers of training in the state of the callback. The fit ends with the estimate.

    Attributes:
        restore: False lets training continue from the estimate.
    """

    transient: ClassVar[tuple[str, ...]] = ("_fit",)

    restore: bool
    _fit: _Fit | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the statistics of training before another fit of the same module."""
        if stage != "fit":
            return
        last, self._fit = self._fit, _Fit(weakref.ref(trainer), weakref.ref(pl_module))
        if last and last.trainer() is trainer and last.module() is pl_module and last.override.is_as_left():
            last.override.restore()
        # The module's hook precedes the hooks of all callbacks.
        self.wrap(pl_module, "on_load_checkpoint", self._around_loading)
        # The module's hook follows the hooks of all callbacks, and weights-only checkpoints skip those hooks.
        self.wrap(pl_module, "on_save_checkpoint", self._around_saving)
        # The module's hook follows the hooks of all callbacks.
        self.wrap(pl_module, "teardown", self._around_teardown)
        # Other callbacks' on_exception may still save a checkpoint; the strategy's comes last.
        self.wrap(trainer.strategy, "on_exception", self._around_exception)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to follow steps and validations when training starts."""
        self._now.handles = [optimizer.register_step_post_hook(self._on_step) for optimizer in trainer.optimizers]
        # The module's hook follows the hooks of all callbacks, such as ModelCheckpoint.
        self.wrap(pl_module, "on_validation_end", self._around_validation_end)

    def _show(self, pl_module: LightningModule) -> None:
        self._now.override.show(pl_module)
        if not self.restore:
            self._now.override.forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the statistics of training. The wrappers stay for checkpoints that other callbacks now write."""
        if self._fit:
            self._fit.override.restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing here. The module's own hook runs last, after other callbacks have set the weights."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the state to resume from, also in checkpoints that are written after a fit."""
        if self._fit and not self._wrappers:
            self._fit.override.save_as_shown(checkpoint, self.state_key)

    # The wrappers: each is called instead of a method, also in a copy of the module, whose copy of the trick has no fit

    def _around_validation_end(self, on_validation_end: Callable[..., Any]) -> Any:
        result = on_validation_end()  # the module's hook; the hooks of the callbacks ran before
        if self._fit:
            self._fit.override.restore()
        return result

    def _around_saving(self, on_save_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        if self._fit and self.restore:
            self._fit.override.save(checkpoint, self.state_key)  # an average has already replaced the weights
        return on_save_checkpoint(checkpoint)

    def _around_loading(self, on_load_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        if self._fit:
            self._fit.override.load(checkpoint, self.state_key, self._fit.module())  # before other code reads it
        return on_load_checkpoint(checkpoint)

    def _around_teardown(self, teardown: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = teardown(*args, **kwargs)
        if self._fit and not self._fit.begun:  # a resumed run that was already complete skips the end of the training
            self._show(self._fit.module())
        self._end_fit()
        return result

    def _around_exception(self, on_exception: Callable[..., Any], exception: BaseException) -> Any:
        self._end_fit()
        return on_exception(exception)

    # Helpers

    @property
    def _now(self) -> _Fit:
        assert self._fit is not None
        return self._fit

    def _on_step(self, *_: Any) -> None:
        self._now.override.values = {}

    def _end_fit(self) -> None:
        for handle in self._fit.handles if self._fit else ():
            handle.remove()
        self.unwrap()


@dataclass
class _Fit:
    """The state of a fit."""

    trainer: Callable[[], Any]
    module: Callable[[], Any]
    override: BufferOverride = field(
        default_factory=BufferOverride
    )  # the statistics of the weights, until the next step
    norms: list[float] | None = None  # of these weights
    shift: float | None = None  # to be logged
    handles: list[Any] = field(default_factory=list)
    begun: bool = False
    watched: bool = False
    watch: Any = None  # on the first training step
    warned: bool = False
