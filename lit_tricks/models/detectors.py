"""Faster R-CNN and RetinaNet of torchvision on any backbone, with a smooth L1 loss of any width.

Papers: [Ren et al., 2015](https://arxiv.org/abs/1506.01497), [Lin et al., 2017](https://arxiv.org/abs/1612.03144) for
the feature pyramid, [Lin et al., 2017](https://arxiv.org/abs/1708.02002) for RetinaNet and the focal loss. One caveat:
both resize what they are given to ``min_size``, so that objects have another size for the anchors than in the image.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from lit_tricks.models.backbone import Backbone
from lit_tricks.models.weights import nearest

__all__ = ["Pyramid", "faster_rcnn", "retinanet"]

# What the functions here set. torchvision takes any other name in silence.
_OURS = {"backbone", "num_classes", "image_mean", "image_std", "kwargs", "head", "proposal_matcher"}
_OURS |= {"rpn_anchor_generator", "anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor"}


class Pyramid(nn.Module):
    """A feature pyramid on a backbone, for torchvision ([Lin et al., 2017](https://arxiv.org/abs/1612.03144)).

    Args:
        body: the backbone.
        channels: of every map of the pyramid.
        extra: makes further, coarser maps, each with twice the stride of the last.
        extra_maps: how many.

    Attributes:
        out_channels: ``channels``.
        strides: side of the image divided by the side of each map.

    Raises:
        ValueError: for a backbone whose maps do not shrink.
    """

    def __init__(self, body: Backbone, channels: int, extra: nn.Module, extra_maps: int) -> None:
        super().__init__()
        if sorted(set(body.strides)) != body.strides:
            raise ValueError(
                f"the feature maps of {type(body.net).__name__} have strides {body.strides}, and the maps of a feature "
                "pyramid must rise: give levels=1, or a backbone that shrinks its maps, such as resnet or convnext_tiny"
            )
        self.body = body
        self.fpn: nn.Module = FeaturePyramidNetwork(body.channels, channels, extra_blocks=extra)
        self.out_channels = channels
        last = body.strides[-1]
        self.strides: list[int] = [*body.strides, *(last * 2**i for i in range(1, extra_maps + 1))]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps ``(N, channels, H / stride, W / stride)`` of images, fine to coarse, by name."""
        maps = self.body(images)
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict((str(level), each) for level, each in enumerate(maps)))
        return pyramid


def faster_rcnn(
    body: Backbone,
    num_classes: int,
    *,
    channels: int = 256,
    head_width: int = 1024,
    anchor_scale: float = 8.0,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    beta: float | None = None,
    in_chans: int = 3,
    **model_args: Any,
) -> FasterRCNN:
    """Build a Faster R-CNN for images that are already normalized.

    Args:
        body: the backbone.
        num_classes: classes of objects, without the background; their labels are 1 to ``num_classes``.
        channels: of the feature pyramid.
        head_width: width of the two layers that process a region.
        anchor_scale: side of an anchor divided by the stride of its feature map.
        aspect_ratios: aspect ratios of the anchors, height divided by width.
        beta: error at which the smooth L1 losses change from quadratic to linear; 0 is L1, None is torchvision's 1/9.
        in_chans: channels of the images.
        **model_args: further arguments of ``torchvision.models.detection.FasterRCNN``.

    Raises:
        ValueError: for an argument that it does not have.
    """
    _check_arguments(FasterRCNN, model_args)
    pyramid = Pyramid(body, channels, LastLevelMaxPool(), 1)
    sizes = tuple((stride * anchor_scale,) for stride in pyramid.strides)
    pool = MultiScaleRoIAlign([str(level) for level in range(len(body.strides))], output_size=7, sampling_ratio=2)
    net = FasterRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 7**2, head_width),
        box_predictor=FastRCNNPredictor(head_width, num_classes + 1),
        **_transform_args(body, in_chans),
        **model_args,
    )
    if beta is not None:  # otherwise all of it is torchvision's
        net.rpn.__class__, net.rpn.beta = _RPN, beta
        net.roi_heads.__class__, net.roi_heads.beta = _RoIHeads, beta
    return net


def retinanet(
    body: Backbone,
    num_classes: int,
    *,
    channels: int = 256,
    anchor_scale: float = 4.0,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    beta: float | None = None,
    in_chans: int = 3,
    **model_args: Any,
) -> RetinaNet:
    """Build a RetinaNet for images that are already normalized.

    Its focal loss has the paper's alpha 0.25 and gamma 2. Unlike Faster R-CNN it has no background: labels are 0 to
    ``num_classes - 1``.

    Args:
        body: the backbone.
        num_classes: classes of objects.
        channels: of the feature pyramid, and of the heads.
        anchor_scale: side of the smallest anchor over the stride of its feature map; there are three, a third of an
            octave apart.
        aspect_ratios: aspect ratios of the anchors, height divided by width.
        beta: error at which the smooth L1 loss changes from quadratic to linear; 0 and None are torchvision's L1. The
            paper names smooth L1, and its published code has 0.11.
        in_chans: channels of the images.
        **model_args: further arguments of ``torchvision.models.detection.RetinaNet``.

    Raises:
        ValueError: for an argument that it does not have.
    """
    _check_arguments(RetinaNet, model_args)
    pyramid = Pyramid(body, channels, LastLevelP6P7(channels, channels), 2)
    sizes = tuple(tuple(stride * anchor_scale * 2 ** (i / 3) for i in range(3)) for stride in pyramid.strides)
    net = RetinaNet(
        pyramid,
        num_classes,
        anchor_generator=AnchorGenerator(sizes, (tuple(aspect_ratios),) * len(sizes)),
        **_transform_args(body, in_chans),
        **model_args,
    )
    for part in (net.head.classification_head.conv, net.head.regression_head.conv):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):  # torchvision's 0.01 lets the signal of fewer channels than 256 vanish
                nn.init.normal_(layer.weight, std=0.01 * math.sqrt(256 / channels))
    if beta is not None:
        head = net.head.regression_head
        head.__class__, head.beta = _RegressionHead, beta
    return net


def box_loss(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Smooth L1, summed: ``x^2 / (2 beta)`` where ``|x| < beta``, else ``|x| - beta / 2``."""
    return F.smooth_l1_loss(deltas, targets, reduction="sum", beta=beta)


class _RPN(RegionProposalNetwork):  # type: ignore[misc]  # torchvision is untyped
    """With a ``beta``: torchvision's has 1/9 written into this method."""

    beta: float

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.where(torch.cat(each))[0] for each in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        boxes = box_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], self.beta)
        scores = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        return scores, boxes / sampled.numel()


class _RoIHeads(RoIHeads):  # type: ignore[misc]
    """With a ``beta``: torchvision's calls a function that has 1/9 written into it."""

    beta: float

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, _, labels, targets = self.select_training_samples(proposals, targets)
        found = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        logits, deltas = found[0], found[1].unflatten(1, (-1, 4))
        label = torch.cat(labels)
        positive = torch.where(label > 0)[0]
        boxes = box_loss(deltas[positive, label[positive]], torch.cat(targets)[positive], self.beta)
        return [], {"loss_classifier": F.cross_entropy(logits, label), "loss_box_reg": boxes / label.numel()}


class _RegressionHead(RetinaNetRegressionHead):  # type: ignore[misc]
    """With a ``beta``: torchvision's has L1."""

    beta: float

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: Any) -> Tensor:
        losses = []
        for target, deltas, anchor, matched in zip(
            targets, head_outputs["bbox_regression"], anchors, matched_idxs, strict=True
        ):
            found = torch.where(matched >= 0)[0]
            wanted = self.box_coder.encode_single(target["boxes"][matched[found]], anchor[found])
            losses.append(box_loss(deltas[found], wanted, self.beta) / max(1, len(found)))
        return torch.stack(losses).mean()


def _transform_args(body: Backbone, in_chans: int) -> dict[str, Any]:
    """Return arguments of torchvision's resizing: no second normalization, and sides that fit every feature map."""
    return {
        "image_mean": [0.0] * in_chans,
        "image_std": [1.0] * in_chans,
        "size_divisible": max(32, body.strides[-1]),
    }


def _check_arguments(cls: type, arguments: dict[str, Any]) -> None:
    known = [name for name in inspect.signature(cls).parameters if name not in _OURS]
    for name in arguments:
        if name not in known:
            hint = nearest(name, known) or f"; it takes {', '.join(known)}"
            raise ValueError(f"{name!r} is no argument of {cls.__name__}{hint}")
