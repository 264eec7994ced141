"""Images for an exported network, whose preprocessing is known and whose data is not."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Literal, NoReturn

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lit_tricks.data.crops import CentreCrop
from lit_tricks.data.datamodule import Split
from lit_tricks.data.detection.base import BoxTransform, DetectionDataModule
from lit_tricks.data.photos import PhotoDataModule
from lit_tricks.data.samples import Source
from lit_tricks.data.transforms import to_rgb

__all__ = ["ExportedData", "ExportedDetectionData"]


class ExportedData(PhotoDataModule):
    """Images to predict with an exported network.

    Args:
        input_size: channels (1 or 3), height and width of the network's input.
        resize_size: length of the short side before the center crop in pixels; of both sides with "squash".
        crop_mode: "center" keeps the aspect ratio of an image, "squash" does not.
        mean: of the channels, on the scale from 0 to 255.
        std: standard deviation of the channels, on the scale from 0 to 255.
        classes: their names.
        exif: whether images are turned by their EXIF orientation.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        resize_size: int,
        crop_mode: Literal["center", "squash"],
        mean: Sequence[float],
        std: Sequence[float],
        classes: list[str],
        exif: bool,
    ) -> None:
        super().__init__(batch_size=64, num_workers="auto", predict_dir=tempfile.gettempdir())
        channels, _, size = self.input_size = input_size
        self.classes = classes
        self.exif = exif
        self.mean, self.std = tuple(mean), tuple(std)  # type: ignore[assignment]  # one channel has one of each
        if channels == 3 and crop_mode == "center":
            self.eval_transform = CentreCrop(size, resize_size)
        else:
            read = partial(_pixels, size=resize_size, gray=channels == 1, squash=crop_mode == "squash")
            self.eval_transform = v2.Compose([read, v2.CenterCrop(size), v2.Normalize(list(mean), list(std))])

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> NoReturn:
        """Raise, because an exported network takes images of one size.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"image_size={image_size}: an exported network takes images of one size, {self.input_size[-1]}."
        )

    def _load(self, split: Split) -> dict[Split, Source]:
        raise FileNotFoundError(f"an exported network has no {split} images: give images to predict.")


class ExportedDetectionData(DetectionDataModule):
    """Images of any size to predict with an exported detector.

    Args:
        mean: of the channels, on the scale from 0 to 255.
        std: standard deviation of the channels, on the scale from 0 to 255.
        classes: their names.
        exif: whether images are turned by their EXIF orientation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], classes: list[str], exif: bool) -> None:
        super().__init__(batch_size=8, num_workers="auto", predict_dir=tempfile.gettempdir())
        self.classes = classes
        self.exif = exif
        self.mean, self.std = tuple(mean), tuple(std)
        self.input_size = (len(mean), 224, 224)
        self.eval_transform = BoxTransform(mean, std)

    def _load(self, split: Split) -> dict[Split, Source]:
        raise FileNotFoundError(f"an exported network has no {split} images: give images to predict.")


def _pixels(image: Image.Image, size: int, gray: bool, squash: bool) -> Tensor:
    """Resize an image (bilinear, antialiased), and return its float32 pixels on the 0-255 scale."""
    image = to_rgb(image)
    if gray:
        image = image.convert("L").convert("F")
    short = min(image.size)
    width, height = (size, size) if squash else (round(side * size / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels: Tensor = v2.functional.pil_to_tensor(image)
    return pixels.float()
