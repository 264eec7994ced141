"""A network that gives a map of classes: a backbone, a decoder, and in training perhaps an auxiliary head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from lit_tricks.models.backbone import Backbone
from lit_tricks.models.decoders import Decoder, DecoderName, create_decoder

__all__ = ["SegmentationNet"]


class SegmentationNet(nn.Module):
    """A backbone and a decoder, whose logits are resized to the image, bilinearly.

    Images of any size are padded at the right and below, with 0, to what the decoder can take, and the logits cropped.

    Args:
        backbone: gives the feature maps.
        decoder: name of the decoder, see ``create_decoder``.
        num_classes: number of logits.
        aux: whether an FCN head on the second last feature map gives additional logits in training, as in GluonCV and
            [PSPNet](https://arxiv.org/abs/1612.01105).

    Raises:
        ValueError: if the backbone does not have the feature maps.
    """

    def __init__(self, backbone: Backbone, decoder: DecoderName, num_classes: int, aux: bool = False) -> None:
        super().__init__()
        channels: Sequence[int] = backbone.channels
        if aux and len(channels) < 2:
            raise ValueError("an auxiliary head needs a second feature map, and the backbone gives one")
        self.backbone = backbone
        self.aux: nn.Module | None = FCNHead(channels[-2], num_classes) if aux else None
        self.decoder: Decoder = create_decoder(decoder, channels, backbone.strides, num_classes)

    @property
    def classifiers(self) -> list[str]:
        """Names of the layers that compute the logits: the last convolution of each head."""
        return [
            [f"{head}.{name}" for name, layer in part.named_modules() if isinstance(layer, nn.Conv2d)][-1]
            for head, part in (("aux", self.aux), ("decoder", self.decoder))
            if part is not None
        ]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``(N, num_classes, H, W)`` of images ``(N, C, H, W)``; in training the auxiliary head's, too."""
        height, width = images.shape[-2:]
        bottom, right = (-side % self.decoder.multiple for side in (height, width))
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        features = self.backbone(images)

        def at_size(logits: Tensor) -> Tensor:
            resized = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
            return resized[..., :height, :width]

        aux = at_size(self.aux(features[-2])) if self.aux is not None and self.training else None
        return at_size(self.decoder(features)), aux
