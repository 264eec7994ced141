"""Modules whose ``train()`` and ``eval()`` do more than set a flag, and how their weights are kept.

Two kinds are common: adapters that merge into the weights for evaluation (LoRA), and layers that cache for evaluation
what they compute from the weights (LeViT). Lightning restores flags after a validation, and does not call ``train()``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lit_tricks.utils.dtensor import to_local

__all__ = ["Modes", "changed_in_evaluation", "eval_mode", "modes_kept"]


class Modes:
    """The modes of the parts of a module that have a ``train()`` or ``eval()`` of their own.

    Args:
        module: the module as a whole.

    Attributes:
        parts: these parts.
        params: their parameters, each once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: list[nn.Module] = [part for part in module.modules() if _has_own_mode(part)]
        self.params: list[nn.Parameter] = list(
            dict.fromkeys(param for part in self.parts for param in part.parameters())
        )
        self.note()

    def note(self) -> None:
        """Take the modes as they are now."""
        self._flags = {module: module.training for part in self.parts for module in part.modules()}

    def restore(self) -> None:
        """Set the modes by calling ``train()``, also where the flags are right already: the weights may not be."""
        for part in self.parts:
            part.train(self._flags[part])
        for module, training in self._flags.items():
            module.training = training

    def are_current(self) -> bool:
        """Return whether all flags are as they were."""
        return all(module.training == training for module, training in self._flags.items())


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[Modes]:
    """Restore the modes afterwards, and the weights bit by bit: adapters that merge and unmerge round them."""
    modes = Modes(module)
    kept = [to_local(param.detach()).clone() for param in modes.params]
    try:
        yield modes
    finally:
        modes.restore()
        with torch.inference_mode(False), torch.no_grad():
            for param, value in zip(modes.params, kept, strict=True):
                to_local(param.detach()).copy_(value)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode for a while. Restore all modes afterwards, and the weights bit by bit."""
    flags = {part: part.training for part in module.modules()}
    with modes_kept(module) as modes:
        modes.restore()  # drops caches of other weights
        for part in modes.parts:
            part.eval()
        for part in flags:
            part.training = False
        try:
            yield
        finally:
            for part, training in flags.items():
                part.training = training


def changed_in_evaluation(module: nn.Module) -> str | None:
    """Return the name of a parameter that has another value in evaluation mode, if there is one."""
    names = {param: name for name, param in module.named_parameters()}
    before = {param: to_local(param.detach()).clone() for param in Modes(module).params}
    with eval_mode(module):
        changed = [param for param, value in before.items() if not torch.equal(to_local(param.detach()), value)]
        return next((names[param] for param in changed), None)


def _has_own_mode(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
