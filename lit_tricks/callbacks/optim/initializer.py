"""Base of the tricks that set weights: detect the start of a run, and the trained weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.optim.param_groups import optimizers_in
from lit_tricks.utils.dtensor import full_tensor
from lit_tricks.utils.modules import is_norm, own_parameter, require_initialized

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Initializer", "sign_of_training"]

_LEFT_ALONE = "nothing to do, since the run resumes with its own weights"


class Initializer(Trick):
    """Sets trained weights once, at the start of a run from scratch.

    This happens when the optimizers exist. The weights then have their final device, precision and shards, and no copy
    of them exists yet, in any order of the callbacks.
    """

    def __init__(self) -> None:
        self.biases: dict[str, int] = {}  # biases with a value of their own, by name, with their sizes
        self._effect = ""
        self._begun: bool | None = None  # whether the run of the checkpoint had started; None without a checkpoint

    @abstractmethod
    def select(self, pl_module: LightningModule, trained: set[Tensor], found: Any) -> None:
        """Select the parameters to set, among the trained parameters.

        Args:
            pl_module: the module.
            trained: parameters of its optimizers.
            found: result of ``find``.
        """

    @abstractmethod
    def initialize(self, pl_module: LightningModule) -> str:
        """Set the weights, and return the line to announce."""

    def reason_to_keep(self, pl_module: LightningModule, trained: set[Tensor]) -> str:
        """Return why a new run keeps the weights of the module, as the line to announce. Empty to set the weights.

        Raises:
            RuntimeError: if weights were loaded, and no trick for trained weights explains why.
        """
        if tuner := next((c for c in callbacks_of(pl_module.trainer) if isinstance(c, Trick) and c.fine_tunes), None):
            return f"nothing to do, {type(tuner).__name__} starts from trained weights"  # under any recipe
        if sign := sign_of_training(pl_module, trained):
            raise RuntimeError(
                f"{type(self).__name__} is for a run from scratch, and {type(pl_module).__name__} was trained before: "
                f"{sign}. Remove {type(self).__name__}, or do not load weights."
            )
        return ""

    def find(self, pl_module: LightningModule) -> Any:
        """Inspect the module before a strategy changes it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the creation of the module's optimizers."""
        if stage == "fit":
            self._begun = None
            # No hook runs between the optimizers' creation and tricks that copy the weights, such as averages.
            self.wrap(pl_module, "configure_optimizers", partial(self._start, pl_module, self.find(pl_module)))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check whether the weights belong to a run that had started. Some strategies restore weights last."""
        self._begun = checkpoint["global_step"] > 0
        if self._begun:
            self._effect = _LEFT_ALONE

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the change."""
        self.announce(self._effect)

    def _start(
        self,
        pl_module: LightningModule,
        found: Any,
        configure_optimizers: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        require_initialized(pl_module, type(self).__name__)
        configured = configure_optimizers(*args, **kwargs)
        trained = {p for opt in optimizers_in(configured) for group in opt.param_groups for p in group["params"]}
        self.select(pl_module, trained, found)
        self._effect = _LEFT_ALONE
        # the Trainer still has the step count of its last fit, until a checkpoint sets it
        if pl_module.trainer.global_step if self._begun is None else self._begun:
            return configured
        self._effect = self.reason_to_keep(pl_module, trained)
        if self._effect:
            return configured
        with torch.no_grad():
            self._effect = self.initialize(pl_module)
        return configured


def sign_of_training(module: nn.Module, trained: set[Tensor]) -> str:
    """Return how a norm layer differs from its initial state: equal channels, without statistics."""
    for name, part in module.named_modules():
        weight, bias = own_parameter(part, "weight"), own_parameter(part, "bias")
        if not is_norm(part) or not any(each is not None and each in trained for each in (weight, bias)):
            continue
        for key, value in {"weight": weight, "bias": bias}.items():
            if value is not None and not (flat := full_tensor(value.detach()).flatten()).eq(flat[:1]).all():
                return f"{name}.{key} differs from channel to channel"
        if getattr(part, "running_mean", None) is not None and part.running_mean.any():
            return f"{name}.running_mean is not 0"
    return ""
