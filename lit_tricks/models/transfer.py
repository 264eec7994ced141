"""Select the trained parts of a pretrained network, and the learning rate per layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lit_tricks.utils.arguments import number, texts
from lit_tricks.utils.layers import layer_distances, own_classifier
from lit_tricks.utils.parts import find_part, parts_of

__all__ = ["freeze", "layer_scales"]


def freeze(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Freeze parts of a network.

    Args:
        network: is changed: the parameters of these parts need no gradient any more.
        names: of parts, such as "conv1", "layer1" or "layer2.0"; patterns such as "layer[12]"; or "backbone", which is
            everything except the classifier.

    Returns:
        Names of the modules to hold in evaluation mode.

    Raises:
        ValueError: for a name that the network does not have.
    """
    names = texts("freeze", "names", names, 'Give names of parts, such as "layer1".')
    modules: list[str] = []
    for name in names:
        try:
            part = find_part(network, name, lambda: own_classifier(network))
        except LookupError:
            raise ValueError(
                f"freeze={name!r} is no part of {type(network).__name__}, which has {parts_of(network)}: give these "
                'names, or "backbone" for everything except the classifier.'
            ) from None
        for parameter in part.parameters:
            network.get_parameter(parameter).requires_grad = False
        modules += part.modules
    return list(dict.fromkeys(modules))


def layer_scales(network: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return factors on the learning rate that fall from the last layer of a network to the first.

    The last layer has 1, the one before it ``decay``, then ``decay ** 2``, as in
    [BEiT](https://arxiv.org/abs/2106.08254) and timm's ``param_groups_layer_decay``. An encoder without a classifier
    starts at ``decay``. The trick ``LayerDecay`` applies the same factors in any module.

    Args:
        network: the network.
        decay: factor from layer to layer, in (0, 1].
    """
    decay = number("layer_scales", "decay", decay, "(0, 1]", "1 is one learning rate for all layers.")
    return {parameter: decay**distance for parameter, distance in layer_distances(network).items()}
