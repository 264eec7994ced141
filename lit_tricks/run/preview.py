"""A picture of a training batch as the model's input: for ``lit-tricks data preview``, and once per run for W&B."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image, ImageDraw
from torch import Tensor

from lit_tricks._compat import lightning_classes
from lit_tricks.utils.batch import find, images_in_list, inputs_of
from lit_tricks.utils.log import log

__all__ = ["Preview", "PreviewLogger", "preview_of"]


LEAST_SHARE = 0.05  # smallest share of a class in a label that is printed
INCHES = 1.4  # of a cell
BOX = (255, 140, 0)  # color of its edge
Shares = dict[str, float]


@dataclass(frozen=True)
class Preview:
    """Images to show, and their labels.

    Attributes:
        images: uint8, shape (n, H, W, 3), or (n, H, W) if gray.
        labels: classes and their shares per image, the largest first; empty without labels.
        size: (channels, height, width) of the model's input.
        note: how the colors were guessed, if they were.
    """

    images: npt.NDArray[np.uint8]
    labels: list[Shares]
    size: tuple[int, ...]
    note: str = ""

    def titles(self) -> list[str]:
        """Return one line per image: "cat", or "cat 0.70, dog 0.30" for a mixture."""
        return [
            ", ".join(name if share > 1 - LEAST_SHARE / 10 else f"{name} {share:.2f}" for name, share in shares.items())
            for shares in self.labels
        ]

    def png(self) -> bytes:
        """Return the grid as a PNG file."""
        from matplotlib.figure import Figure  # here, as the import takes a while and not every run needs it

        columns = min(8, math.ceil(math.sqrt(len(self.images))))
        rows = math.ceil(len(self.images) / columns)
        figure = Figure((columns * INCHES, rows * (INCHES + 0.25)), dpi=150, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax in axes:
            ax.set_axis_off()
        for ax, image, title in zip(axes, self.images, self.titles(), strict=False):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set_title(_shortened(title), fontsize=6, parse_math=False)
        if self.note:
            figure.supxlabel(self.note, fontsize=6)
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in a script without a font
            figure.savefig(stream, format="png")
        return stream.getvalue()


class PreviewLogger(Callback):
    """Log a picture of the first training batch, as the model's input, to W&B as ``data/preview``.

    The run does not change, including its random numbers. If the picture cannot be made, a line is logged.

    Args:
        count: images in the picture, at least 1.
    """

    def __init__(self, count: int = 16) -> None:
        self.count = count

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, before the first step of all."""
        if trainer.global_step or batch_idx or not trainer.is_global_zero:
            return
        loggers = [each for each in trainer.loggers if isinstance(each, lightning_classes("loggers.WandbLogger"))]
        if not loggers:
            return
        try:
            with isolate_rng():
                preview = preview_of(batch, trainer.datamodule, self.count)  # type: ignore[attr-defined]
                image = Image.open(io.BytesIO(preview.png()))
                for logger in loggers:
                    logger.log_image("data/preview", [image], step=0)
        except Exception as error:  # a picture is not worth a run
            log.warning("there is no picture of the first batch for W&B: %s", error)


def preview_of(batch: Any, data: object, count: int) -> Preview:
    """Make the pictures of a batch that the model is about to get.

    Args:
        batch: on any device, in any layout, after all that changes it.
        data: the data module. Its ``mean`` and ``std`` (of the channels, on the 0-255 scale) turn normalized images
            back into pixels, and its ``classes`` are the names of the labels, where it has them.
        count: images, the first of the batch.

    Raises:
        RuntimeError: if the batch holds no images.
    """
    if listed := images_in_list(batch)[:count]:
        return _objects_of(listed, batch[1], data)
    try:
        inputs, _, target = find(batch, "preview")
        candidates: Sequence[Tensor] = list(inputs.values())
    except RuntimeError:  # of another task, or without labels
        candidates, target = inputs_of(batch, "preview"), None
    images = next((each for each in candidates if each.dim() == 4), None)
    if images is None:
        raise RuntimeError("the training batch holds no images: no tensor of shape (N, channels, height, width)")
    labels = _labels(target, getattr(data, "classes", None), count) if target is not None and target.dim() == 1 else []
    shown = images[:count].detach().cpu()
    pixels, note = _pixels(shown, data)
    return Preview(pixels, labels or [{}] * len(pixels), tuple(images.shape[1:]), note)


def _objects_of(images: Sequence[Tensor], targets: Any, data: object) -> Preview:
    """Images of many sizes in frames of one, with the boxes of their objects."""
    height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
    names = getattr(data, "classes", None)
    pictures, labels, note = [], [], ""
    for image, target in zip(images, targets, strict=False):
        pixels, note = _pixels(image[None].detach().cpu(), data)
        picture = Image.fromarray(pixels[0]).convert("RGB")
        draw = ImageDraw.Draw(picture)
        for x0, y0, x1, y1 in target["boxes"].round().int().tolist():
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=BOX)
        frame = Image.new("RGB", (width, height))
        frame.paste(picture)
        pictures.append(np.asarray(frame))
        found = target["labels"].tolist()  # they start at 1
        labels.append({str(names[label - 1] if names else label): 1.0 for label in found})
    return Preview(np.stack(pictures), labels, (images[0].shape[0], height, width), note)


def _labels(target: Tensor, classes: Sequence[str] | None, count: int) -> list[Shares]:
    """Return the distribution that the loss will see: tricks turn it soft when it is one-hot."""
    target = target[:count]
    names = classes if classes and int(target.max()) < len(classes) else None
    shares = F.one_hot(target.long(), len(names) if names else -1).float().cpu()
    result = []
    for row in shares:
        values, indices = row.topk(min(3, len(row)))
        shown = [(value, index) for value, index in zip(values.tolist(), indices.tolist(), strict=True)]
        shown = shown[:1] + [(value, index) for value, index in shown[1:] if value >= LEAST_SHARE]
        result.append({str(names[index] if names else index): value for value, index in shown})
    return result


def _pixels(images: Tensor, data: object) -> tuple[npt.NDArray[np.uint8], str]:
    """Pixels for people, and how they were found."""
    note = ""
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    channels = images.shape[1]
    if images.dtype == torch.uint8:
        pixels = images.float()
    elif mean is not None and std is not None and len(mean) == len(std) == channels:
        shape = (1, channels, 1, 1)
        pixels = images.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    else:
        pixels = images.float().nan_to_num()
        low, high = float(pixels.min()), float(pixels.max())
        if low < 0 or high > 1:
            note = f"{low:.3g} shown as black, {high:.3g} as white"
            pixels = (pixels - low) / max(high - low, 1e-12)
        pixels = pixels * 255
    pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    if channels >= 3:
        return pixels[:, :3].permute(0, 2, 3, 1).numpy(), note
    return pixels[:, 0].numpy(), note


def _shortened(title: str, most: int = 30) -> str:
    return title if len(title) <= most else title[: most - 1] + "…"
