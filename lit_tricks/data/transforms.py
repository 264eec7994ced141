"""The image pipeline of "Bag of Tricks" ([He et al., 2019](https://arxiv.org/abs/1812.01187), section 2.1).

Every transform takes a PIL image and gives a float32 tensor of shape (3, H, W). Random transforms draw from torch's
global CPU generator, so the caller sets the seed. Mean, standard deviation and PCA noise are on the 0-255 RGB scale, as
in the paper.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

__all__ = [
    "InputTransform",
    "PCANoise",
    "Transform",
    "eval_transform",
    "pca_noise",
    "to_pixels",
    "to_rgb",
    "train_transform",
]

Transform = Callable[[Image.Image], Tensor]

# Of the RGB values of the ImageNet training set on the 0-255 scale; one eigenvector a column, rows are R, G, B.
EIGENVALUES = (55.46, 4.794, 1.148)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def pca_noise(image: Tensor, alpha: Tensor) -> Tensor:
    """Shift the colors of an image along the principal components of ImageNet's colors.

    Each channel c gets ``sum_k eigenvector[c, k] * alpha[k] * eigenvalue[k]``, the same for all pixels
    ([Krizhevsky et al., 2012](https://papers.nips.cc/paper/4824)). Nothing is clipped.

    Args:
        image: floating RGB values on the 0-255 scale, shape (..., 3, H, W).
        alpha: one coefficient for each component, the largest component first, shape (..., 3).

    Returns:
        A new tensor in the shape and type of ``image``.
    """
    vectors = torch.tensor(EIGENVECTORS, dtype=image.dtype, device=image.device)
    values = torch.tensor(EIGENVALUES, dtype=image.dtype, device=image.device)
    shift = (alpha.to(vectors) * values) @ vectors.T
    return image + shift[..., None, None]


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any image into 8-bit RGB: gray is repeated, CMYK and palettes are converted, alpha is dropped.

    16-bit gray keeps its upper 8 bits. The EXIF orientation is not applied, as in torchvision.

    Raises:
        ValueError: for 32-bit pixels, whose range is not known.
    """
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no fixed range: save the image with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "transparency" in image.info:  # a palette or a color key: PIL warns when it goes to RGB in one step
        image = image.convert("RGBA")
    return image.convert("RGB")


class InputTransform:
    """Convert an image to the input of a model, as in validation: float32 (C, H, W), normalized.

    Args:
        transform: of evaluation, from a PIL image to a tensor.
        read: reads an image file.
        exif: whether an image is rotated by its EXIF orientation. ``read`` does so itself.
    """

    def __init__(self, transform: Transform, read: Callable[[str], Image.Image], exif: bool) -> None:
        self.transform = transform
        self.read = read
        self.exif = exif

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Transform a PIL image, or the image in a file."""
        if not isinstance(image, Image.Image):
            image = self.read(os.fspath(image))
        elif self.exif:
            image = ImageOps.exif_transpose(image)
        return self.transform(image)

    def __repr__(self) -> str:
        return f"InputTransform({self.transform}, exif={self.exif})"


def to_pixels(image: Image.Image) -> Tensor:
    """Turn an 8-bit image into a float32 tensor on the 0-255 scale, shape (channels, H, W)."""
    pixels: Tensor = v2.functional.pil_to_tensor(image)
    return pixels.float()


def train_transform(
    image_size: int,
    augmentation: Literal["paper", "basic"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Transform:
    """Make the random transform of the training images.

    Args:
        image_size: side of the square result in pixels.
        augmentation: "basic" is a crop of 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, and a horizontal
            flip for every second image; "paper" adds jitter of brightness, saturation and hue, and PCA noise.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
    """
    steps: list[Callable[..., object]] = [
        to_rgb,
        v2.RandomResizedCrop(image_size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    if augmentation == "paper":
        # The paper draws a coefficient c from U[0.6, 1.4]. Its framework, MXNet, turns the hue by (c - 1) * pi radians,
        # torchvision by factor * 2 * pi: hence half of 0.4 for the hue.
        steps.append(v2.ColorJitter(brightness=0.4, saturation=0.4, hue=0.2))
    steps.append(to_pixels)
    if augmentation == "paper":
        steps.append(PCANoise(0.1))
    steps.append(v2.Normalize(mean, std))
    compose: Transform = v2.Compose(steps)
    return compose


def eval_transform(
    image_size: int, resize_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Transform:
    """Make the transform of validation images: short side to ``resize_size``, center crop, normalize.

    Args:
        image_size: side of the square result in pixels.
        resize_size: length of the short side before the crop, in pixels (antialiased bilinear).
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
    """
    resize = v2.Resize(resize_size, antialias=True)
    compose: Transform = v2.Compose([to_rgb, resize, v2.CenterCrop(image_size), to_pixels, v2.Normalize(mean, std)])
    return compose


class PCANoise:
    """Add PCA noise with one random draw per image (see ``pca_noise``).

    Args:
        std: standard deviation of the three coefficients, at least 0; 0 changes nothing, the paper has 0.1.
    """

    def __init__(self, std: float = 0.1) -> None:
        self.std = std

    def __call__(self, image: Tensor) -> Tensor:
        """Add the noise to an image on the 0-255 scale, shape (3, H, W)."""
        return pca_noise(image, self.draw())

    def __repr__(self) -> str:
        return f"PCANoise(std={self.std})"

    def draw(self) -> Tensor:
        """Draw the three coefficients of one image."""
        return torch.randn(3) * self.std
