"""Where a network ends: its classifier, and the last of its BatchNorm layers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lit_tricks.callbacks._batch_norm import layers_of
from lit_tricks.callbacks._layers import has_matrix

__all__ = ["find_classifier", "find_last_norm"]

_ASIDE = re.compile(r"downsample|shortcut|aux", re.IGNORECASE)  # beside the trunk, and defined after its last layer


def find_classifier(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that give the logits, by name.

    They are what ``get_classifier`` of timm's models returns, or the last linear layer that is trained, or where there
    is none the last convolution.

    Args:
        module: with layers in the order in which they run, as networks define them.
    """
    names = {part: name for name, part in module.named_modules()}
    for part in names:
        if callable(get_classifier := getattr(part, "get_classifier", None)):
            given = get_classifier()  # a tuple with a second one, for distillation, in some
            heads = [head for head in (given if isinstance(given, tuple) else [given]) if isinstance(head, nn.Module)]
            if heads and all(head in names and _is_trained(head) for head in heads):
                return {names[head]: head for head in heads}
    layers = {name: part for part, name in names.items() if has_matrix(part) and _is_trained(part)}
    linear = {name: part for name, part in layers.items() if isinstance(part, nn.Linear)}
    return dict(list((linear or layers).items())[-1:])


def find_last_norm(module: nn.Module) -> dict[str, nn.Module]:
    """The last BatchNorm layer of the trunk that has running statistics and is not frozen, by name.

    Those in shortcuts and auxiliary classifiers count only where there are no others.
    """
    found: dict[str, Any] = layers_of(module)
    layers = {name: layer for name, layer in found.items() if _is_trained(layer) or layer.weight is None}
    trunk = {name: layer for name, layer in layers.items() if not _ASIDE.search(name)}
    return dict(list((trunk or layers).items())[-1:])


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
