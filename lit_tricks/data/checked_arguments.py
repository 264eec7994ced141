"""Checks of arguments that several data modules have (see ``lit_tricks.utils.arguments``)."""

from __future__ import annotations

from typing import Any

from lit_tricks.utils.arguments import MAX_SEED, MAX_SIDE, integer, invalid, numbers, path, texts

__all__ = [
    "check_classes",
    "check_eval_size",
    "check_range",
    "check_root",
    "check_seed",
    "check_side",
    "check_statistics",
]


def check_root(owner: object, root: str) -> str:
    """Return the folder of the data as a string: a Path in a checkpoint would keep it from loading safely."""
    return path(owner, "root", root, "Give the folder of the data.")


def check_side(owner: object, name: str, value: int) -> int:
    """Return a number of pixels."""
    return integer(owner, name, value, 1, "Give a number of pixels, such as 224.", MAX_SIDE)


def check_eval_size(owner: object, value: Any) -> int | None:
    """Return the side of the images in evaluation."""
    found: int | None = integer(
        owner, "eval_size", value, 1, "Give a number of pixels.", MAX_SIDE, "the size of the training"
    )
    return found


def check_seed(owner: object, value: int) -> int:
    """Return the seed of a split."""
    return integer(owner, "split_seed", value, 0, "0 is usual.", MAX_SEED)


def check_range(owner: object, name: str, value: Any) -> tuple[float, float]:
    """Return two rising factors."""
    least, most = numbers(owner, name, value, "(0, 1000]", "Give the least and the greatest factor, as [0.5, 2].", 2)
    if least > most:
        raise invalid(owner, f"{name} must be two rising factors. Swap them.", **{name: value})
    return least, most


def check_statistics(owner: object, mean: Any, std: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return mean and standard deviation of the channels."""
    fix = "Give one number per channel, on the scale from 0 to 255."
    means = numbers(owner, "mean", mean, "[-1e6, 1e6]", fix)
    stds = numbers(owner, "std", std, "[1e-6, 1e6]", fix, len(means))
    return tuple(means), tuple(stds)


def check_classes(owner: object, value: Any, or_none: str) -> list[str] | None:
    """Return names of classes, each once."""
    names: list[str] | None = texts(owner, "classes", value, "Give one name per class.", or_none)
    if names and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid(owner, f"classes must be names, each once. {twice!r} is there twice.", classes=value)
    return names
