"""The heads of a module that has several."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.fits import make_trainer
from helpers.modules import lightning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks import FixRes, Freeze, Muon
from lit_tricks.utils.layers import layer_distances
from lit_tricks.utils.modules import find_heads


def trunk() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Net(nn.Module):
    """A network of named parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Head(nn.Module):
    """A head of a class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, classes)


class Mixer(nn.Module):
    """A block whose first and last layer have other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 9))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


HEADS: dict[str, tuple[Any, set[str]]] = {
    "attributes": (lambda: Net(net=trunk(), a=nn.Linear(16, 5), b=nn.Linear(16, 3)), {"a", "b"}),
    "RGB and three classes": (lambda: Net(net=trunk(), a=nn.Linear(16, 3), b=nn.Linear(16, 1)), {"a", "b"}),
    "ModuleDict": (
        lambda: Net(net=trunk(), heads=nn.ModuleDict({"a": nn.Linear(16, 5), "b": nn.Linear(16, 3)})),
        {"heads.a", "heads.b"},
    ),
    "ModuleList of small networks": (
        lambda: Net(
            net=trunk(),
            heads=nn.ModuleList(
                nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, size)) for size in (5, 3, 2)
            ),
        ),
        {"heads.0.3", "heads.1.3", "heads.2.3"},
    ),
    "modules of a class": (lambda: Net(net=trunk(), a=Head(5), b=Head(3)), {"a.fc", "b.fc"}),
    "another layer than the classes": (
        lambda: Net(
            net=trunk(), embed=nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7)), fc=nn.Linear(16, 5)
        ),
        {"embed.2", "fc"},
    ),
    "heads of a timm backbone": (
        lambda: Net(
            net=timm.create_model("resnet10t", num_classes=0), a=nn.Linear(512, 5), b=nn.Linear(512, 3)
        ),
        {"a", "b"},
    ),
    "one head": (lambda: Net(net=trunk(), fc=nn.Linear(16, 5)), {"fc"}),
    "a chain": (lambda: Net(net=trunk(), a=nn.Linear(16, 16), b=nn.Linear(16, 5)), {"b"}),
    "a chain in a Sequential": (lambda: nn.Sequential(trunk(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5)), {"3"}),
    "attention": (lambda: Net(**{name: nn.Linear(16, 16) for name in "qkvo"}), {"o"}),
    "an autoencoder": (
        lambda: Net(a=nn.Linear(64, 40), mean=nn.Linear(40, 8), spread=nn.Linear(40, 8), b=nn.Linear(8, 40),
                    c=nn.Linear(40, 64)),
        {"c"},
    ),
    "blocks without a head": (lambda: Net(blocks=nn.ModuleList(Mixer() for _ in range(3))), {"blocks.2.channels.2"}),
    "a frozen teacher": (
        lambda: Net(net=trunk(), fc=nn.Linear(16, 5), teacher=nn.Linear(16, 5).requires_grad_(False)), {"fc"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_found_by_their_sizes(kind: str) -> None:
    make, names = HEADS[kind]
    module = make()
    found = find_heads(module)
    assert set(found) == names
    assert all(module.get_submodule(name) is layer for name, layer in found.items())


class TwoHeads(lightning().LightningModule):  # type: ignore[misc,name-defined]
    """A foreign module with two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.color, self.shape = trunk(), nn.Linear(16, 5), nn.Linear(16, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, colors, shapes = batch
        features = self.net(images)
        return F.cross_entropy(self.color(features), colors) + F.cross_entropy(self.shape(features), shapes)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def fit(*tricks: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return the trained module, and its weights before."""
    torch.manual_seed(0)
    module = TwoHeads()
    before = {name: value.clone() for name, value in module.named_parameters()}
    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 5, torch.arange(8) % 3)
    make_trainer(*tricks, max_epochs=1).fit(module, DataLoader(data, batch_size=4))
    return module, before


@pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network")
@pytest.mark.parametrize(
    "make", [lambda: Freeze(["backbone"]), lambda: FixRes(test_size=None, lr=0.1)], ids=["Freeze", "FixRes"]
)
def test_tricks_of_the_classifier_train_all_heads(make: Any) -> None:
    module, before = fit(make())
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert {"color.weight", "color.bias", "shape.weight", "shape.bias"} <= moved
    assert not {name for name in moved if name.startswith(("net.0", "net.3"))}


def test_muon_leaves_all_heads_to_the_optimizer_of_the_module() -> None:
    module, _ = fit(trick := Muon(lr=0.1))
    matrices = [p for group in module.optimizers().optimizer.param_groups if group.get("muon") for p in group["params"]]
    assert {id(p) for p in matrices} == {id(module.net[0].weight), id(module.net[3].weight)}
    assert trick.lr == 0.1


def test_layer_decay_gives_all_heads_one_learning_rate() -> None:
    module = TwoHeads()
    distances = layer_distances(module)
    assert [distances[layer.weight] for layer in (module.net[0], module.net[3], module.color, module.shape)] == [
        2,
        1,
        0,
        0,
    ]
