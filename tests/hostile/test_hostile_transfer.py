"""Weights for another number of classes, and networks whose layers have odd but legal attributes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lit_tricks.commands.sizes.size_range import macs
from lit_tricks.models.weights import load_weights
from lit_tricks.utils.image_size import stride_of

HEADS = {
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "pit_ti_distilled_224": ["head", "head_dist"],
    "efficientformer_l1": ["head", "head_dist"],
    "volo_d1_224": ["head", "aux_head"],
    "crossvit_tiny_240": ["head.0", "head.1"],
    "ghostnet_050": ["classifier"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_all_heads_keep_their_initialization(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there, here = (timm.create_model(name, num_classes=classes) for classes in (7, 3))
    torch.save(there.state_dict(), tmp_path / "x.pth")
    before = {key: value.clone() for key, value in here.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="lit_tricks"):
        load_weights(here, str(tmp_path / "x.pth"))
    of_heads = {f"{head}.{part}" for head in HEADS[name] for part in ("weight", "bias")}
    for key, value in here.state_dict().items():
        assert torch.equal(value, before[key] if key in of_heads else there.state_dict()[key]), key
    logged = " ".join(record.getMessage() for record in caplog.records)
    assert all(f"{head!r} keeps its initialization" in logged for head in HEADS[name])


class Net(nn.Module):
    def __init__(self, stride: Any, by_name: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.by_name = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), by_name
        self.conv.stride = stride
        self.pool = nn.MaxPool2d(2, 2)
        self.pool.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(input=images) if self.by_name else self.conv(images)
        return self.head(self.pool(maps).mean((2, 3)))


class Probed:
    """The attributes that ``macs`` needs of a subject."""

    train_size = 32
    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        self.module = self.logits = module


@pytest.mark.parametrize("stride", [[2, 2], (2, 2), torch.Size([2, 2])], ids=["list", "tuple", "size"])
@pytest.mark.parametrize("by_name", [False, True])
def test_strides_of_any_legal_type(stride: Any, by_name: bool) -> None:
    subject: Any = Probed(Net(stride, by_name))
    assert macs(subject, 32, 3) == 16 * 16 * 4 * 27 + 12
    with pytest.raises(ValueError, match="which has stride 2"):
        macs(subject, 1, 3)


@pytest.mark.parametrize(("stride", "largest"), [([1, 3], 3), ((2, 1), 2), (4, 4), ("same", 1), (None, 1), ([], 1)])
def test_stride_of_a_layer_is_its_largest(stride: Any, largest: int) -> None:
    layer = nn.Identity()
    layer.stride = stride
    assert stride_of(layer) == largest
