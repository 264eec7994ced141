"""MixUp: training on convex combinations of two images and of their labels (Zhang et al., 2018).

One caveat: mixup needs longer runs. "Bag of Tricks" (section 5.4) trains 200 epochs with mixup and 120 epochs without.
At the usual alpha of 0.2 most images are nearly unmixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

from lit_tricks.callbacks.soft_targets.mixing import Mixing, beta
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying
from lit_tricks.utils.arguments import flag
from lit_tricks.utils.batch import Path

__all__ = ["MixUp", "mixup"]


def mixup(x: Tensor, lam: Tensor, permutation: Tensor) -> Tensor:
    """Return ``lam * x + (1 - lam) * x[permutation]``, in the dtype of ``x``. Integers are rounded.

    Args:
        x: inputs (N, ...), floats or uint8.
        lam: share in [0, 1] that each item keeps of itself, (N,) or a single one. At 1 nothing changes.
        permutation: partners of the items, (N,).

    Example:
        >>> x = torch.tensor([[0.0], [10.0]])
        >>> mixup(x, torch.tensor([0.75]), torch.tensor([1, 0]))
        tensor([[2.5000],
                [7.5000]])
    """
    exact = x if x.dtype in (torch.float32, torch.float64) else x.float()
    mixed = exact[permutation].lerp_(exact, lam.to(exact).view(-1, *[1] * (x.dim() - 1)))
    return (mixed if x.is_floating_point() else mixed.round_()).to(x.dtype)


class MixUp(Mixing):
    """Mix pairs of training images and their labels ([Zhang et al., 2018](https://arxiv.org/abs/1710.09412)).

    An image becomes ``lambda * image + (1 - lambda) * partner``. The partner is a random image of the same
    batch. The loss is ``lambda`` times the loss for the image's label, plus ``1 - lambda`` times the loss for the
    partner's label. Lambda is drawn from Beta(alpha, alpha). Training metrics get the label with the larger share.
    With CutMix in the same run, every batch is mixed by one of the two. The choice is random, with their ``prob`` as
    relative weights.

    Cost: one pass over the images, and the loss for a second label. Use it for long runs of large networks. Leave it
    out of short runs and for networks that underfit. Training losses and accuracies are not comparable with runs
    without mixing.

    Args:
        alpha: parameter of the Beta distribution, from 0.001 to 1000. Near 0 images stay as they are. 0.2 is usual for
            ImageNet. 1 draws lambda uniformly. Large values give lambdas near 0.5.
        per_sample: whether to draw one lambda per image. False draws one per batch.
        prob: share of the batches that are mixed, in (0, 1]. With CutMix in the same run all batches are mixed, and
            ``prob`` is a relative weight.
        inputs: names or positions of the tensors to mix, such as ``[image, age]`` or ``[0, 2]``. None: all images, or
            all float matrices if there are no images. Inputs that are not mixed are logged.
        start: share of the run after which batches are mixed, in [0, ``end``). 0 is the first step.
        end: share of the run after which no batch is mixed, in (``start``, 1]. At 0.9 the network ends on a tenth of
            the run with real images. 1 is the end of the run.
        schedule: "constant" mixes from ``start`` to ``end``. "rise" mixes a share of the batches that rises linearly
            from 0 at ``start`` to ``prob`` at ``end``, and stays there. "fall" mixes by ``prob`` until ``start``, and a
            share that falls to 0 at ``end``.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when training starts, if the strength varies and the length of the run is unknown; in the first
            training step, if the batch has no supported input or target, or no loss used the target.

    Example:
        ``- {class_path: MixUp, init_args: {alpha: 0.2}}``
    """

    def __init__(
        self,
        alpha: float = 0.2,
        per_sample: bool = False,
        prob: float = 1.0,
        inputs: Sequence[str | int] | None = None,
        start: float = 0.0,
        end: float = 1.0,
        schedule: Literal["constant", "rise", "fall"] = "constant",
    ) -> None:
        super().__init__(alpha, prob, inputs, start, end, schedule)
        self.per_sample: bool = flag(self, "per_sample", per_sample)

    def mix(
        self, inputs: dict[Path, Tensor], target: SoftTarget, permutation: Tensor, generator: Generator
    ) -> tuple[dict[Path, Tensor], SoftTarget, float]:
        """Mix all inputs by the same lambdas."""
        n = len(target)
        drawn = beta(self.alpha, n if self.per_sample else 1, generator)
        lam = drawn.float().expand(n).contiguous().to(target.device, non_blocking=True)
        labels = target.parts["value"]
        mixed = {path: mixup(x, lam, permutation) for path, x in inputs.items()}
        return mixed, carrying(labels, target.spec, labels[permutation], lam), float(drawn.mean())
