"""What the tricks that look at layers share: which ones normalise, and which have weights that multiply."""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor, nn

__all__ = ["Kind", "check_shapes", "has_matrix", "is_norm", "kinds"]

Kind = Literal["bias", "norm", "embedding"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_MATRICES = (nn.modules.conv._ConvNd, nn.Linear)


def is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises: one of torch's, or of a class that is called so, as ``LayerNorm2d``."""
    return isinstance(module, _NORMS) or bool(re.search(r"norm(\dd)?$", type(module).__name__, re.IGNORECASE))


def has_matrix(module: nn.Module) -> bool:
    """Whether a layer is a convolution or linear."""
    return isinstance(module, _MATRICES)


def kinds(name: str, parameter: Tensor, owner: nn.Module) -> set[Kind]:
    """What a parameter is, if not the weight of a convolution or linear layer. A bias of a norm layer is both.

    Args:
        name: its name in the module that owns it.
        parameter: the parameter; if it is sharded, with its logical shape.
        owner: that module.
    """
    found: set[Kind] = set()
    if "bias" in name.split("_"):  # also in_proj_bias, bias_ih_l0, relative_position_bias_table
        found.add("bias")
    if is_norm(owner) or (parameter.ndim < 2 and not found):
        found.add("norm")
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        found.add("embedding")
    return found


def check_shapes(module: nn.Module, trick: str) -> None:
    """See that parameters have their shapes.

    Args:
        module: the module that a strategy may have changed.
        trick: who asks, for the message.

    Raises:
        RuntimeError: if they are flattened, so that nothing can be told from them.
    """
    matrices = [part._parameters.get("weight") for part in module.modules() if has_matrix(part)]
    flat = any(name.endswith("_flat_param") for name, _ in module.named_parameters())
    if flat or any(weight is not None and weight.ndim < 2 for weight in matrices):
        raise RuntimeError(
            f"{trick} goes by the shapes of the parameters, and the strategy has flattened them. Use "
            "ModelParallelStrategy (FSDP2), which leaves them their shapes."
        )
