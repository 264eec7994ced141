"""Run an additional validation in a fit, and return only its metrics.

Loggers are not called, and no callbacks except progress bars and given ones. Afterwards the random states, the module,
its metrics, and the counts and results of the loop are restored.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_tricks._compat import MODULE_REGISTRIES, dummy_logger, leaves, lightning_classes
from lit_tricks.callbacks.base import paused
from lit_tricks.utils.rng import isolated_random_state

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["validate_trained"]


def validate_trained(
    trainer: Trainer, pl_module: LightningModule, run: Callable[[], Any], also: Sequence[Any] = ()
) -> dict[str, float]:
    """Validate, and return the metrics that the module logs.

    Args:
        trainer: the Trainer, in a fit.
        pl_module: its module.
        run: function that runs the validation loop of the fit.
        also: callbacks whose hooks are called, in addition to progress bars.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()  # it may load the data set
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[union-attr]
    counts = loop.batch_progress.state_dict()
    results = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
    # PreciseBN passes training batches through, and finds the tricks that change them among the callbacks
    untouched = paused(trainer)
    states = isolated_random_state(trainer.strategy.root_device, leaves(trainer.val_dataloaders))
    with _kept(*map(vars, pl_module.modules()), vars(loop), *results), states, untouched:
        # the thread that draws a progress bar finds it among the callbacks
        bars = [each for each in callbacks if isinstance(each, lightning_classes("callbacks.ProgressBar"))]
        trainer.callbacks = [*bars, *also]  # type: ignore[union-attr]
        trainer.loggers = [dummy_logger(trainer) for _ in loggers]
        try:
            outputs = run()
        finally:
            trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[union-attr]
    loop.batch_progress.load_state_dict(counts)
    return {name: float(value) for output in outputs for name, value in output.items()}


@contextlib.contextmanager
def _kept(*things: dict[str, Any]) -> Iterator[None]:
    """Restore the named attributes afterwards: numbers, tensors, collections of them. Other objects are not changed."""
    seen: set[int] = set()
    with torch.no_grad():
        restore = [_as_now(thing, seen) for thing in things]
    try:
        yield
    finally:
        with torch.inference_mode():  # the state of a metric may be of it
            for put in restore:
                put()


def _as_now(value: Any, seen: set[int]) -> Callable[[], Any]:
    """Return a function that restores a value: the same object, with its current content."""
    if id(value) in seen:
        return lambda: value
    if isinstance(value, Tensor):
        seen.add(id(value))
        return partial(value.copy_, value.clone())
    if isinstance(value, dict):
        seen.add(id(value))
        # the weights, and modules, which are among these things themselves
        items = {key: _as_now(v, seen) for key, v in value.items() if key not in MODULE_REGISTRIES}
        return partial(_fill_dict, value, items)
    if isinstance(value, list | deque | set):
        seen.add(id(value))
        return partial(_fill, value, [_as_now(item, seen) for item in value])
    return lambda: value


def _fill_dict(value: dict[Any, Any], items: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    for key in [key for key in value if key not in items and key not in MODULE_REGISTRIES]:
        del value[key]
    value.update({key: item() for key, item in items.items()})
    return value


def _fill(value: Any, items: list[Callable[[], Any]]) -> Any:
    value.clear()
    (value.update if isinstance(value, set) else value.extend)([item() for item in items])
    return value
