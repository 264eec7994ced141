"""``lit_tricks.predict``: the classes of images in Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from lit_tricks.commands.checkpoints import checkpoint_at
from lit_tricks.commands.predicting.loading import load
from lit_tricks.data.transforms import InputTransform

__all__ = ["Prediction", "predict"]


class Prediction(NamedTuple):
    """The most probable classes of an image.

    Attributes:
        names: of the classes, the most probable first.
        probabilities: of the classes, in [0, 1].
    """

    names: list[str]
    probabilities: list[float]


def predict(
    checkpoint: str | os.PathLike[str],
    images: Any,
    top_k: int = 5,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
) -> list[Prediction]:
    """Predict the classes of images.

    Images are transformed as in validation. The last model stays in memory.

    Args:
        checkpoint: checkpoint of a classifier: a file, a run folder (its best checkpoint), or an exported ONNX file.
        images: one image, or several: paths of files, PIL images, arrays of uint8 pixels (H, W, 3) or (H, W), tensors
            of uint8 pixels (3, H, W) or (1, H, W).
        top_k: number of classes per image, at least 1.
        device: device of the model, such as "cuda".
        batch_size: images at a time, at least 1.

    Returns:
        The names of the most probable classes and their probabilities, per image.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: for a checkpoint of another task, or an image that is none of the above.
        RuntimeError: for an image file that cannot be read; the message names it.

    Example:
        ``[(names, probabilities)] = lit_tricks.predict("runs/finetune/v0", "photo.jpg")``
    """
    for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} is below 1. Give 1 or more.")
    path = checkpoint_at(os.fspath(checkpoint))
    module, transform = _loaded(path, path.stat().st_mtime_ns, str(device))
    inputs = (transform(_image(each)) for each in _each(images))
    found: list[Prediction] = []
    while batch := list(islice(inputs, batch_size)):
        with torch.inference_mode():
            output: Any = module.predict_step(torch.stack(batch).to(device), 0)
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ValueError(f"{path} is not of a classifier. Use `lit-tricks predict` for masks and objects.")
        names: list[str] = module.class_names  # type: ignore[assignment]
        probabilities, labels = output.float().topk(min(top_k, output.shape[1]))
        for row, indices in zip(probabilities.tolist(), labels.tolist(), strict=True):
            found.append(Prediction([names[index] for index in indices], row))
    return found


@lru_cache(maxsize=1)
def _loaded(path: Path, changed: int, device: str) -> tuple[LightningModule, InputTransform]:
    """Load a model. ``changed`` distinguishes versions of a file."""
    module, data = load(path)
    return module.to(device), data.input_transform()


def _each(images: Any) -> Iterator[Any]:
    is_one = isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", 0) in (2, 3)
    if not is_one and not isinstance(images, Iterable):
        raise ValueError(f"images={images!r} is no image: give paths, PIL images, or uint8 arrays or tensors.")
    yield from [images] if is_one else images


def _image(image: Any) -> Image.Image | str:
    """Return a PIL image, or the path of a file."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, Tensor):
        image = image.cpu().movedim(0, -1).numpy() if image.dim() == 3 else image.cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        kind = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"an image is {kind}. Give a path, a PIL image, or uint8 pixels from 0 to 255.")
    if image.ndim == 3 and image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"pixels of shape {image.shape} have no channels: arrays are (H, W, 3), tensors (3, H, W).")
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image))
