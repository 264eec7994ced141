"""Inputs and target of a batch, built of lists, tuples, dicts, NamedTuples and dataclasses, nested or not."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["arguments_of", "describe", "find", "images_in_list", "inputs_of", "reject_boxes", "replace", "tensors_in"]

Path = tuple[Any, ...]  # keys, indices or field names, from the outside in

NAMES = {"label", "labels", "target", "targets", "class", "classes", "mask", "masks", "y", "gt"}  # of a target


def find(batch: Any, trick: str) -> tuple[dict[Path, Tensor], Path, Tensor]:
    """Find the inputs of a batch and its target.

    The target is the only integer tensor of shape (N,), or of shape (N, H, W) or (N, 1, H, W) for dense targets. Among
    several, the name decides, such as ``label``, ``class_label`` or ``mask``. A uint8 tensor is a target if there are
    no other integers. A matrix (N, K) is a target with several labels per item if the batch has images or the matrix
    has the name of a target, and there is no other target. The inputs are all other tensors of floats or uint8 with N
    items and at least 3 dimensions. Without these, all matrices of floats are inputs.

    Args:
        batch: the batch of the module's ``training_step``.
        trick: name of the trick, for the message.

    Returns:
        The inputs by their path (there may be none), the path of the target, and the target.

    Raises:
        RuntimeError: if there is no target, or more than one, or the targets are boxes.
    """
    reject_boxes(batch, trick, "a label of each image, or of each pixel")
    tensors = dict(tensors_in(batch))
    images = {path: t for path, t in tensors.items() if _is_images(t)}
    targets = _integer_targets(tensors) or _byte_targets(tensors, images) or _several_labels(tensors, images)
    if len(targets) > 1:
        targets = {path: t for path, t in targets.items() if _is_named(path)} or targets
    if len(targets) != 1:
        raise _no_single_target(batch, trick, tensors, len(targets))
    [(where, target)] = targets.items()
    n = target.size(0)
    inputs = {path: t for path, t in images.items() if path != where and t.size(0) == n}
    inputs = inputs or {path: t for path, t in tensors.items() if _is_float_matrix(t) and t.size(0) == n}
    return inputs, where, target


def inputs_of(batch: Any, trick: str) -> list[Tensor]:
    """Find the inputs of a batch with or without a target, in their order, as ``find`` does.

    Without a target, the inputs are all tensors of floats or uint8 with at least 3 dimensions, or else all matrices.

    Raises:
        RuntimeError: if there are none.
    """
    try:
        inputs = list(find(batch, trick)[0].values())
    except RuntimeError:
        tensors = [t for _, t in tensors_in(batch)]
        inputs = [t for t in tensors if _is_images(t)] or [t for t in tensors if _is_float_matrix(t)]
    if not inputs:
        raise RuntimeError(
            f"{trick} found no inputs in the training batch: {describe(batch)}. It needs tensors of floats, or "
            "uint8 images, with a dimension for the samples. Let the collate_fn of the loader return such."
        )
    return inputs


def arguments_of(batch: Any, trick: str) -> list[Any]:
    """Return the argument of a module's ``forward`` from a batch: its inputs, or the list of its images.

    Raises:
        RuntimeError: if there are none.
    """
    images = images_in_list(batch)
    return [images] if images else inputs_of(batch, trick)


def reject_boxes(batch: Any, trick: str, what: str) -> None:
    """Raise if a batch belongs to object detection.

    Args:
        batch: the batch of the module's ``training_step``.
        trick: name of the trick, for the message.
        what: the kind of input that the trick changes.

    Raises:
        RuntimeError: if the batch has a target with boxes.
    """
    if any(path[-1:] == ("boxes",) for path, _ in tensors_in(batch)):
        raise RuntimeError(
            f"{trick} works on {what}, and the targets of this batch are boxes: {describe(batch)}. It is not made for "
            f"object detection: leave {trick} out. Train the classifier with it that the detector starts from."
        )


def images_in_list(batch: Any) -> list[Tensor]:
    """Return the images (C, H, W) of a batch with a list of images of different sizes, or an empty list."""
    images = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(images, list | tuple):
        return []
    return [t for t in images if isinstance(t, Tensor) and t.dim() == 3 and t.is_floating_point()]


def replace(batch: Any, path: Path, value: Any) -> Any:
    """Return a shallow copy of the batch with ``value`` at ``path``."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    fields = _fields(batch)
    new = replace(getattr(batch, key) if fields else batch[key], rest, value)
    if fields and isinstance(batch, tuple):
        return batch._replace(**{key: new})  # type: ignore[attr-defined]
    if isinstance(batch, tuple):
        return type(batch)((*batch[:key], new, *batch[key + 1 :]))
    changed = copy.copy(batch)
    if fields:
        object.__setattr__(changed, key, new)  # of a dataclass, also of a frozen one
    else:
        changed[key] = new
    return changed


def describe(batch: Any) -> str:
    """Return the structure of a batch in words: types, keys, and of tensors the dtype and shape."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    children = _children(batch)
    parts = [describe(child) if isinstance(key, int) else f"{key}: {describe(child)}" for key, child in children[:8]]
    parts += ["..."] if len(children) > 8 else []
    return f"{type(batch).__name__}({', '.join(parts)})" if parts else type(batch).__name__


def _fields(value: Any) -> tuple[str, ...]:
    """Return the names of the fields of a NamedTuple or a dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(field.name for field in dataclasses.fields(value))
    return getattr(value, "_fields", ()) if isinstance(value, tuple) else ()


def _children(value: Any) -> list[tuple[Any, Any]]:
    if fields := _fields(value):
        return [(name, getattr(value, name)) for name in fields]
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in value]
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield all tensors of a batch with at least one dimension, each with its path."""
    if isinstance(value, Tensor) and value.dim():
        yield path, value
    for key, child in _children(value):
        yield from tensors_in(child, (*path, key))


def _no_single_target(batch: Any, trick: str, tensors: dict[Path, Tensor], number: int) -> RuntimeError:
    """Return the error for a batch that has several tensors that could be the target, or none."""
    found = f"{number} tensors that could be the target" if number else "no target"
    if not number and any(t.is_floating_point() and t.dim() == 1 for t in tensors.values()):
        remedy = (
            "Floats of shape (N,) are no class indices: let the dataset return integers, as `label.long()`. For "
            f"regression leave {trick} out."
        )
    else:
        remedy = (
            "Name it 'label', 'target' or 'mask': let the collate_fn of the loader return a dict, or a NamedTuple "
            "(which unpacks as the tuple before)."
        )
    return RuntimeError(
        f"{trick} found {found} in the training batch: {describe(batch)}. It needs one tensor of integer class "
        "indices, of shape (N,) or (N, H, W), or of several labels per item, of shape (N, K) with values from 0 to "
        f"1. {remedy}"
    )


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)


def _is_bytes(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8


def _is_images(tensor: Tensor) -> bool:
    return tensor.dim() >= 3 and (tensor.is_floating_point() or _is_bytes(tensor))


def _is_float_matrix(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()


def _has_target_shape(tensor: Tensor) -> bool:
    return tensor.dim() in (1, 3) or (tensor.dim() in (2, 4) and tensor.size(1) == 1)


def _integer_targets(tensors: dict[Path, Tensor]) -> dict[Path, Tensor]:
    return {path: t for path, t in tensors.items() if _is_integer(t) and _has_target_shape(t)}


def _byte_targets(tensors: dict[Path, Tensor], images: dict[Path, Tensor]) -> dict[Path, Tensor]:
    """Return uint8 tensors that may be targets: if these are all the images there are, only those with such a name."""
    targets = {path: t for path, t in tensors.items() if _is_bytes(t) and _has_target_shape(t)}
    if targets.keys() != images.keys():
        return targets
    return {path: t for path, t in targets.items() if _is_named(path)}


def _several_labels(tensors: dict[Path, Tensor], images: dict[Path, Tensor]) -> dict[Path, Tensor]:
    """Find several labels per item: by name, or next to images, with integers and booleans before floats."""
    matrices = {path: t for path, t in tensors.items() if t.dim() == 2 and t.size(1) > 1}
    named = {path: t for path, t in matrices.items() if _is_named(path)}
    if named or not images:
        return named
    matrices = {path: t for path, t in matrices.items() if any(t.size(0) == x.size(0) for x in images.values())}
    return {path: t for path, t in matrices.items() if not t.is_floating_point()} or matrices


def _is_named(path: Path) -> bool:
    """Return whether the last name in the path of a tensor names a target: ``mask``, ``class_label``, ``Target``."""
    names = [key for key in path if isinstance(key, str)]
    return bool(names) and not NAMES.isdisjoint(re.split("[^a-z]+", names[-1].lower()))
