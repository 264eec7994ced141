"""All color transforms of an image as one 3 x 4 matrix: a linear map of each pixel, and a shift.

Brightness multiplies. Saturation blends with the gray value (0.299, 0.587, 0.114). Hue rotates the chroma by an angle
in YIQ, the color space of NTSC television. PCA noise and normalization shift. All of these are linear, because values
are not clipped, as in MXNet, the paper's framework. All except the noise commute, so their order, which is random in
the paper, makes no difference. PIL and torchvision clip after each step and rotate the hue in HSV, which changes colors
differently for the same angle.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_tricks.data.transforms import EIGENVALUES, EIGENVECTORS

__all__ = ["MEAN", "STD", "Jitter", "Triple", "apply_matrices", "normalization"]

log: logging.Logger = logging.getLogger(__name__)

Triple = tuple[float, float, float]

MEAN: Triple = (123.68, 116.779, 103.939)  # the paper's, of R, G, B in ImageNet
STD: Triple = (58.393, 57.12, 57.375)

TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])  # as in MXNet
FROM_YIQ = np.linalg.inv(TO_YIQ)  # MXNet has it rounded to three digits, so that no turn at all is not quite nothing
NOISE = np.array(EIGENVECTORS) * EIGENVALUES
CHUNK = 4  # images whose floats stay in the cache of a core


class Jitter:
    """Jitter of brightness, saturation and hue, and PCA noise, as in the paper.

    Args:
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale.
        strength: coefficients are drawn from U[1 - strength, 1 + strength]; the hue turns by (coefficient - 1) * pi.
        noise: standard deviation of the three coefficients of the PCA noise.
    """

    def __init__(self, mean: Triple, std: Triple, strength: float = 0.4, noise: float = 0.1) -> None:
        self.mean = mean
        self.std = std
        self.strength = strength
        self.noise = noise

    def __repr__(self) -> str:
        return f"Jitter(strength={self.strength}, noise={self.noise})"

    def draw(self, generator: np.random.Generator) -> npt.NDArray[np.float64]:
        """Draw for one image: coefficients of brightness, saturation, hue, and the three of the noise."""
        coefficients = generator.uniform(1 - self.strength, 1 + self.strength, 3)
        return np.concatenate((coefficients, self.noise * generator.standard_normal(3)))

    def matrices(self, draws: npt.NDArray[np.float64]) -> Tensor:
        """Make the matrices (N, 3, 4), float32, from draws (N, 6)."""
        brightness, saturation, hue = draws[:, :3].T[:, :, None, None]
        gray = np.broadcast_to(TO_YIQ[0], (3, 3))
        angle = (hue[:, 0, 0] - 1) * math.pi
        turn = np.zeros((len(draws), 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
        turn[:, 2, 1] = np.sin(angle)
        turn[:, 1, 2] = -turn[:, 2, 1]
        colors = FROM_YIQ @ turn @ TO_YIQ @ (brightness * (saturation * np.eye(3) + (1 - saturation) * gray))
        shift = draws[:, 3:] @ NOISE.T - self.mean
        matrices = np.concatenate((colors, shift[:, :, None]), axis=2) / np.reshape(self.std, (3, 1))
        return torch.from_numpy(matrices.astype(np.float32))


def normalization(mean: Triple, std: Triple) -> Tensor:
    """Make the matrix (1, 3, 4) that subtracts the mean and divides by the standard deviation."""
    jitter = Jitter(mean, std, 0, 0)
    return jitter.matrices(jitter.draw(np.random.default_rng(0))[None])


def apply_matrices(images: Tensor, matrices: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Turn the pixels of images by their matrices.

    Args:
        images: uint8, shape (N, 3, H, W).
        matrices: float32, shape (N, 3, 4), or (1, 3, 4) for all.
        dtype: of the result.
        channels_last: whether the result has this memory format, or is contiguous.

    Returns:
        A new tensor in the shape of ``images``: ``matrix[:, :3] @ pixel + matrix[:, 3]``, not clipped.
    """
    matrices = matrices.to(images.device)
    if images.device.type == "cpu":
        result = _in_chunks(images, matrices)
    else:
        result = _kernel(images.device.type)(images, matrices, dtype, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return result.to(dtype).contiguous(memory_format=layout)


def _in_chunks(images: Tensor, matrices: Tensor) -> Tensor:
    """Apply ``_pointwise`` to a few images at a time, so that intermediate values stay in the cache."""
    count, _, height, width = images.shape
    matrices = matrices.expand(count, 3, 4)
    result = _room((count, 3, height * width))
    between = torch.empty(CHUNK, 3, height, width)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        floats = between[: stop - start].copy_(images[start:stop]).flatten(2)
        part = matrices[start:stop]
        torch.baddbmm(part[:, :, 3:], part[:, :, :3], floats, out=result[start:stop])
    return result.view(images.shape)


_Array = npt.NDArray[np.float32]


def _references(arrays: list[_Array], index: int) -> int:
    return sys.getrefcount(arrays[index])


_rooms: list[_Array] = []
_FREE = _references([np.empty(0, np.float32)], 0)  # array types without a tensor type, in this Python


def _room(shape: tuple[int, ...]) -> Tensor:
    """Make an uninitialized tensor, if possible of the memory of an earlier one that nothing refers to any more.

    Memory that is new takes as long as the work itself: the system maps and clears its pages one by one.
    """
    size = math.prod(shape)
    for index in range(len(_rooms)):
        if _rooms[index].size == size and _references(_rooms, index) == _FREE:
            return torch.from_numpy(_rooms[index]).view(shape)
    _rooms[:] = [*_rooms[-1:], np.empty(size, np.float32)]
    return torch.from_numpy(_rooms[-1]).view(shape)


def _pointwise(images: Tensor, matrices: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Apply matrices to pixels. Compiled into one kernel, which reads and writes each pixel once."""
    red, green, blue = images.float().unsqueeze(1).unbind(2)
    m = matrices[:, :, :, None, None]
    result = m[:, :, 0] * red + m[:, :, 1] * green + m[:, :, 2] * blue + m[:, :, 3]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return result.to(dtype, memory_format=layout)


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    """Compile for a kind of device when it is first used; the same, step by step, where that fails."""
    compiled: Callable[..., Tensor] = torch.compile(_pointwise, dynamic=True)
    broken = False

    def call(*args: Any) -> Tensor:
        nonlocal broken
        if not broken:
            try:
                return compiled(*args)
            except Exception as error:  # no Triton, no C compiler, a device that is too old, ...
                broken = True
                log.warning("colors on %s: torch.compile failed, continuing without it (%s)", device, error)
        return _pointwise(*args)

    return call
