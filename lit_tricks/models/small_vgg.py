"""A small VGG for images of about 32 pixels and runs of about ten epochs.

Paper: https://arxiv.org/abs/2404.00498. One caveat: it has no residual connections, and is no network for long runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tricks.models.resnet import require_positive
from lit_tricks.models.weights import load_weights
from lit_tricks.utils.arguments import number, path

__all__ = ["small_vgg"]

_CHANNELS = (64, 256, 256)
_PATCH = 2  # side of the filters of the stem


def small_vgg(
    num_classes: int = 10,
    *,
    in_chans: int = 3,
    width: float = 1.0,
    bn_momentum: float = 0.4,
    logit_scale: float = 1 / 9,
    weights: str | None = None,
) -> nn.Module:
    """Build a network of seven convolutions for short runs on small images ([Jordan, 2024](https://arxiv.org/abs/2404.00498)).

    It maps images ``(N, in_chans, H, W)`` of 9 pixels or more to logits ``(N, num_classes)``. The stem has filters of 2
    by 2 pixels, twice as many as a patch has values, for the trick ``WhitenedStem``. Three stages follow, each with two
    3 by 3 convolutions, and a pooling that halves the sides. The first filters of each convolution start as the
    identity. Norm layers have trained biases and no trained scale, and the activation is GELU. The classifier gets the
    maximum over all pixels. At 10 classes and 32 pixels it has 1.97 M parameters and 0.12 G multiply-adds per image.

    Args:
        num_classes: number of logits, at least 1.
        in_chans: channels of the images, at least 1.
        width: factor on the channels of the stages, which are 64, 256 and 256: a multiple of 1/64, above 0. Parameters
            and multiply-adds grow with its square. The stem keeps its filters.
        bn_momentum: share of a batch in the running statistics of norm layers, in (0, 1]. 0.4 suits runs of some
            hundred steps, and torch's 0.1 long runs. At 1 only the last batch counts.
        logit_scale: factor on the logits, above 0. The learning rate of the classifier counts by its square, and the
            initial logits are in proportion to it. A small value lets one large learning rate train both the classifier
            and the biases of norm layers.
        weights: file of weights to start from, see ``load_weights``. None starts at random.

    Returns:
        A module with the parts ``stem``, ``layer1`` to ``layer3`` and ``fc``.

    Raises:
        ValueError: for an argument out of its range.
        FileNotFoundError: if ``weights`` is a file that does not exist.
        RuntimeError: if ``weights`` belongs to another architecture.

    Example:
        ``small_vgg(num_classes=10)`` for CIFAR-10.
    """
    require_positive("small_vgg", num_classes=num_classes, in_chans=in_chans)
    fix = "Give a multiple of 1/64, as 0.25, 1 or 1.5."
    width = number("small_vgg", "width", width, "(0, 64]", fix)
    bn_momentum = number("small_vgg", "bn_momentum", bn_momentum, "(0, 1]", "0.4 suits short runs, and 0.1 long ones.")
    logit_scale = number("small_vgg", "logit_scale", logit_scale, "(0, 1000]", "1 does not scale the logits.")
    weights = path("small_vgg", "weights", weights, "Give a file, or a name of timm.", "a random start")
    if width * 64 % 1:
        raise ValueError(f"small_vgg(width={width!r}): the first stage would have {64 * width:g} channels. {fix}")
    channels = [round(width * number) for number in _CHANNELS]
    net = _SmallVGG(num_classes, in_chans, channels, bn_momentum, logit_scale)
    if weights is not None:
        load_weights(net, weights)
    return net


class _SmallVGG(nn.Module):
    def __init__(
        self, num_classes: int, in_chans: int, channels: list[int], bn_momentum: float, logit_scale: float
    ) -> None:
        super().__init__()
        filters = 2 * in_chans * _PATCH**2
        self.num_features = channels[-1]
        self.stem = nn.Conv2d(in_chans, filters, _PATCH, bias=False)
        self.layer1 = _Stage(filters, channels[0], bn_momentum)
        self.layer2 = _Stage(channels[0], channels[1], bn_momentum)
        self.layer3 = _Stage(channels[1], channels[2], bn_momentum)
        self.fc = _ScaledLinear(channels[2], num_classes, logit_scale)

    def get_classifier(self) -> nn.Module:
        """Return the layer that gives the logits, as timm's models do."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, in_chans, H, W)."""
        features = self.layer3(self.layer2(self.layer1(F.gelu(self.stem(images)))))
        logits: Tensor = self.fc(F.adaptive_max_pool2d(features, 1).flatten(1))
        return logits


class _Stage(nn.Module):
    """Two convolutions, each with its norm layer, and a pooling after the first convolution."""

    def __init__(self, in_channels: int, channels: int, bn_momentum: float) -> None:
        super().__init__()
        self.conv1 = _IdentityConv2d(in_channels, channels)
        self.norm1 = _bias_norm(channels, bn_momentum)
        self.conv2 = _IdentityConv2d(channels, channels)
        self.norm2 = _bias_norm(channels, bn_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps (N, channels, H // 2, W // 2)."""
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))  # pooled first, so that the norm has fewer values
        return F.gelu(self.norm2(self.conv2(x)))


class _IdentityConv2d(nn.Conv2d):
    """A 3 x 3 convolution whose first filters start as the identity: each gives one input channel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        """Draw the filters, and set the first of them to the identity."""
        super().reset_parameters()
        with torch.no_grad():
            nn.init.dirac_(self.weight[: self.in_channels])


class _ScaledLinear(nn.Linear):
    """A linear layer whose weight counts times a fixed factor."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_features)."""
        return F.linear(x, self.weight * self.scale, self.bias)


def _bias_norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    """Return a BatchNorm whose scale stays 1: the filters before it have one already."""
    norm = nn.BatchNorm2d(channels, momentum=momentum)
    norm.weight.requires_grad = False
    return norm
