"""What the tricks that look at layers share: which ones normalise, and which have weights that multiply."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["check_shapes", "has_matrix", "is_norm"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_MATRICES = (nn.modules.conv._ConvNd, nn.Linear)


def is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises: one of torch's, or of a class that is called so, as ``LayerNorm2d``."""
    return isinstance(module, _NORMS) or bool(re.search(r"norm(\dd)?$", type(module).__name__, re.IGNORECASE))


def has_matrix(module: nn.Module) -> bool:
    """Whether a layer is a convolution or linear."""
    return isinstance(module, _MATRICES)


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
