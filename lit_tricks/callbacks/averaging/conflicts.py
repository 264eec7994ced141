"""Conflicts of averaged weights: another average that is validated, and strategies that hide weights or steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_tricks._compat import callbacks_of, calls_step_hooks, lightning_classes
from lit_tricks.callbacks.averaging.kept_average import KeptAverage
from lit_tricks.utils.modules import is_flattened, require_initialized

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["reject_conflicting_callbacks", "reject_hidden_steps", "reject_hidden_weights"]


def reject_conflicting_callbacks(average: KeptAverage, trainer: Trainer) -> None:
    """Raise if something else also decides which weights are validated and saved.

    Raises:
        RuntimeError: if another callback averages weights and validates the average.
    """
    if not average.validate:
        return
    foreign = [lightning_classes(f"callbacks.{name}") for name in ("WeightAveraging", "StochasticWeightAveraging")]
    for callback in callbacks_of(trainer):
        is_ours = isinstance(callback, KeptAverage) and callback.validate
        if callback is average or not (is_ours or any(isinstance(callback, classes) for classes in foreign)):
            continue
        name, other = average.state_key, callback.state_key if is_ours else type(callback).__name__
        remedy = f"remove {other}, or use EMA or SWA with validate=False, which only keeps the average."
        raise RuntimeError(f"{name} and {other} both decide which weights are validated and saved: {remedy}")


def reject_hidden_weights(average: KeptAverage, trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise if the module's parameters are not its weights.

    Raises:
        RuntimeError: if the strategy stores the weights elsewhere.
    """
    require_initialized(pl_module, average.state_key)
    if is_flattened(trainer.strategy.model or pl_module):
        raise RuntimeError(
            f"{average.state_key} cannot access whole weights under {type(trainer.strategy).__name__}: use FSDP2 "
            "(ModelParallelStrategy)."
        )


def reject_hidden_steps(average: KeptAverage, trainer: Trainer) -> None:
    """Raise if an optimizer does not report its steps.

    Raises:
        RuntimeError: if an optimizer does not call step hooks, such as many wrappers of optimizers.
    """
    for optimizer in trainer.optimizers:
        if not calls_step_hooks(optimizer):
            name = type(optimizer).__name__
            raise RuntimeError(
                f"{average.state_key} cannot count the steps of {name}, which does not call the step hooks of torch's "
                f"optimizers: call torch.optim.Optimizer.__init__ in its __init__, or train without {name}."
            )
