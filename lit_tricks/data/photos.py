"""Data modules whose workers give uint8 crops; colors are for the device that trains, a batch at a time."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Callable
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from lit_tricks.data.color import Jitter, Triple, apply_matrices, normalization
from lit_tricks.data.crops import RandomCrop
from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.data.samples import Reader
from lit_tricks.data.transforms import InputTransform, Transform
from lit_tricks.utils.dtensor import to_local

__all__ = ["AUGMENTATIONS", "Augmentation", "PhotoDataModule", "random_crop"]

Augmentation = Literal["paper", "basic", "none", "trivial", "rand", "augmix"]

# On uint8 crops, as torchvision's recipes have them, with bilinear interpolation.
BILINEAR: v2.InterpolationMode = v2.InterpolationMode.BILINEAR
AUGMENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "trivial": lambda: v2.TrivialAugmentWide(interpolation=BILINEAR),
    "rand": lambda: v2.RandAugment(interpolation=BILINEAR),
    "augmix": lambda: v2.AugMix(interpolation=BILINEAR),
}


def random_crop(size: int, augmentation: str, mean: Triple, std: Triple, random_erasing: float) -> RandomCrop:
    """Make the random transform of training images.

    Args:
        size: side of the square result in pixels.
        augmentation: "paper", "basic", "trivial", "rand" or "augmix".
        mean: of the channels R, G, B on the 0-255 scale; what is erased has this color.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
        random_erasing: probability that a rectangle is erased.
    """
    steps = [AUGMENTATIONS[augmentation]()] if augmentation in AUGMENTATIONS else []
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing, value=[float(round(channel)) for channel in mean]))
    augment = None if not steps else steps[0] if len(steps) == 1 else v2.Compose(steps)
    return RandomCrop(size, Jitter(mean, std) if augmentation == "paper" else None, augment)


class PhotoInput(InputTransform):
    """Convert an image to the input of a model (see the base class), normalized after a transform to uint8.

    Args:
        transform: of evaluation, from a PIL image to uint8 pixels (3, H, W).
        read: reads an image file.
        exif: whether an image is rotated by its EXIF orientation.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
    """

    def __init__(self, transform: Transform, read: Reader, exif: bool, mean: Triple, std: Triple) -> None:
        super().__init__(transform, read, exif)
        self.matrix: Tensor = normalization(mean, std)

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Transform a PIL image, or the image in a file."""
        return apply_matrices(super().__call__(image)[None], self.matrix, torch.float32, channels_last=False)[0]


class PhotoDataModule(ImageDataModule, ABC):
    """Base: loaders give [uint8 images, labels], in training with the matrices of the colors as a third.

    ``on_after_batch_transfer`` makes [images, labels] of it, with images in the precision of the run, normalized,
    contiguous or channels last as the filters of the model are.

    Attributes:
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
    """

    mean: Triple
    std: Triple

    def input_transform(self) -> InputTransform:
        """Return what makes an image, or its file, the input of a model, as in validation."""
        return PhotoInput(self.eval_transform, self._file_reader(), self.exif, self.mean, self.std)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do the colors of a batch; images that are no uint8 any more are left as they are."""
        self._report.update(self._bad.values(), self.trainer)
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            return batch
        images, labels, *matrices = batch
        return [self._colored(images, *matrices), labels]

    def _colored(self, images: Any, matrices: Tensor | None = None) -> Any:
        """Do the colors of images (N, 3, H, W), of one (3, H, W), or of any of these in a list or tuple."""
        if isinstance(images, list | tuple):
            return [self._colored(part, matrices) for part in images]
        if images.dtype != torch.uint8:
            return images
        floats = normalization(self.mean, self.std) if matrices is None else matrices.view(torch.float32)
        single = images.dim() == 3
        images = images[None] if single else images
        result = apply_matrices(images, floats, self._dtype(), self._is_channels_last())
        return result[0] if single else result

    def _dtype(self) -> torch.dtype:
        """Return the dtype of inputs: half or double if the whole run uses it. Autocast takes floats."""
        precision = str(getattr(self.trainer, "precision", "32-true"))
        kinds = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
        return kinds.get(precision, torch.float32)

    def _is_channels_last(self) -> bool:
        module = None if self.trainer is None else self.trainer.lightning_module
        parameters = module.parameters() if module is not None else ()
        # A filter of one pixel or one channel is in either format.
        filters = (param for param in parameters if param.dim() == 4 and param.size(1) > 1 and param.size(3) > 1)
        weight: Any = next(filters, None)
        if weight is None:
            return False
        weight = to_local(weight)
        return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
