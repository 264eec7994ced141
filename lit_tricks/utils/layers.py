"""The layers of a network in their order, for learning rates that fall from the output to the input."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

from torch import nn

from lit_tricks._compat import is_optimized_module
from lit_tricks.utils.modules import find_heads, has_matrix, is_norm

__all__ = ["layer_distances", "own_classifier"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_distances(module: nn.Module) -> dict[nn.Parameter, int]:
    """Return how many layers away from the output each parameter is. The last layer has 0.

    Networks of timm give their layers by ``group_matcher()``. In such a network without a classifier the last layer has
    1, and parameters outside of it have 0. In other modules a layer is a block of a repeated class, such as a residual
    block, or outside of blocks a convolution or linear layer with the norm layers that follow it. The order is the one
    in which the module registers them. Several heads have the same distance.

    Args:
        module: a network, or a module that contains networks.
    """
    found: dict[nn.Parameter, int] = {}
    inner: list[nn.Module] = []
    for part in module.modules():
        is_known = callable(getattr(part, "group_matcher", None)) and not is_optimized_module(part)
        if is_known and all(part is not each for net in inner for each in net.modules()):
            inner.append(part)
            found |= _by_group_matcher(part)
    if not found:
        return _by_order(module)
    return {parameter: found.get(parameter, 0) for parameter in module.parameters()}


def own_classifier(network: nn.Module) -> list[nn.Module]:
    """Return the layers with parameters that ``get_classifier`` of a network of timm returns. Others have none."""
    find: Any = getattr(network, "get_classifier", tuple)
    given = find()
    heads = given if isinstance(given, tuple) else (given,)
    inside = set(network.modules())
    return [head for head in heads if head in inside and any(True for _ in head.parameters())]


def _by_group_matcher(network: Any) -> dict[nn.Parameter, int]:
    from timm.models import group_parameters  # networks with such a method need timm

    layers: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    end = max(layers.values(), default=0) + (not own_classifier(network))
    return {network.get_parameter(name): end - layer for name, layer in layers.items()}


def _by_order(module: nn.Module) -> dict[nn.Parameter, int]:
    counts = Counter(type(part) for part in module.modules())
    layers: dict[nn.Parameter, int] = {}
    last = 0
    heads: list[nn.Module] = []
    with contextlib.suppress(RuntimeError):  # nothing is trained
        heads = list(find_heads(module).values())
    if len(heads) == 1:  # in its place, which may be before layers of another loss
        heads = []

    def add(part: nn.Module) -> None:
        nonlocal last
        if part in heads:
            return
        is_block = isinstance(part, nn.MultiheadAttention | nn.RNNBase) or (
            part is not module
            and not isinstance(part, _CONTAINERS)
            and counts[type(part)] > 1
            and sum(map(has_matrix, part.modules())) > 1
        )
        if is_block or has_matrix(part) or _is_other_layer(part):
            last += 1
            layers.update({parameter: last for parameter in part.parameters() if parameter not in layers})
            return
        for parameter in part.parameters(recurse=False):
            layers.setdefault(parameter, max(last, 1))
        for child in part.children():
            add(child)

    add(module)
    layers |= {parameter: last + 1 for head in heads for parameter in head.parameters()}
    end = max(layers.values(), default=0)
    return {parameter: end - layer for parameter, layer in layers.items()}


def _is_other_layer(part: nn.Module) -> bool:
    """Return whether a module without children has its own matrix that is no embedding."""
    is_leaf = not any(True for _ in part.children()) and not is_norm(part)
    is_embedding = isinstance(part, nn.Embedding | nn.EmbeddingBag)
    return is_leaf and not is_embedding and any(parameter.ndim > 1 for parameter in part.parameters(recurse=False))
