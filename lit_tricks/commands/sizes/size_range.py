"""Sizes of test images: as they are written, whether a network takes them, and what they cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_tricks.commands.sizes.subject import Subject
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.image_size import stride_of

__all__ = ["default_sizes", "macs", "parse_sizes"]

_STRIDED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def parse_sizes(words: Sequence[str | int]) -> list[int]:
    """Sizes from ``FIRST:LAST:STEP``, which has both ends, and from single numbers.

    Raises:
        ValueError: for what is neither.
    """
    sizes: set[int] = set()
    for word in words:
        try:
            numbers = [int(part) for part in str(word).split(":")]
            first, last, step = numbers if len(numbers) == 3 else (*numbers, *numbers, 1)
        except ValueError:
            raise ValueError(f"--sizes {word!r} is no size: write 128:448:32, or single ones.") from None
        if first < 1 or step < 1 or last < first:
            raise ValueError(f"--sizes {word!r} has no size of at least 1: write it as FIRST:LAST:STEP, 128:448:32.")
        sizes.update(range(first, last + 1, step))
    return sorted(sizes)


def default_sizes(subject: Subject, channels: int) -> list[int]:
    """From 4/7 of the size in training to twice it: 128 to 448, by 32, for 224; without those that leave nothing.

    Raises:
        ValueError: if the size in training is not known.
    """
    size = subject.train_size
    if size is None:
        raise ValueError("the size at which the model was trained is unknown: give --sizes, such as 128:448:32.")
    step = max(1, round(size / 7))
    sizes = sorted({*range(4 * step, 14 * step + 1, step), size})
    return [other for other in sizes if other >= size or not isinstance(_fault(subject, other, channels), str)]


def macs(subject: Subject, size: int, channels: int) -> float:
    """Count the multiply-adds for one image of a size, in convolutions and matrix products.

    Raises:
        ValueError: if the network does not support images of this size, with the reason if it is known.
    """
    if error := _fault(subject, size, channels):
        raise ValueError(_explained(subject, size, channels, error)) from (None if isinstance(error, str) else error)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # a fused one is not counted on a CPU
        _forward(subject, size, channels)
    return float(counter.get_total_flops()) / 2


def _forward(subject: Subject, size: int, channels: int) -> Tensor:
    with torch.no_grad():
        return subject.logits(torch.zeros(1, channels, size, size, device=subject.device))


def _fault(subject: Subject, size: int, channels: int) -> str | Exception | None:
    """Return the fault at a size: an error, or the layer whose input is too small."""
    starved: list[str] = []
    images = torch.zeros(1, channels, size, size, device=subject.device)
    with _watched(subject.module, starved):
        try:
            subject.logits(images)
        except Exception as error:  # a network that does not take a size fails with any type
            if not is_about_input(error):
                raise
            return starved[0] if starved else error
    return starved[0] if starved else None


@contextlib.contextmanager
def _watched(module: nn.Module, starved: list[str]) -> Iterator[None]:
    """Name layers that are to shrink a map which is smaller than their stride."""

    def look(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            stride = stride_of(layer)
            if not args:  # called by name
                return
            side = min(args[0].shape[-2:])
            if side < stride and not getattr(layer, "ceil_mode", False):
                starved.append(f"{name}, which has stride {stride}, gets a map of {side} pixel{'s' * (side > 1)}")

        return hook

    handles = [
        layer.register_forward_pre_hook(look(name))
        for name, layer in module.named_modules()
        if isinstance(layer, _STRIDED)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _explained(subject: Subject, size: int, channels: int, error: str | Exception) -> str:
    def works(other: int) -> bool:
        return _fault(subject, other, channels) is None

    train = subject.train_size
    name = type(getattr(subject.module, "model", subject.module)).__name__
    if isinstance(error, str) or (train and works(2 * train)):
        least = next((other for other in range(size + 1, (train or 256) + 1) if works(other)), None)
        remedy = f"use {least} or more" if least else "use larger ones"
        why = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return f"nothing of an image is left at {size} pixels ({why}): {remedy}."
    if train and size != train and works(train):
        return (
            f"{name} supports only images of {train} pixels ({error}). If it is one of timm's transformers, "
            "--model_args '{dynamic_img_size: true}' lets it take other sizes."
        )
    return f"{name} fails on {channels} x {size} x {size} pixels ({type(error).__name__}: {error}): give other --sizes."
