"""Feature maps of a classification network, for what is built on them: segmentation, detection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lit_tricks.models.factory import create_model
from lit_tricks.models.weights import load_weights
from lit_tricks.utils.arguments import integer, integers, path

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """A backbone: the feature maps of a network, fine to coarse, without its head.

    Args:
        name: "resnet" (see `resnet`), or any timm model with feature maps.
        levels: number of maps, from the coarsest; or a list of maps, counted from the finest. In a ResNet, 0 is the
            stem before max-pooling, and 1 to 4 are the stages.
        in_chans: channels of the images.
        weights: weights of a classifier to start from (see `load_weights`): a timm name, or a checkpoint of a
            ``Classifier``.
        **model_args: arguments of the network, such as ``depth=50, variant="D", output_stride=8``. They must fit
            ``weights``.

    Attributes:
        net: the network.
        channels: number of channels per map.
        strides: side of the image divided by the side of the map, per map.

    Raises:
        ValueError: for an unknown network, a network without feature maps, or levels that the network does not have.

    Example:
        ``Backbone("resnet", weights="classifier.ckpt", depth=50, variant="D")``
    """

    def __init__(
        self,
        name: str = "resnet",
        levels: int | Sequence[int] = 4,
        in_chans: int = 3,
        weights: str | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__()
        weights = path(self, "weights", weights, "Give a file, or a name of timm.", "a random start")
        fix = "Give the number of maps from the coarsest, or a list of maps."
        if isinstance(levels, Sequence):
            integers(self, "levels", levels, 0, fix)
        else:
            integer(self, "levels", levels, 1, fix, 100)
        # with a classifier, since the weights have one
        net: Any = create_model(name, 1000, in_chans=in_chans, **model_args)
        info = getattr(net, "feature_info", None)
        if not info or not hasattr(net, "forward_intermediates"):
            raise ValueError(
                f"model {name!r} gives no feature maps, which segmentation and detection are built on: choose another, "
                "such as resnet, resnet50d, convnext_tiny or mobilenetv3_large_100"
            )
        known = range(len(info))
        chosen = list(known[max(0, len(info) - levels) :]) if isinstance(levels, int) else list(levels)
        if not chosen or sorted(set(chosen)) != chosen or not set(chosen) <= set(known):
            raise ValueError(
                f"levels={levels!r} must be one or more rising numbers of the {len(info)} maps of {name!r}"
            )
        if weights:
            load_weights(net, weights)
        self.levels = chosen
        self.channels: list[int] = [int(info[level]["num_chs"]) for level in chosen]
        self.strides: list[int] = [int(info[level]["reduction"]) for level in chosen]
        net.prune_intermediate_layers(
            chosen, prune_norm=True, prune_head=True
        )  # what is not used would get no gradient
        self.net: nn.Module = net

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps ``(N, channels[i], H / strides[i], W / strides[i])`` of images ``(N, in_chans, H, W)``."""
        net: Any = self.net
        maps: list[Tensor] = net.forward_intermediates(images, indices=self.levels, intermediates_only=True)
        return maps
