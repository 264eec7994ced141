"""Decoders from the feature maps of a backbone to a map of logits: FCN, ASPP, PPM, FPN and PAN.

FCN and ASPP come from torchvision. The others come from segmentation_models_pytorch, which is imported when one of them
is built.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

__all__ = ["Decoder", "DecoderName", "create_decoder", "levels_of"]

DecoderName = Literal["fcn", "aspp", "ppm", "fpn", "pan"]

INSTALL = 'pip install "lit-tricks[segmentation]"'
PYRAMID = ("fpn", "pan")  # all stages of a backbone; the other decoders use only the last stage


class Decoder(nn.Module):
    """A map of classes from feature maps.

    Args:
        body: from the feature maps, fine to coarse, to logits.
        multiple: of which the sides of the image must be, in pixels.

    Attributes:
        multiple: as given.
    """

    def __init__(self, body: nn.Module, multiple: int = 1) -> None:
        super().__init__()
        self.body = body
        self.multiple = multiple

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits ``(N, num_classes, h, w)``, of the sides of the finest of the feature maps that the decoder uses.

        Raises:
            ValueError: if it trains on a single image, and would normalize one number by itself.
        """
        if self.training and len(features[-1]) == 1 and any(map(_normalizes_a_mean, self.body.modules())):
            raise ValueError(
                "this decoder normalizes the mean of each image over the batch, which is one image here: train with a "
                "batch_size of at least 2, or with the decoder fcn or fpn"
            )
        logits: Tensor = self.body(features)
        return logits


def levels_of(name: DecoderName) -> int:
    """Return the number of feature maps that a decoder uses, from the coarsest.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in get_args(DecoderName):
        raise ValueError(f"decoder={name!r} is unknown: choose one of {', '.join(map(repr, get_args(DecoderName)))}")
    return 4 if name in PYRAMID else 1


def create_decoder(name: DecoderName, channels: Sequence[int], strides: Sequence[int], num_classes: int) -> Decoder:
    """Build a decoder for the feature maps of a backbone.

    ====  =====================================================================  ======================================
    name  layers                                                                 source
    ====  =====================================================================  ======================================
    fcn   3x3 convolution to a quarter of the channels, dropout 0.1, classifier  torchvision's ``FCNHead``, as in Bag
          ([Long et al., 2015](https://arxiv.org/abs/1411.4038))                 of Tricks, section 6.2 (GluonCV)
    aspp  a 1x1, three dilated 3x3 and the image's mean, in 256 channels         torchvision's ``DeepLabHead``
          ([DeepLabv3](https://arxiv.org/abs/1706.05587))
    ppm   means over 1, 2, 3 and 6 bins, and the map, a 3x3 convolution to a     smp's ``PSPModule``, whose bin 1 has no
          quarter of the channels, dropout 0.1                                   batch norm
          ([PSPNet](https://arxiv.org/abs/1612.01105))
    fpn   a top-down pyramid of 256 channels; its levels, in 128, are added      smp's ``FPNDecoder``
          ([Kirillov et al., 2019](https://arxiv.org/abs/1901.02446))
    pan   pyramid attention on the coarsest map, global attention on the others  smp's ``PANDecoder``, 32 channels: its
          ([Li et al., 2018](https://arxiv.org/abs/1805.10180))                  gate is batch norm and a sigmoid
    ====  =====================================================================  ======================================

    The dilations of ``aspp`` are the paper's: 6, 12, 18 at stride 16, 12, 24, 36 at stride 8, and in proportion for
    others. ``fpn`` needs maps that halve from each to the next.

    Args:
        name: name of the decoder. All except "fcn" and "aspp" need the extra "segmentation".
        channels: channels per feature map, fine to coarse: at least ``levels_of(name)`` maps.
        strides: strides of the feature maps.
        num_classes: number of logits, at least 1.

    Raises:
        ValueError: for an unknown name, too few feature maps, or strides that the decoder does not support.
        ImportError: if segmentation_models_pytorch is needed and missing.
    """
    levels = levels_of(name)
    if len(channels) < levels or len(channels) != len(strides):
        raise ValueError(
            f"decoder={name!r} takes {levels} feature maps with their strides, and the backbone gives "
            f"{len(channels)}: choose another backbone, or the decoder fcn or aspp, which take one"
        )
    channels, strides = list(channels)[-levels:], list(strides)[-levels:]
    if name == "fcn":
        return Decoder(_OfLast(FCNHead(channels[-1], num_classes)))
    if name == "aspp":
        rates = [max(1, rate * 16 // strides[-1]) for rate in (6, 12, 18)]
        return Decoder(_OfLast(DeepLabHead(channels[-1], num_classes, rates)))
    if name == "ppm":
        return Decoder(_OfLast(_ppm(channels[-1], num_classes)))
    if name == "pan":
        # the pyramid halves the coarsest map three times
        body = _smp("pan").PANDecoder([0, 0, *channels], encoder_depth=5, decoder_channels=32)
        return Decoder(_WithHead(body, nn.Conv2d(32, num_classes, 3, padding=1)), strides[-1] * 8)
    if any(2 * fine != coarse for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(
            f"decoder='fpn' doubles its maps, and the strides of the backbone are {strides}: leave output_stride at "
            "32, so that each is twice the one before, or choose another decoder"
        )
    body = _smp("fpn").FPNDecoder(channels, encoder_depth=5)
    return Decoder(_WithHead(body, nn.Conv2d(body.out_channels, num_classes, 1)), strides[-1])


class _OfLast(nn.Module):
    """Layers on the coarsest feature map."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: list[Tensor]) -> Any:
        return self.layers(features[-1])


class _WithHead(nn.Module):
    """A decoder of smp, which takes what its own encoders give, and a classifier."""

    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head

    def forward(self, features: list[Tensor]) -> Any:
        # theirs begin with the image and the stem, of which these decoders make no use
        return self.head(self.decoder([features[0], features[0], *features]))


def _ppm(channels: int, num_classes: int) -> nn.Module:
    inner = channels // 4
    return nn.Sequential(
        _smp("pspnet").PSPModule(channels, sizes=(1, 2, 3, 6)),
        nn.Conv2d(channels + channels // 4 * 4, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Conv2d(inner, num_classes, 1),
    )


def _normalizes_a_mean(layer: nn.Module) -> bool:
    """Return whether a decoder applies batch norm to maps of one pixel per image."""
    if not isinstance(layer, nn.Sequential) or not isinstance(layer[0], nn.AdaptiveAvgPool2d):
        return False
    norms = (norm for norm in layer.modules() if isinstance(norm, nn.BatchNorm2d))
    return layer[0].output_size == 1 and any(norm.training for norm in norms)


def _smp(decoder: str) -> Any:
    """Return the module of a decoder of segmentation_models_pytorch."""
    try:
        return importlib.import_module(f"segmentation_models_pytorch.decoders.{decoder}.decoder")
    except ImportError as error:
        raise ImportError(
            f"this decoder needs segmentation_models_pytorch: {INSTALL}; or take fcn or aspp, which do without"
        ) from error
