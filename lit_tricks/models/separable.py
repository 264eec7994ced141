"""Replace convolutions by depthwise separable ones ([Howard et al., 2017](https://arxiv.org/abs/1704.04861))."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["make_separable", "separable_conv"]


def separable_conv(conv: nn.Conv2d) -> nn.Sequential:
    """A depthwise convolution and a 1x1 convolution that replace ``conv`` at 1/out_channels + 1/k^2 of its cost.

    Kernel, stride, padding and dilation come from ``conv``. Its weights are not used. There is no layer between the
    two, as in [Xception](https://arxiv.org/abs/1610.02357). The network's norm and activation follow as before.
    """
    same = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    settings: dict[str, Any] = {name: getattr(conv, name) for name in same}
    depthwise = nn.Conv2d(conv.in_channels, conv.in_channels, groups=conv.in_channels, bias=False, **settings)
    pointwise = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    for part in (depthwise, pointwise):
        nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="linear")
    return nn.Sequential(depthwise, pointwise)


def make_separable(net: nn.Module) -> nn.Module:
    """Replace, in place, each convolution that has a kernel above 1x1, no groups, and as its input a feature map.

    The stem (``conv1``, ``stem``, ``features.0``) is not changed: its input is the image, and a depthwise convolution
    would not mix the few channels of an image.

    Args:
        net: a network of torch's ``Conv2d`` layers, in the order in which they run.

    Returns:
        The same network.

    Raises:
        ValueError: if it has no such convolution.
    """
    found = {name: part for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}
    stem = next(iter(found), "").split(".")[0]
    spatial = {
        name: conv
        for name, conv in found.items()
        if name.split(".")[0] != stem and max(conv.kernel_size) > 1 and conv.groups == 1
    }
    if not spatial:
        raise ValueError(f"{type(net).__name__} has no convolution to make separable behind its stem")
    for name, conv in spatial.items():
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, separable_conv(conv))
    return net
