"""Inspect modules: kinds of layers and parameters, the classifier, the norm layers before it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_tricks._compat import BatchNorm, Convolution, NormWithStatistics

__all__ = [
    "Kind",
    "batchnorms_of",
    "check_shapes",
    "find_classifier",
    "find_heads",
    "find_norms",
    "has_matrix",
    "is_flattened",
    "is_norm",
    "is_statistic",
    "kinds",
    "own_parameter",
    "require_initialized",
    "some_of",
]

Kind = Literal["bias", "norm", "embedding"]

_NORMS = (NormWithStatistics, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_MATRICES = (Convolution, nn.Linear)


def is_norm(module: nn.Module) -> bool:
    """Return whether a layer normalizes: a layer of torch, or of a class with such a name, as ``LayerNorm2d``.

    Many networks define norm layers of their own, which have no base class in common.
    """
    return isinstance(module, _NORMS) or bool(re.search(r"norm(\dd)?$", type(module).__name__, re.IGNORECASE))


def has_matrix(module: nn.Module) -> bool:
    """Return whether a layer is a convolution or a linear layer."""
    return isinstance(module, _MATRICES)


def kinds(name: str, parameter: Tensor, owner: nn.Module) -> set[Kind]:
    """Return the kinds of a parameter that is no weight of a convolution or linear layer. A norm layer's bias has two.

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


def own_parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    """Return a parameter that the layer itself registers; None for one that is parametrized, or not there."""
    found = (each for key, each in layer.named_parameters(recurse=False, remove_duplicate=False) if key == name)
    return next(found, None)


def batchnorms_of(module: nn.Module) -> dict[str, BatchNorm]:
    """Return the BatchNorm layers that keep running statistics, by name. A shared one has several names."""
    return {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, BatchNorm) and layer.track_running_stats and layer.running_mean is not None
    }


def is_flattened(module: nn.Module) -> bool:
    """Return whether a strategy keeps weights elsewhere than in their parameters, as FSDP1 and DeepSpeed ZeRO-3 do.

    Args:
        module: the module as the strategy has wrapped it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and nothing is wrapped without it
    if fsdp and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in module.modules()):
        return True
    parameters = list(module.parameters())
    is_flat = fsdp is not None and any(isinstance(parameter, fsdp.FlatParameter) for parameter in parameters)
    return is_flat or any(hasattr(parameter, "ds_id") for parameter in parameters)


_STATISTIC = re.compile(r"(running|moving)_(mean|var|std|cov)")  # at the start of a name


def is_statistic(owner: nn.Module, name: str) -> bool:
    """Return whether a buffer is a running mean, variance, covariance or standard deviation of a norm layer.

    A norm layer is one of torch's, or one of a class with "norm" in its name, as timm's ``EvoNorm2dB0``, or any module
    with both a running mean and a running deviation from the mean.
    """
    kinds = {match[2] for buffer, _ in owner.named_buffers(recurse=False) if (match := _STATISTIC.match(buffer))}
    has_both = "mean" in kinds and len(kinds) > 1
    is_called_so = "norm" in type(owner).__name__.lower()
    return bool(_STATISTIC.match(name)) and (has_both or is_called_so or is_norm(owner))


def some_of(names: Sequence[str]) -> str:
    """Return the first names, for a message."""
    return ", ".join(names if len(names) < 5 else [*names[:3], "..."])


def require_initialized(module: nn.Module, trick: str) -> None:
    """Check that all parameters and buffers have their shapes.

    Args:
        module: the module.
        trick: name of the trick, for the message.

    Raises:
        RuntimeError: if some belong to lazy layers, which get their shapes in the first forward pass.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise RuntimeError(
            f"{trick}: {type(module).__name__} has lazy layers ({some_of(lazy)}): run one batch through it before the "
            "fit, in eval mode."
        )


def check_shapes(module: nn.Module, trick: str) -> None:
    """Raise if parameters do not have their own shapes.

    Args:
        module: the module that a strategy may have changed.
        trick: name of the trick, for the message.

    Raises:
        RuntimeError: if they are flattened, which hides their kind.
    """
    require_initialized(module, trick)
    matrices = [own_parameter(part, "weight") for part in module.modules() if has_matrix(part)]
    if is_flattened(module) or any(weight is not None and weight.ndim < 2 for weight in matrices):
        raise RuntimeError(
            f"{trick} needs the shapes of the parameters, and the strategy has flattened them. Use "
            "ModelParallelStrategy (FSDP2), which keeps the shapes."
        )


_BESIDE_TRUNK = re.compile(r"downsample|shortcut|aux", re.IGNORECASE)  # defined after the trunk's last layer


def find_classifier(module: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """Return the layers that give the logits, by name.

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
    layers = {names[part]: part for part in _matrices(module)}
    linear = {name: part for name, part in layers.items() if isinstance(part, nn.Linear)}
    if not layers:
        raise RuntimeError(
            f"FixRes found no classifier in {who}, as no linear layer or convolution is trained: name it, as "
            'FixRes(classifier="model.fc").'
        )
    return dict([list((linear or layers).items())[-1]])


def find_heads(module: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """Return the layers of ``find_classifier``, and the last layers of other heads next to it, by name.

    A head is a child of one to three linear layers, next to the child with the classifier. It has the same input size,
    and its output size is the input size of no linear layer. The steps of a chain fail one of these conditions.

    Args:
        module: with layers in the order in which they run, as networks define them.
        name: of the only one to take, if it is known.

    Raises:
        RuntimeError: if there is none.
    """
    found = find_classifier(module, name)
    path, last = next(iter(found.items()))
    if name is not None or len(found) > 1 or not isinstance(last, nn.Linear):
        return found
    names = {part: part_name for part_name, part in module.named_modules()}
    while path:
        path = path.rpartition(".")[0]
        owner = module.get_submodule(path)
        if isinstance(owner, nn.Sequential):
            continue
        chains = [_matrices(child) for child in owner.children()]
        heads = [layers for layers in chains if 1 <= len(layers) <= 3 and all(isinstance(e, nn.Linear) for e in layers)]
        own = next((layers for layers in heads if last in layers), None)
        if own is None:  # the child is more than a head
            break
        inputs = {layer.in_features for layer in _matrices(module) if isinstance(layer, nn.Linear)}
        lasts = [
            layers[-1]
            for layers in heads
            if layers[0].in_features == own[0].in_features and layers[-1].out_features not in inputs
        ]
        if last in lasts and len(lasts) > 1:
            return {names[layer]: layer for layer in lasts}
    return found


def _matrices(module: nn.Module) -> list[Any]:
    """Return the convolutions and linear layers that are trained."""
    return [part for part in module.modules() if has_matrix(part) and _is_trained(part)]


def find_norms(module: nn.Module, which: str, name: str | None = None) -> dict[str, Any]:
    """Return the BatchNorm layers that have running statistics and are not frozen, by name.

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
    found: dict[str, Any] = batchnorms_of(module)
    found = {layer: norm for layer, norm in found.items() if _is_trained(norm) or norm.weight is None}
    if name is not None:
        found = {layer: norm for layer, norm in found.items() if layer == name}
    elif which == "last":
        trunk = {layer: norm for layer, norm in found.items() if not _BESIDE_TRUNK.search(layer)}
        found = dict(list((trunk or found).items())[-1:])
    if not found:
        what = "BatchNorm with running statistics" + (f" that is called {name!r}" if name else "")
        raise RuntimeError(
            f"FixRes found no {what} in {type(module).__name__}: give "
            'FixRes(train_bn="none"), which trains only the classifier.'
        )
    return found


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
