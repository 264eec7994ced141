"""Base of the data modules of objects, and the transform of images with boxes."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from lit_tricks.data.checked_arguments import check_range, check_statistics
from lit_tricks.data.color import MEAN, STD, Triple
from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.data.detection.boxes import OnBadBox, Target
from lit_tricks.data.samples import JointSamples, Samples
from lit_tricks.data.transforms import to_rgb
from lit_tricks.utils.arguments import choice, number

__all__ = ["BoxTransform", "DetectionDataModule", "DetectionFolders", "zoom"]

VISIBLE = 0.25  # part of a box that must be left for its object to count


class DetectionDataModule(ImageDataModule):
    """Base: batches are (images, targets), two lists of the same length, since images differ in size.

    An image is float32 (C, H, W), normalized by ``mean`` and ``std``; the model is not to do so again. A target is a
    dict with ``boxes``, float32 (n, 4): (x0, y0, x1, y1) in pixels; ``labels``, int64 (n,), from 1 to ``num_classes``,
    as 0 is the background; and ``iscrowd``, int64 (n,), 1 where an object is neither to be found nor missed (a crowd,
    or difficult), which training images are without. An image without objects has n = 0, and is kept.

    Images are not resized here: the model does so, and gives its boxes in the pixels of the image.
    """

    sample_type: type[Samples] = JointSamples
    eval_transform: Any
    train_transform: Any

    @staticmethod
    def collate(samples: list[Any]) -> tuple[list[Tensor], list[Any]]:
        """Two lists: images, and their targets or paths."""
        images, others = zip(*samples, strict=True)
        return list(images), list(others)

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> NoReturn:
        """Raise, because a crop would lose objects, and the model sets the size for detection.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} gives whole images, and the model resizes them: set its min_size for another size"
        )

    def _set_transforms(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        flip: float,
        scale: tuple[float, float],
        on_bad_box: str,
    ) -> None:
        """Check what the data modules have in common, and set the transforms."""
        mean, std = check_statistics(self, mean, std)
        flip, scale = number(self, "flip", flip, "[0, 1]", "It is a probability."), check_range(self, "scale", scale)
        choice(self, "on_bad_box", on_bad_box, ("raise", "skip"))
        self.mean, self.std = tuple(mean), tuple(std)
        self.input_size: tuple[int, int, int] = (len(mean), 224, 224)  # any; the model resizes
        self.eval_transform = BoxTransform(mean, std)
        self.train_transform = BoxTransform(mean, std, flip, (float(scale[0]), float(scale[1])))


class DetectionFolders(DetectionDataModule, ABC):
    """Base of the data modules whose images and boxes are files.

    Args:
        batch_size: images in a batch of one process, at least 1.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        flip: probability that a training image is flipped from left to right, 0 to 1.
        scale: range of the factor by which a training picture grows or shrinks in its frame, as (0.5, 2.0).
        on_bad_box: "raise" stops at a box outside of its image, or without an area; "skip" leaves such boxes out, and
            logs how many. COCO has some.
        mean: mean of the channels R, G, B on the 0-255 scale, as in the training of the backbone's weights.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        flip: float = 0.5,
        scale: tuple[float, float] = (1.0, 1.0),
        on_bad_box: OnBadBox = "raise",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self.on_bad_box: OnBadBox = on_bad_box
        self._set_transforms(mean, std, flip, scale, on_bad_box)


class BoxTransform:
    """From a PIL image, and its target if there is one, to a normalized tensor and the target that goes with it.

    Args:
        mean: of the channels on the 0-255 scale; one is gray, three are R, G, B.
        std: their standard deviation.
        flip: probability of a horizontal flip.
        scale: factor on the picture, drawn uniformly from this range. It keeps its size: what sticks out is cut at a
            random place, and what is missing is black.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], flip: float = 0.0, scale: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.mean: list[float] = list(mean)
        self.std: list[float] = list(std)
        self.flip = flip
        self.scale = scale

    def __call__(self, image: Image.Image, target: Target | None = None) -> Any:
        """Transform an image, or an image and its target."""
        image = to_rgb(image) if image.mode not in ("RGB", "L") else image
        pixels = F.pil_to_tensor(image.convert("L" if len(self.mean) == 1 else "RGB"))
        if target is not None:
            target = dict(target)
            if self.flip and torch.rand(()) < self.flip:
                pixels, target["boxes"] = F.horizontal_flip(pixels), F.horizontal_flip(target["boxes"])
            if self.scale != (1.0, 1.0):
                factor = float(torch.empty(()).uniform_(*self.scale))
                pixels, target = zoom(pixels, target, factor, torch.rand(2).tolist())
            target["boxes"] = target["boxes"].as_subclass(Tensor)
        normal = F.normalize(pixels.float(), self.mean, self.std)
        return normal if target is None else (normal, target)


def zoom(pixels: Tensor, target: Target, factor: float, place: Sequence[float]) -> tuple[Tensor, Target]:
    """Make a picture larger or smaller, in a frame of the same size. Objects of which little is left are left out.

    Args:
        pixels: (C, H, W), uint8.
        target: with boxes as tv_tensors.
        factor: on the sides.
        place: where the frame lies in the picture or, of a smaller picture, where that lies in the frame: from the
            upper end (0) to the lower one (1), and from the left to the right.
    """
    height, width = pixels.shape[-2:]
    size = [max(1, round(side * factor)) for side in (height, width)]
    top, left = (round((new - old) * at) for new, old, at in zip(size, (height, width), place, strict=True))
    boxes = F.resize(target["boxes"], size)
    whole = _area(boxes)
    pixels = F.crop(F.resize(pixels, size, antialias=True), top, left, height, width)
    x0, y0, x1, y1 = (boxes.as_subclass(Tensor) - torch.tensor([left, top, left, top])).unbind(1)
    cut = torch.stack([x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)], 1)
    kept = _area(cut) >= VISIBLE * whole
    canvas = BoundingBoxes(cut[kept], format="XYXY", canvas_size=(height, width))
    return pixels, {name: each[kept] for name, each in target.items() if name != "boxes"} | {"boxes": canvas}


def _area(boxes: Tensor) -> Tensor:
    x0, y0, x1, y1 = boxes.as_subclass(Tensor).unbind(1)
    return (x1 - x0) * (y1 - y0)
