"""Train some layers of a module, and freeze all other layers in evaluation mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from lit_tricks._compat import callbacks_of, lightning_classes
from lit_tricks.callbacks.base import Trick

if TYPE_CHECKING:
    from lit_tricks._compat import Trainer

__all__ = ["Frozen", "reject_conflicts"]


def reject_conflicts(trainer: Trainer, trick: Trick) -> None:
    """Raise if another callback freezes layers, drops branches, or changes image sizes.

    Raises:
        RuntimeError: if there is such a callback.
    """
    finetuning = lightning_classes("callbacks.BaseFinetuning")
    for other in callbacks_of(trainer):
        conflict = other.conflict_with_frozen if isinstance(other, Trick) else ""
        conflict = "freezes and unfreezes layers, as FixRes does" if isinstance(other, finetuning) else conflict
        if other is not trick and conflict:
            raise RuntimeError(f"FixRes: {type(other).__name__} {conflict}. Remove one of the two.")


class Frozen:
    """Freezes all parameters that are not trained, and restores them.

    Args:
        module: the whole module. A strategy may wrap it later, or replace its layers under the same names.
        layers: names of the layers that stay in training mode.
        trained: the parameters to train.
    """

    def __init__(self, module: nn.Module, layers: Iterable[str], trained: set[nn.Parameter]) -> None:
        self._module = module
        self._layers = list(layers)
        self._frozen = [param for param in module.parameters() if param.requires_grad and param not in trained]
        for param in self._frozen:
            param.requires_grad = False
        self._before: dict[nn.Module, bool] = {}  # modes
        self._modes: dict[nn.Module, bool] = {}

    def hold(self) -> None:
        """Restore the train/eval mode of all submodules. The mode of the root module does not change."""
        if not self._modes:
            self._begin()
        for part, training in self._modes.items():
            if part.training != training:
                part.training = training

    def _begin(self) -> None:
        """Store the modes in the first batch. Afterwards no layer is replaced, and no mode is set."""
        self._before = {part: part.training for part in self._module.modules()}
        working = {part for name in self._layers for part in self._module.get_submodule(name).modules()}
        self._modes = {part: part in working for part in self._before if part is not self._module}

    def loose(self) -> nn.Module | None:
        """Return a part that is in training mode and should not be."""
        return next((part for part, training in self._modes.items() if part.training and not training), None)

    def restore(self) -> None:
        """Restore flags and modes."""
        for param in self._frozen:
            param.requires_grad = True
        if self._module.training == self._before.get(self._module):  # and not within a validation
            for part, training in self._before.items():
                part.training = training
