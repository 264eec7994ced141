"""Override buffers of a module for a while, and store both values in its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BufferOverride"]


class BufferOverride:
    """Overrides the values in the buffers of a module.

    The values are written into the current memory of the buffers, and this memory is restored later. The memory may
    belong to other tensors by then, since averaged weights are swapped by exchanging pointers.

    Attributes:
        values: values to use and save, by their names in the ``state_dict``. Empty while there are no valid values.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._memory: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by name: memory, previous values, written values

    def show(self, module: nn.Module) -> None:
        """Write the values into the buffers."""
        self.restore()
        written: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self.values.items():
                path, _, attribute = name.rpartition(".")
                buffer: Any = getattr(module.get_submodule(path), attribute)
                if id(buffer) not in written:  # a shared layer has several names
                    where = buffer.detach()
                    written[id(buffer)] = where, where.clone(), value.to(where.device, where.dtype, copy=True)
                    where.copy_(value)
                self._memory[name] = written[id(buffer)]

    def covered(self) -> dict[str, Tensor]:
        """Return the previous values of the buffers that have others now."""
        return {name: value for name, (_, value, _) in self._memory.items()}

    def restore(self) -> None:
        """Restore the previous values in the memory."""
        for where, value, _ in self._memory.values():
            where.copy_(value)
        self.forget()

    def is_as_left(self) -> bool:
        """Return whether the memory still has the written values, and no other weights were loaded."""
        return all(_same(where, shown) for where, _, shown in self._memory.values())

    def forget(self) -> None:
        """Keep the written values, and drop the previous ones."""
        self._memory = {}

    def save(self, checkpoint: dict[str, Any], key: str) -> None:
        """Put the values into a checkpoint, and the replaced values into the state of a callback."""
        saved = checkpoint["state_dict"]
        values = {name: value for name, value in self.values.items() if name in saved}
        covered = {name: value for name, (_, value, _) in self._memory.items()}
        if values and "callbacks" in checkpoint:
            checkpoint["callbacks"][key] = {"replaced": {n: covered.get(n, saved[n]).clone() for n in values}}
        saved.update({name: value.to(saved[name].device, copy=True) for name, value in values.items()})

    def save_as_shown(self, checkpoint: dict[str, Any], key: str) -> None:
        """Add the previous values to a checkpoint, if the memory still has the written values."""
        saved = checkpoint["state_dict"]
        known = {name: memory for name, memory in self._memory.items() if name in saved}
        if known and all(_same(saved[name].to(shown.device), shown) for name, (_, _, shown) in known.items()):
            checkpoint["callbacks"][key] = {"replaced": {name: value for name, (_, value, _) in known.items()}}

    def load(self, checkpoint: dict[str, Any], key: str, module: nn.Module) -> None:
        """Remove the values from a checkpoint, and restore the values that they replaced."""
        self.forget()
        replaced: dict[str, Tensor] = checkpoint.get("callbacks", {}).get(key, {}).get("replaced", {})
        # some strategies have loaded it into the module already
        saved = checkpoint.get("state_dict", dict(module.named_buffers(remove_duplicate=False)))
        self.values = {name: saved[name].clone() for name in replaced}
        for name, value in replaced.items():
            saved[name].copy_(value)


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.nan_to_num(), right.nan_to_num())  # weights that diverged have NaN
