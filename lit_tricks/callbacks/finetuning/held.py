"""A part of a module that is frozen: its parameters need no gradient, and its modules stay in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from lit_tricks._compat import is_optimized_module
from lit_tricks.utils.parts import Part

__all__ = ["HeldPart", "thawed"]


class HeldPart:
    """Freezes a part of a module, and can undo it.

    Parameters and modules are looked up by name when they are needed: strategies may replace them until the first step.

    Args:
        module: the module as a whole.
        part: names of the parameters and modules.

    Attributes:
        found: names of the outermost modules and parameters.
        is_frozen: whether the part is frozen.
        parameters: names of the parameters that were trained before.
    """

    def __init__(self, module: nn.Module, part: Part) -> None:
        self.module: nn.Module = module
        self.found: list[str] = part.found
        self.is_frozen: bool = False
        self.parameters: list[str] = [name for name in part.parameters if module.get_parameter(name).requires_grad]
        self._found: list[nn.Parameter] = []
        self._modules = part.modules
        self._modes: dict[nn.Module, bool] = {}  # before
        self._was_training = True  # the module as a whole

    def find_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizers get, and keep them: FSDP2 shows others between steps."""
        self._found = self._found or [self.module.get_parameter(name) for name in self.parameters]
        return self._found

    def set_trained(self, trained: bool) -> None:
        """Let the parameters need a gradient or none. A gradient that they have would still move them."""
        shown = [self.module.get_parameter(name) for name in self.parameters]
        for parameter in dict.fromkeys([*self._found, *shown]):
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None

    def freeze(self) -> None:
        """Stop the training of the parameters. The modes follow in ``hold``, as layers may still be replaced."""
        self.is_frozen = True
        self.set_trained(False)

    def modules(self) -> list[nn.Module]:
        """Return the modules, once they are not replaced any more, and note their modes."""
        if not self._modes:
            self._was_training = self.module.training
            parts = map(self.module.get_submodule, self._modules)
            # What torch.compile returns has the attributes of the module inside.
            self._modes = {part: part.training for part in parts if not is_optimized_module(part)}
        return list(self._modes)

    def hold(self) -> None:
        """Set the modules to evaluation mode, if they are not in it."""
        if self.is_frozen and any(part.training for part in self.modules()):
            _set_modes(dict.fromkeys(self.modules(), False))

    def loose(self) -> nn.Module | None:
        """Return a module that is frozen and in training mode, if there is one."""
        return next((part for part in self.modules() if part.training), None) if self.is_frozen else None

    def train(self, part: nn.Module, train: Callable[..., Any], mode: bool = True) -> Any:
        """Replace ``train`` of a module: it stays in evaluation mode while it is frozen."""
        has_own = type(part).train is not nn.Module.train
        result = train(mode and not (self.is_frozen and has_own))
        if self.is_frozen:
            part.training = False
        return result

    def release(self) -> None:
        """Restore what the parameters and modules were before."""
        if not self.is_frozen:
            return
        self.is_frozen = False
        self.set_trained(True)
        self.restore_modes()

    def restore_modes(self) -> None:
        """Set the modules to the modes that they had before. Within a validation, modes stay as they are."""
        if self._modes and self.module.training == self._was_training:
            _set_modes(self._modes)
        self._modes = {}


@contextlib.contextmanager
def thawed(parts: Iterable[HeldPart]) -> Iterator[None]:
    """Let the parameters of frozen parts need a gradient meanwhile."""
    frozen = [part for part in parts if part.is_frozen]
    for part in frozen:
        part.set_trained(True)
    try:
        yield
    finally:
        for part in frozen:
            part.set_trained(False)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    """Set modes of modules, and of no others. Those with a ``train()`` of their own do more than to set a flag."""
    own = [part for part in modes if type(part).train is not nn.Module.train]
    others = {inner: inner.training for part in own for inner in part.modules() if inner not in modes}
    for part in own:
        part.train(modes[part])
    for part, training in (others | modes).items():
        part.training = training
