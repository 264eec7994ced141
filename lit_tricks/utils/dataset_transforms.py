"""The ``transform`` of data sets: another one in its place, and the same one for images of another size."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Flipped", "at_size", "changed", "nested"]

_MODULES = ("torchvision.transforms", "torchvision.transforms.v2", "timm.data.transforms")
_RESIZES = ("Resize", "ResizeKeepRatio")
_CROPS = ("CenterCrop", "CenterCropOrPad")


class Flipped:
    """A transform whose image is flipped horizontally with probability 1/2.

    Args:
        transform: gives a tensor whose last dimension is the width.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform

    def __call__(self, *args: Any) -> Any:
        """Transform, and flip half of the time."""
        image = self.transform(*args)
        if not isinstance(image, Tensor):
            raise TypeError(f"to be flipped, an image must be a tensor, and the transform gives {type(image).__name__}")
        return image.flip(-1) if torch.rand(()) < 0.5 else image


def at_size(transform: Any, size: int) -> Any:
    """Return a copy of an evaluation transform for another size, with resizing and center crop scaled alike.

    The crop keeps its share of the image: with a resize to 256 and a crop of 224, a size of 288 uses a resize to 329.
    Steps that are neither torchvision's nor timm's stay unchanged, so the result may keep its size.

    Args:
        transform: one step, or several steps in an attribute ``transforms``, as in ``Compose``.
        size: size of the result in pixels.
    """
    twin = copy.deepcopy(transform)
    steps = list(_steps(twin))
    for preset in (step for step in steps if hasattr(step, "crop_size") and hasattr(step, "resize_size")):
        ratio = size / _side(preset.crop_size)
        preset.resize_size, preset.crop_size = _scaled(preset.resize_size, ratio), _scaled(preset.crop_size, ratio)
    crops = [step for step in steps if isinstance(step, _classes(_CROPS))]
    resizes = [step for step in steps if isinstance(step, _classes(_RESIZES)) and step.size]
    if crops or resizes:
        ratio = size / _side((crops or resizes)[-1].size)
        for step in (*resizes, *crops):
            step.size = _scaled(step.size, ratio)
    return twin


def _classes(names: Sequence[str]) -> tuple[type[Any], ...]:
    """Return the classes of these names. A module that is not imported has made no step."""
    modules = [module for module in map(sys.modules.get, _MODULES) if module]
    return tuple(getattr(module, name) for module in modules for name in names if hasattr(module, name))


def nested(dataset: Any) -> Iterator[Any]:
    """Yield a data set and those that it is made of: in ``dataset``, as a ``Subset``, or in ``datasets``."""
    yield dataset
    parts = getattr(dataset, "datasets", ())
    inner = [getattr(dataset, "dataset", None), *(parts if isinstance(parts, list | tuple) else ())]
    for child in inner:
        if child is not None:
            yield from nested(child)


def changed(dataset: Any, change: Callable[[Any], None]) -> Any:
    """Return a copy of a data set, as shallow as can be, in which those parts that have a ``transform`` are changed.

    Args:
        dataset: with a ``transform``, or made of data sets that have one (see ``nested``).
        change: gets the copy of each such part.

    Raises:
        LookupError: if a part has none; it names the type.
    """
    twin = copy.copy(dataset)
    if hasattr(dataset, "transform"):
        change(twin)
    elif hasattr(dataset, "dataset"):
        twin.dataset = changed(dataset.dataset, change)
    elif isinstance(getattr(dataset, "datasets", None), list | tuple) and dataset.datasets:
        twin.datasets = [changed(part, change) for part in dataset.datasets]
    else:
        raise LookupError(type(dataset).__name__)
    return twin


def _steps(transform: Any) -> Iterator[Any]:
    yield transform
    inner = getattr(transform, "transforms", None)
    for step in inner if isinstance(inner, Sequence) else ():
        yield from _steps(step)


def _side(size: Any) -> int:
    """Return the shorter side."""
    return int(min(size)) if isinstance(size, Sequence) else int(size)


def _scaled(size: Any, ratio: float) -> Any:
    if isinstance(size, Sequence):
        return type(size)([round(side * ratio) for side in size])  # type: ignore[call-arg]
    return round(size * ratio)
