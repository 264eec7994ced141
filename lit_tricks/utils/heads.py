"""Where a network ends: its classifier, and the last of its BatchNorm layers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lit_tricks.callbacks.batchnorm.statistics import layers_of
from lit_tricks.utils.modules import has_matrix

__all__ = ["find_classifier", "find_norms"]

_ASIDE = re.compile(r"downsample|shortcut|aux", re.IGNORECASE)  # beside the trunk, and defined after its last layer


def find_classifier(module: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The layers that give the logits, by name.

    They are what ``get_classifier`` of timm's models returns, or the last linear layer that is trained, or where there
    is none the last convolution.

    Args:
        module: with layers in the order in which they run, as networks define them.
        name: of the one to take, if it is known.

    Raises:
        RuntimeError: if there is none.
    """
    who = type(module).__name__
    if name is not None:
        parts = dict(module.named_modules())
        if name not in parts:
            children = ", ".join(child for child, _ in module.named_children())
            raise RuntimeError(f"FixRes(classifier={name!r}): {who} has no such module. Its parts are {children}.")
        return {name: parts[name]}
    names = {part: name for name, part in module.named_modules()}
    for part in names:
        if callable(get_classifier := getattr(part, "get_classifier", None)):
            given = get_classifier()  # a tuple with a second one, for distillation, in some
            heads = [head for head in (given if isinstance(given, tuple) else [given]) if isinstance(head, nn.Module)]
            if heads and all(head in names and _is_trained(head) for head in heads):
                return {names[head]: head for head in heads}
    layers = {name: part for part, name in names.items() if has_matrix(part) and _is_trained(part)}
    linear = {name: part for name, part in layers.items() if isinstance(part, nn.Linear)}
    if not layers:
        raise RuntimeError(
            f"FixRes found no classifier in {who}, as no linear layer or convolution is trained: name it, as "
            'FixRes(classifier="model.fc").'
        )
    return dict([list((linear or layers).items())[-1]])


def find_norms(module: nn.Module, which: str, name: str | None = None) -> dict[str, Any]:
    """The BatchNorm layers that have running statistics and are not frozen, by name.

    Args:
        module: with layers in the order in which they run, as networks define them.
        which: "all", "none", or "last": the last one of the trunk. Those in shortcuts and auxiliary classifiers count
            only where there are no others.
        name: of the one to take, if it is known.

    Raises:
        RuntimeError: if there is none.
    """
    if which == "none":
        return {}
    found: dict[str, Any] = layers_of(module)
    found = {layer: norm for layer, norm in found.items() if _is_trained(norm) or norm.weight is None}
    if name is not None:
        found = {layer: norm for layer, norm in found.items() if layer == name}
    elif which == "last":
        trunk = {layer: norm for layer, norm in found.items() if not _ASIDE.search(layer)}
        found = dict(list((trunk or found).items())[-1:])
    if not found:
        what = "BatchNorm with running statistics" + (f" that is called {name!r}" if name else "")
        raise RuntimeError(
            f"FixRes found no {what} in {type(module).__name__}: give "
            'FixRes(train_bn="none"), which trains the classifier alone.'
        )
    return found


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
