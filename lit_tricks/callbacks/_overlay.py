"""Other values in the buffers of a module, for a while; and in its checkpoints, beside those that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Overlay"]


class Overlay:
    """Shows other values in the buffers of a module.

    They are written into the memory that the buffers have at the time, and later that memory gets back what it had,
    whoever shows it by then: weights that are averaged are swapped by exchanging pointers.
    """

    def __init__(self) -> None:
        self._memory: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by name: where, what was there, what is shown

    @torch.no_grad()
    def show(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Write values into buffers, by their names in the ``state_dict``."""
        self.put_back()
        written: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for name, value in values.items():
            path, _, attribute = name.rpartition(".")
            buffer: Any = getattr(module.get_submodule(path), attribute)
            if id(buffer) not in written:  # a shared layer has several names
                where = buffer.detach()
                written[id(buffer)] = where, where.clone(), value.to(where.device, where.dtype, copy=True)
                where.copy_(value)
            self._memory[name] = written[id(buffer)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the memory back what it had, unless something else was written into it meanwhile."""
        if self.is_as_left():
            for where, value, _ in self._memory.values():
                where.copy_(value)
        self.forget()

    def forget(self) -> None:
        """Leave everything as it is shown."""
        self._memory = {}

    def is_as_left(self) -> bool:
        """Whether the memory still has what was written."""
        return all(torch.equal(where, shown) for where, _, shown in self._memory.values())

    def covered(self) -> dict[str, Tensor]:
        """What was in the place of the values that are shown."""
        return {name: value for name, (_, value, _) in self._memory.items()}

    def shown(self) -> dict[str, Tensor]:
        """The values that are shown."""
        return {name: value for name, (_, _, value) in self._memory.items()}
