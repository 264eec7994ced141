"""Helpers of the tests of EMA and SWA: the weights of a run, who gets which, and where it is interrupted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from helpers.fits import weights_of
from helpers.modules import BATCHES, lightning

pl = lightning()
Weights = dict[str, torch.Tensor]


class History(pl.Callback):
    """Keeps the weights after each batch that stepped the optimizer, as they are while the module trains."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.last = 0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            self.weights.append(all_weights(module))


def all_weights(module: Any) -> Weights:
    """Return all parameters and buffers of a module, also the non-persistent ones."""
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def assert_close(actual: Weights, expected: Weights, **kwargs: Any) -> None:
    """Also of parts of the weights."""
    assert actual
    for name, value in actual.items():
        tolerance = kwargs or {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(
            value.double(), expected[name].double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def loaded(path: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = dict(checkpoint["state_dict"])
    return checkpoint


def whole_average(trick: Any) -> Weights:
    assert trick._weights is not None
    return dict(zip(trick._weights.names, trick._weights._average, strict=True))


HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)
TRAINING_HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_train_epoch_start")


def spy(cls: Any, seen: list[tuple[str, str, Weights]], who: str) -> Any:
    """A subclass whose hooks note the weights that they find."""

    def hook(name: str) -> Any:
        def note(self: Any, *args: Any, **kwargs: Any) -> None:
            module = self if isinstance(self, nn.Module) else args[1]
            seen.append((who, name, weights_of(module)))

        return note

    return type("Spy", (cls,), {name: hook(name) for name in (*HOOKS, *TRAINING_HOOKS, "on_train_end")})


class Interrupt(pl.Callback):
    """Raises in the second epoch, in a hook."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.error: BaseException | None = error
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= BATCHES + 2 and self.error is not None:
            error, self.error = self.error, None
            raise error


STOPS = ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_end", "on_validation_end", "on_train_end")
SAVERS = {
    "OnExceptionCheckpoint": lambda path: pl.callbacks.OnExceptionCheckpoint(path),
    "ModelCheckpoint": lambda path: pl.callbacks.ModelCheckpoint(
        path, "on_exception", save_on_exception=True, save_top_k=0
    ),
    "ModelCheckpoint, weights": lambda path: pl.callbacks.ModelCheckpoint(
        path, "on_exception", save_on_exception=True, save_weights_only=True, save_top_k=0
    ),
}
