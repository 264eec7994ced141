"""Find numbers that are not finite in weights, and keep them out of JSON, which does not support them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_tricks.utils.dtensor import to_local
from lit_tricks.utils.modules import is_statistic

__all__ = ["all_finite", "first_not_finite", "first_not_finite_in", "not_finite", "to_json", "weights_in"]

# The last part of the name of what is a weight, in which no infinity belongs; and of what no NaN belongs in.
_WEIGHT = re.compile(r"(^|_)(weight|bias|running_mean|running_var|original\d?)(_\w+)?$")
_NO_NAN = re.compile(r"weight|bias|running|original|gamma|beta|scale|embed|token|table|kernel")


def weights_in(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and running statistics of a module, by name: what has to be finite.

    Other buffers may hold infinities on purpose, as masks do.
    """
    yield from ((name, weight) for name, weight in module.named_parameters() if not is_lazy(weight))
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if is_statistic(owner, name) and not is_lazy(buffer):
                yield f"{path}.{name}" if path else name, buffer


def all_finite(module: nn.Module) -> bool:
    """Return whether the weights of a module are finite. A GPU is waited for once."""
    flags = [to_local(weight.detach()).isfinite().all() for _, weight in weights_in(module)]
    devices = {flag.device for flag in flags}
    return all(bool(torch.stack([flag for flag in flags if flag.device == device]).all()) for device in devices)


def first_not_finite_in(module: nn.Module) -> str | None:
    """Return the name of the first weight of a module that is not finite, if there is one."""
    return next((name for name, weight in weights_in(module) if not _is_finite(weight)), None)


def first_not_finite(state: Mapping[str, Tensor], names: Collection[str] = ()) -> str | None:
    """Return the name of the first weight in a state dict that is not finite, if there is one.

    Args:
        state: by name.
        names: names of the tensors that must be finite. By default, these are weights by their usual names, since
            buffers may be infinite on purpose.
    """
    for name, value in state.items():
        if names:
            bad = name in names and not _is_finite(value)
        else:
            last = name.rpartition(".")[2]
            bad = bool(_NO_NAN.search(last)) and not _is_finite(value)
            bad = bad and (bool(_WEIGHT.search(last)) or bool(value.isnan().any()))
        if bad:
            return name
    return None


def _is_finite(value: Tensor) -> bool:
    return bool(to_local(value.detach()).isfinite().all())


def not_finite(name: str, where: object) -> str:
    """Return the message for weights that are not finite.

    Args:
        name: of the first such weight.
        where: file of the checkpoint, or the module.
    """
    return (
        f"the weights are not finite: {name!r} of {where} holds NaN or infinity. Take an earlier checkpoint, or train "
        "again with a lower learning rate or with gradient clipping."
    )


def to_json(value: Any, **how: Any) -> str:
    """Return JSON. Numbers that are not finite become null.

    Args:
        value: numbers, strings, lists and dicts.
        how: further arguments of ``json.dumps``.
    """
    return json.dumps(_with_null(value), allow_nan=False, **how)


def _with_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
