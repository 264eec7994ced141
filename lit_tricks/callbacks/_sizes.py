"""The sizes of images: of those in a batch, and of those that a network can take."""

from __future__ import annotations

from typing import Any

from lit_tricks.callbacks._batch import describe, tensors_in

__all__ = ["require_size"]


def require_size(batch: Any, size: int, trick: str, remedy: str) -> None:
    """See that the images of a batch have a size, if it has any: a tensor with four dimensions.

    Raises:
        RuntimeError: if they have another one.
    """
    images = [tensor for _, tensor in tensors_in(batch) if tensor.dim() == 4]
    if images and not any(size in tensor.shape[1:] for tensor in images):
        raise RuntimeError(f"{trick} expects images of {size} pixels, and the batch is {describe(batch)}: {remedy}")
