"""ResNet in the four variants that Bag of Tricks compares: A, B, C and D.

Paper: https://arxiv.org/abs/1812.01187, section 4 and table 5. The network is timm's, with its state-dict keys, so
weights can be exchanged with timm. One caveat: A and B have the same tensors under the same keys and differ only in
strides. A checkpoint of A therefore loads into B without an error, and gives wrong outputs.
"""

from typing import Any, Literal

import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from lit_tricks.models.norms import NORMS, Norm
from lit_tricks.models.separable import make_separable
from lit_tricks.models.spp import SpatialPyramidPool2d
from lit_tricks.models.weights import load_weights
from lit_tricks.utils.arguments import choice, flag, integer, number, path

__all__ = ["resnet"]

MOST_CHANNELS = 10**7  # of images, or classes

_STAGES: dict[int, tuple[Any, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(
    depth: Literal[18, 34, 50, 101, 152] = 50,
    variant: Literal["A", "B", "C", "D"] = "D",
    num_classes: int = 1000,
    *,
    in_chans: int = 3,
    small_input: bool = False,
    width: float = 1.0,
    output_stride: Literal[8, 16, 32] = 32,
    norm: Norm = "batch",
    separable: bool = False,
    pool: Literal["avg", "max", "avgmax", "spp"] = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    zero_init_last: bool = False,
    init: Literal["timm", "xavier"] = "timm",
    weights: str | None = None,
) -> nn.Module:
    """Build a ResNet with the tweaks of [He et al., 2019](https://arxiv.org/abs/1812.01187), each on top of the last.

    It maps images ``(N, in_chans, H, W)`` of any size to logits ``(N, num_classes)``. At depth 50, 1000 classes and
    224 pixels, with the multiply-adds of batch norm counted:

    =======  =====================================================  ==========  ======================
    variant  change                                                 parameters  multiply-adds per image
    =======  =====================================================  ==========  ======================
    A        the original: stride in the first 1x1 of a bottleneck  25.557 M    3.88 G
    B        stride in the 3x3 (timm's and torchvision's ResNet)    25.557 M    4.11 G
    C        stem of three 3x3 (32, 32, 64 channels) for the 7x7    25.576 M    4.35 G
    D        shortcuts shrink by average pooling, then 1x1          25.576 M    4.35 G
    =======  =====================================================  ==========  ======================

    At depths 18 and 34 the blocks have no 1x1, so A and B are the same network.

    Args:
        depth: number of layers with weights: 18 and 34 have basic blocks, the others bottlenecks.
        variant: "A", "B", "C" or "D", as in the table.
        num_classes: number of logits, at least 1.
        in_chans: channels of the images, at least 1.
        small_input: for images of about 32 pixels: no max-pooling, and a stem of stride 1 (one 3x3 for A and B, the
            deep stem for C and D). The last feature map has 1/8 of the image's side instead of 1/32. 8 pixels is the
            least that still shrinks in every stage.
        width: factor on all channel counts, a multiple of 1/32 above 0. Parameters and multiply-adds grow with its
            square; 0.125 makes a net for tests, 2 makes every layer twice as wide.
        output_stride: side of the image divided by the side of the last feature map. 16 and 8 dilate the last stages
            instead of using strides, as usual in segmentation. With ``small_input`` the strides are a quarter of these.
        norm: "batch"; "group", over groups of 32 channels, or of all of fewer; "layer", over all channels of an image;
            "instance", over each channel of an image; or "frozen_batch", which keeps what ``weights`` have.
            "layer" and "group" do not depend on the batch, for batches of a few images.
        separable: replace each 3x3 convolution of the blocks by a depthwise one and a 1x1, as
            [MobileNet](https://arxiv.org/abs/1704.04861) does (see `make_separable`).
        pool: what comes before the classifier: mean, maximum, or half the sum of both, over the feature map; or "spp",
            the maxima of a pyramid of bins, 50 times as many features (see `SpatialPyramidPool2d`).
        drop_rate: of the features before the classifier, in [0, 1).
        drop_path_rate: of the last residual branch, in [0, 1); those before it in proportion to their depth
            ([stochastic depth](https://arxiv.org/abs/1603.09382)).
        zero_init_last: start the last batch norm of every block at gamma 0, so that every block starts as its shortcut.
            This is timm's default. Here the default is off, because the trick `ZeroGamma` does this and logs it.
        init: "timm" is Kaiming normal over the fan-out for convolutions and torch's own for the classifier; "xavier" is
            the paper's, Xavier uniform for both and biases 0. Batch norm starts at gamma 1 and beta 0 in both.
        weights: file or timm name of weights to start from, see `load_weights`; None starts at random.

    Returns:
        A timm ``ResNet``; its parts are ``conv1``, ``bn1``, ``layer1`` to ``layer4`` and ``fc``.

    Raises:
        ValueError: for an argument outside of its range.
        FileNotFoundError: if ``weights`` is a file that does not exist.
        RuntimeError: if ``weights`` belongs to another architecture.

    Example:
        ``resnet(50, "D", num_classes=10, small_input=True)`` for CIFAR-10.
    """
    choice("resnet", "depth", depth, tuple(_STAGES))
    choice("resnet", "variant", variant, ("A", "B", "C", "D"))
    choice("resnet", "output_stride", output_stride, (8, 16, 32))
    choice("resnet", "norm", norm, tuple(NORMS))
    choice("resnet", "pool", pool, ("avg", "max", "avgmax", "spp"))
    choice("resnet", "init", init, ("timm", "xavier"))
    fix = "0 drops nothing."
    drop_rate = number("resnet", "drop_rate", drop_rate, "[0, 1)", fix)
    drop_path_rate = number("resnet", "drop_path_rate", drop_path_rate, "[0, 1)", fix)
    flag("resnet", "small_input", small_input)
    flag("resnet", "separable", separable)
    flag("resnet", "zero_init_last", zero_init_last)
    weights = path("resnet", "weights", weights, "Give a file, or a name of timm.", "a random start")
    require_positive("resnet", num_classes=num_classes, in_chans=in_chans)
    width = number("resnet", "width", width, "(0, 64]", "Give a multiple of 1/32, as 0.125, 0.5 or 2.")
    stem_width = _stem_width(width)

    block, layers = _STAGES[depth]
    # Any: timm's annotations are narrower than the accepted values, and differ between versions.
    net: Any = ResNet(
        block,
        layers,
        num_classes=num_classes,
        in_chans=in_chans,
        stem_type="deep",  # timm's plain stem has 64 channels at any width, so A and B get their stem below
        stem_width=stem_width,
        channels=tuple(2 * stem_width * factor for factor in (1, 2, 4, 8)),
        avg_down=variant == "D",
        output_stride=output_stride,
        norm_layer=NORMS[norm],
        global_pool="avg" if pool == "spp" else pool,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        zero_init_last=zero_init_last,
    )
    if variant in "AB":
        kernel, stride = (3, 1) if small_input else (7, 2)
        net.conv1 = nn.Conv2d(in_chans, 2 * stem_width, kernel, stride=stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    elif small_input:
        net.conv1[0].stride = (1, 1)
    if variant == "A":
        for module in net.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    if separable:
        make_separable(net)
    if pool == "spp":
        net.global_pool = SpatialPyramidPool2d()
        net.fc = nn.Linear(net.num_features * net.global_pool.feat_mult(), num_classes)
    if small_input:
        net.maxpool = nn.Identity()
        for info in net.feature_info:  # what heads read the strides of the feature maps from
            info["reduction"] = max(1, info["reduction"] // 4)
    if init == "xavier":
        _init_xavier(net)
    model: nn.Module = net
    if weights is not None:
        load_weights(model, weights)
    return model


def require_positive(owner: str, **counts: int) -> None:
    """Raise ValueError for the first of the named numbers that is not an integer of at least 1."""
    for name, value in counts.items():
        integer(owner, name, value, 1, "Give the number that your data has.", MOST_CHANNELS)


def _stem_width(width: float) -> int:
    """Channels of the first convolution of the deep stem; every other channel count is a multiple of it."""
    channels = 32 * width
    if not channels >= 1 or channels % 1 != 0:
        raise ValueError(
            f"width={width!r} would give the stem {channels:g} channels: choose a multiple of 1/32, as 0.125, 0.5 or 2"
        )
    return int(channels)


def _init_xavier(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # the fans count the kernel's area, as in the paper's MXNet
            if module.bias is not None:
                nn.init.zeros_(module.bias)
