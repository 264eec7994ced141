"""CutMix: training on images with a rectangle of another one, and labels mixed by area (Yun et al., 2019).

One caveat: for a dense target the mask is cut as the image is, so that its labels stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from lit_tricks.callbacks.soft_targets.mixing import Mixing, beta
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying
from lit_tricks.utils.batch import Path, describe

__all__ = ["CutMix", "cutmix", "cutmix_box"]

Box = tuple[int, int, int, int]


def cutmix_box(height: int, width: int, lam: float, center: tuple[int, int]) -> Box:
    """Return top, bottom, left and right of a rectangle with area ``1 - lam``, clipped to the image.

    The rectangle has the proportions of the image.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        lam: share of the image to keep, in [0, 1]. The clipped rectangle keeps more, see ``kept_area``.
        center: row and column of the rectangle's center.

    Example:
        >>> cutmix_box(8, 8, lam=0.75, center=(4, 4))
        (2, 6, 2, 6)
        >>> cutmix_box(8, 8, lam=0.75, center=(0, 4))
        (0, 2, 2, 6)
    """
    side = (1 - lam) ** 0.5
    down, across = int(height * side) // 2, int(width * side) // 2  # half of it
    row, column = center
    return max(row - down, 0), min(row + down, height), max(column - across, 0), min(column + across, width)


def kept_area(height: int, width: int, box: Box) -> float:
    """Return the share of the image outside the box: the weight of an image's own label.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        box: top, bottom, left and right, as ``cutmix_box`` returns them.

    Example:
        >>> kept_area(8, 8, (0, 2, 2, 6))
        0.875
    """
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (height * width)


def cutmix(x: Tensor, permutation: Tensor, box: Box) -> Tensor:
    """Return ``x`` with the pixels of ``x[permutation]`` in the box.

    Args:
        x: images or masks (N, ..., H, W).
        permutation: partners of the items, (N,).
        box: top, bottom, left and right, as ``cutmix_box`` returns them.

    Example:
        >>> x = torch.stack([torch.zeros(2, 3), torch.ones(2, 3)])
        >>> cutmix(x, torch.tensor([1, 0]), (0, 1, 1, 3))[0]
        tensor([[0., 1., 1.],
                [0., 0., 0.]])
    """
    top, bottom, left, right = box
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x[..., top:bottom, left:right][permutation]
    return mixed


class CutMix(Mixing):
    """Paste a rectangle of another training image, and mix the labels by area ([Yun et al., 2019](https://arxiv.org/abs/1905.04899)).

    The rectangle has the image's proportions, a random center and the area ``1 - lambda``, with lambda from
    Beta(alpha, alpha). The labels are mixed by the area that lies within the image. The partner is a random
    image of the same batch. Masks, targets of shape (N, H, W), are cut like the images. Training metrics get the label
    with the larger share. With MixUp in the same run, every batch is mixed by one of the two. The choice is
    random, with their ``prob`` as relative weights.

    Cost: one copy of the images, and the loss for a second label. Use it for long runs of large networks. Leave it
    out if a small part of the image decides the class. Training losses and accuracies are not comparable with plain
    runs.

    Args:
        alpha: parameter of the Beta distribution, above 0. Near 0 images are whole or replaced. 1 is uniform and
            usual. Large values cut half of each image.
        prob: share of the batches that are mixed, in (0, 1]. The paper uses 1 for ImageNet and 0.5 for CIFAR.
            With MixUp in the same run all batches are mixed, and ``prob`` is a relative weight.
        inputs: names or positions of the images to cut, such as ``[image, depth]`` or ``[0, 2]``. None: all images.
            Inputs that are not cut are logged.
        start: share of the run after which batches are mixed, in [0, ``end``). 0 is the first step.
        end: share of the run after which no batch is mixed, in (``start``, 1]. At 0.9 the network ends on a tenth of
            the run with real images. 1 is the end of the run.
        schedule: "constant" mixes from ``start`` to ``end``. "rise" mixes a share of the batches that rises linearly
            from 0 at ``start`` to ``prob`` at ``end``, and stays there. "fall" mixes by ``prob`` until ``start``, and a
            share that falls to 0 at ``end``.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when training starts, if the strength varies and the length of the run is unknown; in the first
            training step, if the batch has no images of one size or no supported target, or no loss used the target.

    Example:
        ``- {class_path: CutMix, init_args: {alpha: 1.0}}``
    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        inputs: Sequence[str | int] | None = None,
        start: float = 0.0,
        end: float = 1.0,
        schedule: Literal["constant", "rise", "fall"] = "constant",
    ) -> None:
        super().__init__(alpha, prob, inputs, start, end, schedule)

    def mix(
        self, inputs: dict[Path, Tensor], target: SoftTarget, permutation: Tensor, generator: Generator
    ) -> tuple[dict[Path, Tensor], SoftTarget, float]:
        """Cut all inputs, and a dense target, by the same box."""
        labels = target.parts["value"]
        dense = labels.dim() > 2
        sizes = {tuple(x.shape[-2:]) if x.dim() > 2 else () for x in (*inputs.values(), *[labels] * dense)}
        if len(sizes) > 1 or () in sizes:
            seen = ", ".join(map(describe, (*inputs.values(), labels)))
            raise RuntimeError(f"CutMix cuts images (N, ..., H, W) of one size, also the masks, and found {seen}.")
        [(height, width)] = sizes
        lam = float(beta(self.alpha, 1, generator))
        row, column = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
        box = cutmix_box(height, width, lam, (row, column))
        lam = kept_area(height, width, box)
        mixed = {path: cutmix(x, permutation, box) for path, x in inputs.items()}
        if dense:
            return mixed, carrying(cutmix(labels, permutation, box), target.spec), lam
        share = torch.full((len(labels),), lam, device=labels.device)
        return mixed, carrying(labels, target.spec, labels[permutation], share), lam
