"""Soft targets: metrics get integer labels, and losses get the label distribution that the tricks define.

A soft target replaces the labels of a training batch. Metrics, indexing and printing see plain labels. The parts that
only the loss needs follow the labels through ``.long()``, ``.view(-1)``, ``[mask]`` and similar operations, until the
labels reach a loss of ``losses.py``. The parts are tensors, not numbers: torch.compile would recompile for each number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_tricks._compat import plain_torch_functions
from lit_tricks.callbacks.soft_targets.losses import LOSSES, mixed_labels
from lit_tricks.callbacks.soft_targets.spec import LossSpec

__all__ = ["SoftTarget", "carrying"]


class SoftTarget(Tensor):
    """Labels that carry what their loss needs. ``losses.Target`` documents the attributes."""

    spec: LossSpec
    kind: str
    lost: str
    parts: dict[str, Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LOSSES and isinstance(_second(args, kwargs), SoftTarget):
            with plain_torch_functions():
                return LOSSES[func](*args, **kwargs)
        with plain_torch_functions():
            if args and isinstance(args[0], SoftTarget):
                if func in MOVES:
                    return _move(func, *args, **kwargs)
                if func in CASTS:
                    return _cast(func, *args, **kwargs)
                if func is F.one_hot and args[0].kind == "labels":
                    return _one_hot(*args, **kwargs)
            if func in JOINS:
                return _join(func, *args, **kwargs)
            return _other(func, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # in files, and in other processes, plain labels
        return self.parts["value"].__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


if torch.__version__ < "2.15":  # torch.compile cannot trace it there: the graph breaks, and the loss runs in between
    SoftTarget.__torch_function__ = classmethod(torch.compiler.disable(SoftTarget.__torch_function__.__func__))  # type: ignore


def carrying(labels: Tensor, spec: LossSpec, other: Tensor | None = None, share: Tensor | None = None) -> SoftTarget:
    """Return labels that carry a spec.

    Args:
        labels: integers, or several labels of each item, (N, K).
        spec: specification of their loss.
        other: labels of the same shape that they are mixed with.
        share: share of ``labels`` in the mixture, (N,). Metrics get the label with the larger share.
    """
    kind = "binary" if labels.dim() == 2 and labels.size(1) > 1 else "labels"
    if other is None or share is None:
        return _target({"value": labels}, spec, kind)
    share = share.view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
    mine = share >= 0.5
    parts = {
        "value": torch.where(mine, labels, other),
        "other": torch.where(mine, other, labels),
        "weight": torch.where(mine, share, 1 - share),
    }
    return _target(parts, spec, kind)


def _target(parts: dict[str, Tensor], spec: LossSpec, kind: str = "labels", lost: str = "") -> SoftTarget:
    target = parts["value"].as_subclass(SoftTarget)
    target.spec, target.parts, target.kind, target.lost = spec, parts, kind, lost
    return target


def _second(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("target")


def _move(func: Callable[..., Any], target: SoftTarget, *args: Any, **kwargs: Any) -> Any:
    """Call a function that only moves elements on all parts."""
    moved = {name: func(part, *args, **kwargs) for name, part in target.parts.items()}
    if isinstance(moved["value"], Tensor):
        return _target(moved, target.spec, target.kind, target.lost)
    pieces = [dict(zip(moved, piece, strict=True)) for piece in zip(*moved.values(), strict=True)]
    return tuple(_target(piece, target.spec, target.kind, target.lost) for piece in pieces)


def _cast(func: Callable[..., Any], target: SoftTarget, *args: Any, **kwargs: Any) -> Any:
    """Change dtype and device of labels, and only the device of shares."""
    value = func(target.parts["value"], *args, **kwargs)
    if not isinstance(value, Tensor):
        return value  # the name of its type
    if target.kind != "binary" and "soft" in target.parts and value.is_floating_point():
        parts = {"value": target.parts["soft"].to(value)}
        parts |= {"row": target.parts["row"].to(value.device)} if "row" in target.parts else {}
        return _target(parts, target.spec, "soft", target.lost)
    cast = {
        name: func(part, *args, **kwargs) if name in ("value", "other") else part.to(value.device)
        for name, part in target.parts.items()
    }
    return _target(cast, target.spec, target.kind, target.lost)


def _one_hot(target: SoftTarget, num_classes: int = -1) -> SoftTarget:
    """Return one-hot integers, which become the soft distribution when they are cast to floats."""
    labels = [target.parts[name] for name in ("value", "other") if name in target.parts]
    if num_classes == -1:
        num_classes = int(torch.stack(labels).max()) + 1
    hard, *others = [F.one_hot(each, num_classes) for each in labels]
    soft = hard.to(torch.get_default_dtype())
    if others:
        soft = others[0].to(soft).lerp_(soft, target.parts["weight"].to(soft).unsqueeze(-1))
    if target.spec.smoothing and target.spec.multi_hot is None:  # which smooths the targets that it makes of them
        smoothing = target.spec.smoothing(num_classes)
        soft = soft * (1 - smoothing) + smoothing / num_classes
    parts = {"value": hard, "soft": soft}
    if "row" in target.parts:
        parts["row"] = target.parts["row"].unsqueeze(-1).expand_as(hard).contiguous()  # to be viewed as the others
    return _target(parts, target.spec, "one-hot", target.lost)


def _join(func: Callable[..., Any], tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    targets = [each for each in tensors if isinstance(each, SoftTarget)]
    joined = func([each.parts["value"] if isinstance(each, SoftTarget) else each for each in tensors], *args, **kwargs)
    first = targets[0]
    if any(each.spec is not first.spec for each in targets):
        return joined  # of several batches, as metrics keep them
    lost = next((each.lost for each in targets if each.lost), "")
    parts = {"value": joined}
    if len(targets) == len(tensors) and all(each.parts.keys() == first.parts.keys() for each in targets):
        parts |= {name: func([t.parts[name] for t in targets], *args, **kwargs) for name in first.parts}
    elif any(len(each.parts) > 1 for each in targets):
        lost = lost or _name(func)
    return _target(parts, first.spec, first.kind, lost)


def _other(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call any other function on plain tensors. Its result stays a target where a loss may still get it.

    The first row that applies decides.

    | result | becomes |
    |---|---|
    | no tensor, or an attribute such as ``.grad`` | itself |
    | a tensor made from several labels per item | see ``_of_several`` |
    | the target, changed in place | the same target, marked with ``_lost_by`` |
    | a tensor with gradient: part of a loss that the user has written out | itself; the spec counts as used, or an
      error is raised if the loss would lack something, see ``_require_known_loss`` |
    | a tensor of the target's shape, not boolean: changed labels | a target of the result only, marked likewise |
    | any other tensor, such as a mask or a count | itself |
    """
    result = func(*args, **kwargs)
    targets = [each for each in (*args, *kwargs.values()) if isinstance(each, SoftTarget)]
    if func is Tensor.__setitem__ and isinstance(args[0], SoftTarget):
        result = args[0]
    elif isinstance(result, Tensor) and _name(func) != "__get__":
        several = next((target for target in targets if target.kind == "binary"), None)
        if several is not None:
            return _of_several(func, args, kwargs, several, result)
    else:
        return result
    if not targets:
        return result
    target = targets[0]
    lost = _lost_by(func, target)
    if result is target:
        target.lost = lost
    elif result.requires_grad:
        _require_known_loss(target, lost)
    elif result.shape == target.shape and result.dtype != torch.bool:
        if target.kind == "labels" and result.is_floating_point():
            lost = lost or _name(func)
        return _target({"value": result}, target.spec, target.kind, lost)
    return result


def _lost_by(func: Callable[..., Any], target: SoftTarget) -> str:
    """Return the name of the first function that lost something that the loss needs, or an empty text."""
    # a changed distribution is as good, but factors, shifts and teachers need a loss that is known
    is_lost = target.spec.needs_known_loss if target.kind == "soft" else len(target.parts) > 1
    return target.lost or (_name(func) if is_lost else "")


def _require_known_loss(target: SoftTarget, lost: str) -> None:
    """Record that a loss in the user's own code has used a soft distribution, or raise if the loss lacks something.

    Raises:
        RuntimeError: if the loss lacks something.
    """
    if target.kind == "soft" or (target.kind == "one-hot" and target.lost):
        target.spec.require(not lost, lost)
        target.spec.used = True


def _of_several(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], target: SoftTarget, result: Tensor
) -> Any:
    """Call a function on several labels per item, and on the mixed labels.

    A loss that the user has written out gets the mixed labels only.
    """
    spec, name = target.spec, _name(func)

    def mixed(value: Any) -> Any:
        return mixed_labels(value) if isinstance(value, SoftTarget) and value.kind == "binary" else value

    def of_mixed() -> Tensor:
        of: Tensor = func(*map(mixed, args), **{key: mixed(value) for key, value in kwargs.items()})
        return of

    if result is target:  # in place
        target.lost = target.lost or name
        return result
    if result.requires_grad:
        spec.require(not target.lost, target.lost)
        spec.require(not (spec.smoothing or spec.needs_known_loss), name)
        try:
            result = of_mixed()
        except (RuntimeError, TypeError) as error:  # losses of class indices support no floats
            raise spec.unknown(name) from error
        spec.used = True
        return result
    if result.shape != target.shape or result.dtype == torch.bool:
        return result
    try:
        return _target({"value": result, "soft": of_mixed()}, spec, "binary", target.lost)
    except (RuntimeError, TypeError):  # integers support functions that floats do not
        return _target({"value": result}, spec, "binary", target.lost or name)


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))


def _functions(names: str) -> set[Callable[..., Any]]:
    """Return methods of tensors and functions of torch."""
    return {getattr(owner, name) for owner in (Tensor, torch) for name in names.split() if hasattr(owner, name)}


MOVES = _functions(
    "view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand expand_as permute transpose "
    "movedim t contiguous clone detach cpu cuda pin_memory __getitem__ __deepcopy__ index_select masked_select narrow "
    "select take chunk split unbind tensor_split flip roll repeat repeat_interleave tile"
)
MOVES.add(Tensor.data.__get__)  # type: ignore[attr-defined]
CASTS = _functions("to type type_as long int short byte float double half bfloat16")
JOINS = _functions("cat concat concatenate stack")
