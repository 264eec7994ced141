"""Decoders of segmentation, against the whole models of torchvision and smp that they are taken from."""

from __future__ import annotations

import builtins
import copy
import sys
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

from lit_tricks.models import Backbone
from lit_tricks.models.decoders import create_decoder, levels_of
from lit_tricks.models.segmentation import SegmentationNet

NAMES = ("fcn", "aspp", "ppm", "fpn", "pan")
CLASSES = 5


def backbone(name: str, levels: int | None = None, **args: Any) -> Backbone:
    args = {"depth": 18, "width": 0.125, "output_stride": 32 if name == "fpn" else 16} | args
    return Backbone("resnet", levels or levels_of(name), 3, **args)


def net(name: str, **args: Any) -> SegmentationNet:
    torch.manual_seed(0)
    return SegmentationNet(backbone(name, **args), name, CLASSES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (33, 70)])
def test_logits_have_the_size_of_any_image(name: str, size: tuple[int, int]) -> None:
    model = net(name).train()
    logits, aux = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, CLASSES, *size)
    assert aux is None
    logits.mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_padded_is_that_image(name: str) -> None:
    """The padding at the right and below is 0, and its logits are cropped."""
    model = net(name).eval()
    multiple = model.decoder.multiple
    image = torch.randn(1, 3, 40, 100)
    whole = torch.zeros(1, 3, -(-40 // multiple) * multiple, -(-100 // multiple) * multiple)
    whole[..., :40, :100] = image
    with torch.no_grad():
        torch.testing.assert_close(model(image)[0], model(whole)[0][..., :40, :100])


def of_torchvision(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Feature maps of its backbone, and its logits before they are resized."""
    features = model.backbone(images)
    return list(features.values()), model.classifier(features["out"])


@pytest.mark.parametrize(("name", "build"), [("fcn", fcn_resnet50), ("aspp", deeplabv3_resnet50)])
def test_torchvisions_model_is_the_same(name: str, build: Any) -> None:
    torch.manual_seed(0)
    theirs = build(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    ours = create_decoder(name, [2048], [8], CLASSES).eval()
    ours.body.layers.load_state_dict(theirs.classifier.state_dict())
    with torch.no_grad():
        features, expected = of_torchvision(theirs, torch.randn(1, 3, 64, 64))
        assert torch.equal(ours(features), expected)


@pytest.mark.parametrize(("name", "build"), [("fpn", smp.FPN), ("pan", smp.PAN)])
def test_smps_model_is_the_same(name: str, build: Any) -> None:
    torch.manual_seed(0)
    theirs = build("resnet18", encoder_weights=None, classes=CLASSES, upsampling=1).eval()
    strides = [4, 8, 16, 32] if name == "fpn" else [4, 8, 16, 16]
    ours = create_decoder(name, theirs.encoder.out_channels[-4:], strides, CLASSES).eval()
    ours.body.decoder.load_state_dict(theirs.decoder.state_dict())
    state = {key.removeprefix("0."): value for key, value in theirs.segmentation_head.state_dict().items()}
    ours.body.head.load_state_dict(state)
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(ours(theirs.encoder(images)[-4:]), theirs(images))


def test_ppm_is_the_formula() -> None:
    """Means over bins, a 1x1 convolution and ReLU (batch norm, but for bin 1), bilinear, next to the map."""
    torch.manual_seed(0)
    ours = create_decoder("ppm", [16], [8], CLASSES).eval()
    features = torch.randn(2, 16, 12, 12)
    module, *head = ours.body.layers
    parts = []
    for size, block in zip((1, 2, 3, 6), module.blocks, strict=True):
        means = features.unfold(2, 12 // size, 12 // size).unfold(3, 12 // size, 12 // size).mean((-1, -2))
        layers = block.pool[1]
        assert isinstance(layers[1], nn.Identity if size == 1 else nn.BatchNorm2d)
        maps = layers[1](torch.einsum("nchw,oc->nohw", means, layers[0].weight[..., 0, 0]) + bias_of(layers[0])).relu()
        parts.append(nn.functional.interpolate(maps, (12, 12), mode="bilinear", align_corners=True))
    expected = nn.Sequential(*head)(torch.cat([*parts, features], 1))
    torch.testing.assert_close(ours([features]), expected)
    assert head[0].in_channels == 32
    assert head[0].out_channels == 4


def bias_of(conv: nn.Conv2d) -> Any:
    return 0 if conv.bias is None else conv.bias.view(-1, 1, 1)


@pytest.mark.parametrize(
    ("stride", "rates"), [(32, (3, 6, 9)), (16, (6, 12, 18)), (8, (12, 24, 36)), (2, (48, 96, 144))]
)
def test_dilations_of_aspp_are_those_of_the_paper(stride: int, rates: tuple[int, ...]) -> None:
    aspp = create_decoder("aspp", [8], [stride], CLASSES)
    dilated = [m.dilation[0] for m in aspp.modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1]
    assert tuple(dilated) == rates


def test_the_gate_of_pan_is_a_sigmoid() -> None:
    pan = create_decoder("pan", [8, 8, 8, 8], [4, 8, 16, 16], CLASSES)
    assert sum(isinstance(m, nn.Sigmoid) for m in pan.modules()) == 3


def test_an_auxiliary_head_is_for_training_and_sees_the_second_last_map() -> None:
    torch.manual_seed(0)
    model = SegmentationNet(backbone("fcn", levels=2), "fcn", CLASSES, aux=True)
    images = torch.randn(2, 3, 32, 32)
    assert model.eval()(images)[1] is None
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    twin = copy.deepcopy(model)  # running statistics are of no use in training
    aux = model(images)[1]
    expected = nn.functional.interpolate(twin.aux(twin.backbone(images)[0]), (32, 32), mode="bilinear")
    torch.testing.assert_close(aux, expected)
    with pytest.raises(ValueError, match="needs a second feature map"):
        SegmentationNet(backbone("fcn", levels=1), "fcn", CLASSES, aux=True)


# ---------------------------------------------------------------------------------------------------------------------
# Misuse


def test_unknown_names_and_maps_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"decoder='unet'.*'fcn', 'aspp'"):
        create_decoder("unet", [8], [8], CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"decoder='fpn' .*gives 2"):
        create_decoder("fpn", [8, 8], [8, 16], CLASSES)
    with pytest.raises(ValueError, match=r"\[4, 8, 16, 16\].*output_stride"):
        create_decoder("fpn", [8] * 4, [4, 8, 16, 16], CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_image(name: str) -> None:
    model, image = net(name), torch.randn(1, 3, 64, 64)
    assert model.eval()(image)[0].shape == (1, CLASSES, 64, 64)
    if name in ("aspp", "pan"):
        with pytest.raises(ValueError, match="batch_size of at least 2"):
            model.train()(image)
    else:
        assert model.train()(image)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_missing_smp_is_named_with_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.startswith("segmentation_models_pytorch"):
            raise ModuleNotFoundError(f"No module named {module!r}")
        return original(module, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    for module in list(sys.modules):
        if module.startswith("segmentation_models_pytorch"):
            monkeypatch.setitem(sys.modules, module, None)
    if name in ("fcn", "aspp"):
        assert net(name)
    else:
        with pytest.raises(ImportError, match=r"lit-tricks\[segmentation\].*fcn or aspp"):
            net(name)
