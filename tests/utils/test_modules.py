"""Pooling, norms, dropout and separable convolutions of a ResNet, and the feature maps of any network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from lit_tricks.models import Backbone, SpatialPyramidPool2d, create_model, load_weights, make_separable, resnet
from lit_tricks.models.norms import NORMS
from lit_tricks.models.separable import separable_conv

TINY: dict[str, Any] = {"depth": 18, "width": 1 / 32, "num_classes": 10}


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 6), (7, 7), (13, 10)])
def test_spp_is_the_maxima_of_its_bins(size: tuple[int, int]) -> None:
    x = features(2, 3, *size)
    want = []
    for bins in (1, 2, 3, 6):
        rows, columns = (
            [(i * side // bins, -(-(i + 1) * side // bins)) for i in range(bins)] for side in size
        )  # from the floor to the ceiling
        for image_channel in [(slice(None), channel) for channel in range(3)]:
            want += [x[image_channel][:, a:b, c:d].amax((1, 2)) for a, b in rows for c, d in columns]
    pooled = SpatialPyramidPool2d()(x)
    assert pooled.shape == (2, 3 * 50)
    torch.testing.assert_close(pooled, torch.stack(want, 1), rtol=0, atol=0)


@pytest.mark.parametrize("bins", [(), (0,), (1, -2), (1.5,)])
def test_spp_without_a_bin(bins: Any) -> None:
    with pytest.raises(ValueError, match="bins="):
        SpatialPyramidPool2d(bins)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "spp"])
def test_pooling_before_the_classifier(pool: Any) -> None:
    net: Any = resnet(**TINY, pool=pool).eval()
    x = features(2, 3, 64, 96)
    maps = net.forward_features(x)
    mean, most = maps.mean((2, 3)), maps.amax((2, 3))
    want = {"avg": mean, "max": most, "avgmax": (mean + most) / 2, "spp": SpatialPyramidPool2d()(maps)}[pool]
    torch.testing.assert_close(net(x), net.fc(want))


def test_spp_takes_any_size_and_learns() -> None:
    net = resnet(**TINY, pool="spp", small_input=True)
    for size in (8, 32, 47):
        net(features(2, 3, size, size)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_weights_of_one_pooling_do_not_fit_another(tmp_path: Any) -> None:
    torch.save(resnet(**TINY, pool="spp").state_dict(), tmp_path / "spp.pt")
    load_weights(resnet(**TINY, pool="spp"), str(tmp_path / "spp.pt"))
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        load_weights(resnet(**TINY), str(tmp_path / "spp.pt"))


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "axes"),
    [("batch", (0, 2, 3)), ("layer", (1, 2, 3)), ("instance", (2, 3)), ("group", "groups")],
)
def test_statistics_of_a_norm_in_float64(norm: Any, axes: Any) -> None:
    channels = 64
    x = 3 * features(4, channels, 5, 7) + 2
    layer: Any = NORMS[norm](channels)
    assert layer.weight.shape == layer.bias.shape == (channels,)
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    values = x.double().numpy()
    if axes == "groups":
        values, axes = values.reshape(4, 32, channels // 32, 5, 7), (2, 3, 4)
    want = (values - values.mean(axes, keepdims=True)) / np.sqrt(values.var(axes, keepdims=True) + 1e-5)
    weight, bias = (part.detach().double().numpy()[:, None, None] for part in (layer.weight, layer.bias))
    want = want.reshape(x.shape) * weight + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", list(NORMS))
def test_a_network_with_a_norm_learns(norm: Any) -> None:
    net = resnet(**TINY, norm=norm, zero_init_last=True)
    net(features(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    kinds = {type(part) for part in net.modules() if "Norm" in type(part).__name__}
    assert kinds == {type(NORMS[norm](32))}


def test_groups_of_few_channels() -> None:
    assert [NORMS["group"](channels).num_groups for channels in (1, 8, 24, 64)] == [1, 8, 8, 32]


def test_frozen_batch_norm_keeps_the_weights_that_it_starts_from(tmp_path: Any) -> None:
    torch.manual_seed(0)
    source = resnet(**TINY)
    source(features(4, 3, 64, 64))
    torch.save(source.state_dict(), tmp_path / "source.pt")
    net = resnet(**TINY, norm="frozen_batch", weights=str(tmp_path / "source.pt"))
    x = features(2, 3, 64, 64)
    torch.testing.assert_close(net(x), source.eval()(x), rtol=1e-4, atol=1e-5)
    before = {key: value.clone() for key, value in net.state_dict().items() if "bn" in key}
    torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    net(x).sum().backward()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert not any("bn" in name for name, _ in net.named_parameters())


# --- separable convolutions -------------------------------------------------------------------------------------------


def test_a_separable_convolution_is_the_product_of_its_two_kernels() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, bias=True)
    pair: Any = separable_conv(conv)
    x = features(2, 4, 9, 9)
    kernel = pair[1].weight[:, :, 0, 0, None, None] * pair[0].weight[:, 0][None]
    want = nn.functional.conv2d(x, kernel, pair[1].bias, stride=2, padding=1)
    torch.testing.assert_close(pair(x), want, rtol=1e-5, atol=1e-6)
    weights = sum(part.weight.numel() for part in pair)
    assert weights / conv.weight.numel() == pytest.approx(1 / 6 + 1 / 9)


def test_a_separable_resnet_has_no_other_convolution_behind_its_stem() -> None:
    plain, net = (
        resnet(depth=50, width=1 / 8, num_classes=10),
        resnet(depth=50, width=1 / 8, num_classes=10, separable=True),
    )
    x = features(2, 3, 64, 64)
    assert [tuple(m.shape) for m in net.forward_intermediates(x, intermediates_only=True)] == [
        tuple(m.shape) for m in plain.forward_intermediates(x, intermediates_only=True)
    ]
    convs = {name: part for name, part in net.named_modules() if isinstance(part, nn.Conv2d)}
    assert all(c.groups == c.in_channels or c.kernel_size == (1, 1) for n, c in convs.items() if "conv1." not in n[:6])
    assert [convs[f"conv1.{i}"].groups for i in (0, 3, 6)] == [1, 1, 1]
    net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_at_the_start_a_separable_convolution_keeps_the_variance() -> None:
    torch.manual_seed(0)
    out = separable_conv(nn.Conv2d(256, 256, 3, padding=1, bias=False))(torch.randn(2, 256, 16, 16))
    assert out.var().item() == pytest.approx(1, abs=0.15)  # less at the edges, which see zeros


def test_nothing_to_make_separable() -> None:
    with pytest.raises(ValueError, match="behind its stem"):
        make_separable(timm.create_model("mobilenetv1_100", num_classes=10))


# --- dropping ---------------------------------------------------------------------------------------------------------


def test_drop_path_is_that_of_torchvision() -> None:
    net: Any = resnet(**TINY, drop_path_rate=0.5)
    rates = [part.drop_prob for part in net.modules() if type(part).__name__ == "DropPath"]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 8)[8 - len(rates) :])
    torch.manual_seed(0)
    ours = net.layer4[-1].drop_path(torch.ones(1000, 1, 1, 1))
    torch.manual_seed(0)
    torch.testing.assert_close(ours, StochasticDepth(0.5, "row")(torch.ones(1000, 1, 1, 1)))


def test_dropout_before_the_classifier() -> None:
    net: Any = resnet(**TINY, drop_rate=0.5)
    nn.init.ones_(net.fc.weight)
    x = features(2, 3, 32, 32)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": "sum"}, "pool='sum'.*'spp'"),
        ({"norm": "bn"}, "norm='bn'.*'frozen_batch'"),
        ({"output_stride": 4}, "output_stride=4.*8, 16, 32"),
        ({"drop_rate": 1.0}, r"drop_rate=1.0.*in \[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate=-0.1.*in \[0, 1\)"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resnet(**TINY, **arguments)


# --- feature maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet", {"depth": 18, "width": 1 / 32}),
        ("resnet", {"depth": 50, "width": 1 / 32, "variant": "A", "output_stride": 8}),
        ("resnet", {"depth": 18, "width": 1 / 32, "small_input": True, "output_stride": 16, "pool": "spp"}),
        ("mobilenetv3_small_050", {}),
        ("regnetx_002", {}),
        ("vit_tiny_patch16_224", {"img_size": 64}),
    ],
)
def test_backbone_returns_maps_of_its_strides(name: str, arguments: dict[str, Any]) -> None:
    backbone = Backbone(name, **arguments)
    maps = backbone(features(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == backbone.channels
    assert [64 // m.shape[2] for m in maps] == backbone.strides
    torch.stack([m.mean() for m in maps]).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("levels", [1, 2, (0, 4), (3,)])
def test_chosen_levels_equal_those_of_whole_network(levels: Any) -> None:
    torch.manual_seed(0)
    backbone = Backbone(depth=18, width=1 / 32, levels=levels).eval()
    torch.manual_seed(0)
    whole: Any = resnet(18, width=1 / 32).eval()
    x = features(1, 3, 64, 64)
    every = whole.forward_intermediates(x, intermediates_only=True)
    chosen = range(5)[-levels:] if isinstance(levels, int) else levels
    for found, want in zip(backbone(x), [every[level] for level in chosen], strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize(("depth", "output_stride"), [(18, 16), (50, 16), (50, 8)])
def test_a_dilated_network_sees_what_the_plain_one_sees(depth: Any, output_stride: Any) -> None:
    """Dilation keeps the receptive field where strides are removed: every n-th output equals the plain network's."""
    torch.manual_seed(0)
    plain: Any = resnet(depth, "B", width=1 / 32, num_classes=10).eval()
    dilated: Any = resnet(depth, "B", width=1 / 32, num_classes=10, output_stride=output_stride).eval()
    dilated.load_state_dict(plain.state_dict())
    x, step = features(1, 3, 128, 128), 32 // output_stride
    torch.testing.assert_close(dilated.forward_features(x)[:, :, ::step, ::step], plain.forward_features(x))


def test_weights_of_a_classifier_fill_a_backbone(tmp_path: Any) -> None:
    torch.manual_seed(0)
    source: Any = create_model("resnet", 7, depth=18, width=1 / 32).eval()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    backbone = Backbone(depth=18, width=1 / 32, weights=str(tmp_path / "source.pt")).eval()
    x = features(1, 3, 64, 64)
    torch.testing.assert_close(backbone(x)[-1], source.forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (4, 2)}, "rising numbers of the 5 maps"),
        ({"levels": (5,)}, "rising numbers"),
        ({"levels": 0}, "levels must be an integer"),
        ({"name": "resnett"}, "did you mean"),
    ],
)
def test_a_backbone_that_can_not_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(**arguments)


def test_a_network_without_feature_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_tricks.models.backbone.create_model", lambda *args, **kwargs: nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"'plain' .*no feature maps"):
        Backbone("plain")
