"""A module at the end of a network that scales its logits, for networks whose last layer cannot.

One caveat: its buffers exist only after a calibration. So adding the module to a network changes neither its outputs
nor its ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LogitScaling", "scale_as_saved"]


class LogitScaling(nn.Module):
    """Return ``factors * logits + offsets``, once a calibration has set these; logits as they are before.

    ``TemperatureScaling`` and ``lit-tricks calibrate`` scale the last linear layer of a network. Some networks have no
    layer whose weights scale the logits: a cosine classifier, or shared weights. Let such a network end with this
    module. Old checkpoints still load, since an uncalibrated module has no entry in the ``state_dict``. A checkpoint
    with the buffers ``factors`` (1,) or (K,) and ``offsets`` (K,) sets them, and one without them removes them.

    Logits of 16 bits are scaled in float32, so that rounding makes no ties. ``ModelParallelStrategy`` loads only the
    entries that a module has: before a test with sharded weights, call ``load_state_dict`` (``Classifier`` needs none).

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), LogitScaling())
        >>> sorted(network.state_dict())
        ['0.bias', '0.weight']
        >>> network.load_state_dict(network.state_dict() | {"2.factors": torch.tensor([0.5])})
        <All keys matched successfully>
        >>> network[2](torch.tensor([[2.0, 4.0, 6.0]]))
        tensor([[1., 2., 3.]])
    """

    factors: Tensor | None
    offsets: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", None)
        self.register_buffer("offsets", None)
        self.register_load_state_dict_pre_hook(_fit_to_state)  # type: ignore[no-untyped-call]

    def forward(self, logits: Tensor) -> Tensor:
        """Return scaled logits of the shape of ``logits``, (N, K) or (N, K, ...)."""
        if self.factors is None:
            return logits
        shape = (1, -1) + (1,) * (logits.dim() - 2)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scaled = logits.to(dtype) * self.factors.to(logits.device, dtype).view(shape)
        return scaled if self.offsets is None else scaled + self.offsets.to(logits.device, dtype).view(shape)


def _fit_to_state(module: Any, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Make the buffers that a state dict has, and remove the others."""
    for name in ("factors", "offsets"):
        saved, own = state.get(prefix + name), getattr(module, name)
        if saved is None or own is None or own.shape != saved.shape:
            setattr(module, name, None if saved is None else torch.empty_like(saved))


def scale_as_saved(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Set the buffers of a calibrated checkpoint whose weights a strategy has loaded already.

    Strategies with sharded weights load only the entries that a module has.

    Args:
        module: the module.
        checkpoint: the checkpoint, without its ``state_dict``.
    """
    saved = {} if "state_dict" in checkpoint else checkpoint.get("calibration", {}).get("buffers", {})
    for path, value in saved.items():
        layer, _, name = path.rpartition(".")
        setattr(module.get_submodule(layer), name, value.clone())
