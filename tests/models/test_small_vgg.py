"""The small VGG against a network built of torch's layers, and its initialization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tricks.models import create_model, small_vgg

LAYERS = ("layer1", "layer2", "layer3")


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def norm(x: Tensor, bias: Tensor) -> Tensor:
    """Normalize by the statistics of the batch, in float64."""
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() + bias.view(1, -1, 1, 1)


def reference(net: Any, x: Tensor, logit_scale: float) -> Tensor:
    """The network of https://arxiv.org/abs/2404.00498, section 3, written out."""
    x = F.gelu(F.conv2d(x, net.stem.weight))
    for layer in (getattr(net, name) for name in LAYERS):
        x = F.max_pool2d(F.conv2d(x, layer.conv1.weight, padding=1), 2)
        x = F.gelu(norm(x, layer.norm1.bias))
        x = F.gelu(norm(F.conv2d(x, layer.conv2.weight, padding=1), layer.norm2.bias))
    return logit_scale * F.linear(x.amax((2, 3)), net.fc.weight)


def test_logits_and_gradients_equal_a_network_that_is_written_out():
    torch.manual_seed(0)
    net: Any = small_vgg(7, width=1 / 16, logit_scale=0.25).double()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    x = images(4, 3, 32, 32).double()
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    ours, theirs = net(x), reference(net, x, 0.25)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), parameters) for y in (ours, theirs)))


def test_size_at_full_width_is_the_papers():
    net: Any = small_vgg(10)
    filters = 3 * 24 * 4 + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    assert trained == filters + 2 * (64 + 256 + 256) + 10 * 256
    assert [getattr(net, name).conv2.out_channels for name in LAYERS] == [64, 256, 256]
    assert net.stem.weight.shape == (24, 3, 2, 2)


def test_first_filters_are_the_identity():
    net: Any = small_vgg(10, width=0.5)
    x = images(2, 24, 6, 6)
    torch.testing.assert_close(net.layer1.conv1(x)[:, :24], x)
    assert net.layer1.conv1.weight[24:].abs().min() > 0
    y = images(2, 128, 4, 4)
    torch.testing.assert_close(net.layer3.conv2(y), y)


def test_norm_layers_train_a_bias_only_and_follow_the_momentum():
    net: Any = small_vgg(10, width=1 / 16, bn_momentum=0.25)
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    assert [(part.weight.requires_grad, part.bias.requires_grad, part.momentum) for part in norms] == 6 * [
        (False, True, 0.25)
    ]
    x = images(8, 3, 16, 16)
    net(x)
    inputs = F.max_pool2d(F.conv2d(F.gelu(net.stem(x)), net.layer1.conv1.weight, padding=1), 2)
    torch.testing.assert_close(net.layer1.norm1.running_mean, 0.25 * inputs.mean((0, 2, 3)))


@pytest.mark.parametrize(("in_chans", "size"), [(1, 9), (4, 33), (3, 64)])
def test_channels_and_sizes(in_chans, size):
    net: Any = create_model("small_vgg", 5, in_chans=in_chans, width=1 / 32)
    assert net.stem.out_channels == 8 * in_chans
    assert net.eval()(images(2, in_chans, size, size)).shape == (2, 5)
    assert net.get_classifier() is net.fc


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0.3}, r"small_vgg\(width=0.3\): the first stage would have 19.2 channels"),
        ({"width": 0}, r"small_vgg\(width=0\)"),
        ({"bn_momentum": 1.5}, r"small_vgg\(bn_momentum=1.5\)"),
        ({"logit_scale": 0}, r"small_vgg\(logit_scale=0\)"),
        ({"num_classes": 0}, r"small_vgg\(num_classes=0\)"),
        ({"weights": "missing.pt"}, "no such file"),
    ],
)
def test_odd_arguments_are_rejected(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        small_vgg(**arguments)


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(ValueError, match="'widht' is no argument of model 'small_vgg'; did you mean 'width'"):
        create_model("small_vgg", 10, widht=1)
