"""Select the trained parts of a pretrained network, and the learning rate per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn

from lit_tricks.utils.arguments import number, texts

__all__ = ["freeze", "layer_scales"]


def freeze(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Let parts of a network train no more.

    Args:
        network: is changed: the parameters of these parts need no gradient any more.
        names: of parts, such as "conv1", "layer1" or "layer2.0"; or "backbone", which is all but the classifier.

    Returns:
        Names of the parts that are to be held in evaluation mode.

    Raises:
        ValueError: for a name that it does not have.
    """
    names = texts("freeze", "names", names, 'Give names of parts, such as "layer1".')
    parts = {name: part for name, part in network.named_modules() if name}
    found: list[str] = []
    for name in names:
        if name == "backbone":
            trained = {parameter for head in _heads_of(network) for parameter in parts[head].parameters()}
            found += [child for child, part in network.named_children() if trained.isdisjoint(part.parameters())]
            parameters = [parameter for parameter in network.parameters() if parameter not in trained]
        elif name in parts:
            found.append(name)
            parameters = list(parts[name].parameters())
        else:
            children = ", ".join(child for child, _ in network.named_children())
            raise ValueError(
                f"freeze={name!r} is no part of {type(network).__name__}, which has {children}, and their parts, such "
                'as layer1.0: give these names, or "backbone" for all but the classifier'
            )
        for parameter in parameters:
            parameter.requires_grad = False
    return found


def layer_scales(network: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return factors on the learning rate, which decrease from the logits to the stem.

    As in [BEiT](https://arxiv.org/abs/2106.08254), the classifier has 1, the last block has ``decay``, the block before
    it has ``decay ** 2``, and so on to the stem. A network without a classifier also starts at ``decay``.

    Args:
        network: network whose method ``group_matcher()`` lists its blocks, as in timm.
        decay: above 0 and at most 1.

    Raises:
        ValueError: if the network has no such method.
    """
    decay = number("layer_scales", "decay", decay, "(0, 1]", "1 is one learning rate for all layers.")
    net: Any = network
    if not hasattr(net, "group_matcher"):
        raise ValueError(
            f"layer_decay={decay} goes by the blocks of a network, and {type(network).__name__} has no group_matcher() "
            "as timm's models have: give layer_decay=1, or a model by name"
        )
    heads = tuple(f"{name}." for name in _heads_of(network))
    blocks: dict[str, int] = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    blocks = {name: block for name, block in blocks.items() if not name.startswith(heads)}
    end = max(blocks.values(), default=0) + 1
    return {network.get_parameter(name): decay ** (end - block) for name, block in blocks.items()}


def _heads_of(network: nn.Module) -> list[str]:
    """Return the names of the layers that give the logits, by timm's attributes. Empty without logits."""
    find: Any = getattr(network, "get_classifier", tuple)
    given = find()
    heads = given if isinstance(given, tuple) else (given,)
    return [name for name, part in network.named_modules() if part in heads and any(True for _ in part.parameters())]
