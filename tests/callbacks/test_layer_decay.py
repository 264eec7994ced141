"""LayerDecay: layers and factors against timm's, and with other tricks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from helpers.fits import Saver, differences, log_lines, make_trainer, run
from helpers.modules import eval_loader, lightning, module_class, network, train_loader
from timm.optim import param_groups_layer_decay
from torch import nn

from lit_tricks import Classifier
from lit_tricks.callbacks import LayerDecay, LinearScaling, NoBiasDecay, Unfreeze, WarmupStep
from lit_tricks.callbacks.optim.lr_factors import LRFactors
from lit_tricks.models import resnet
from lit_tricks.utils.layers import layer_distances

Module = module_class("lightning")


def rates(net: nn.Module, decay: float, lr: float = 0.1) -> dict[str, float]:
    """Learning rates by parameter, as a run with LayerDecay starts with them."""

    class Holder(lightning().LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = net

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=lr)

    trick, holder = LayerDecay(decay), Holder()
    trick.setup(make_trainer(), holder, "fit")
    optimizer = holder.configure_optimizers()
    trick.unwrap()
    names = {parameter: name.removeprefix("model.") for name, parameter in holder.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("resnetv2_50", {}),
        ("vit_tiny_patch16_224", {"img_size": 32}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
        ("convnext_atto", {}),
        ("swin_tiny_patch4_window7_224", {}),
        ("efficientnet_b0", {}),
    ],
)
@pytest.mark.parametrize("decay", [0.75, 0.65])
def test_learning_rates_are_exactly_those_of_timm(name: str, arguments: dict[str, Any], decay: float) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=3, **arguments)
    groups = param_groups_layer_decay(net, layer_decay=decay)
    scales = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    expected = {key: 0.1 * scales[parameter] for key, parameter in net.named_parameters()}
    assert rates(net, decay) == expected  # float64, to the last bit


def layers(module: nn.Module) -> list[list[str]]:
    """Names of the modules of each layer, from the input to the output."""
    names = {parameter: name.rpartition(".")[0] for name, parameter in module.named_parameters()}
    distances = layer_distances(module)
    assert set(distances) == set(names)
    end = max(distances.values())
    found: list[list[str]] = [[] for _ in range(end + 1)]
    for parameter, distance in distances.items():
        if names[parameter] not in found[end - distance]:
            found[end - distance].append(names[parameter])
    return found


def test_blocks_of_torchvisions_resnet_are_timms() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        net = torchvision.models.resnet18()
    found = layers(net)
    assert [layer[0].rpartition(".")[0] for layer in found] == [
        "", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "",
    ]  # fmt: skip
    assert found[0] == ["conv1", "bn1"]
    assert found[-1] == ["fc"]


@pytest.mark.parametrize(("name", "count"), [("vit_b_16", 14), ("swin_t", 17), ("vgg11_bn", 11), ("mobilenet_v2", 20)])
def test_order_of_registration_in_other_networks(name: str, count: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        found = layers(getattr(torchvision.models, name)())
    assert len(found) == count
    assert any(re.search("head|classifier", part) for part in found[-1])


def test_convolutions_and_linear_layers_with_their_norms() -> None:
    assert layers(network()) == [["0.0", "0.1"], ["1"]]
    pair = nn.Sequential(
        nn.Embedding(3, 4), nn.MultiheadAttention(4, 1), nn.LayerNorm(4), nn.LSTM(4, 4), nn.Linear(4, 2)
    )
    assert [layer[0] for layer in layers(pair)] == ["0", "3", "4"]
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.PReLU(), nn.Linear(2, 2))
    assert len(layers(normed)) == 2


def test_encoder_without_classifier_starts_one_layer_below_the_decoder() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model("resnet18", num_classes=0)
            self.decoder = nn.Conv2d(512, 3, 1)

    with torch.device("meta"):
        module = Segmenter()
    distances = layer_distances(module)
    assert distances[module.decoder.weight] == 0
    assert distances[module.encoder.layer4[1].conv1.weight] == 1
    assert distances[module.encoder.conv1.weight] == 9


def test_compiled_network_and_its_own() -> None:
    net = resnet(depth=18, num_classes=3, small_input=True, width=1 / 32)
    compiled = nn.Sequential(torch.compile(net, backend="eager"))
    assert list(layer_distances(compiled).values()) == list(layer_distances(net).values())
    assert max(layer_distances(net).values()) == 9


@pytest.mark.parametrize("order", [1, -1])
def test_with_weight_decay_batch_size_and_schedule(order: int) -> None:
    tricks = [
        LayerDecay(0.5),
        NoBiasDecay(),
        LinearScaling(8, batch_size=4),
        WarmupStep([2], gamma=0.1, warmup_epochs=0),
    ][::order]
    end = run(*tricks, lightning().callbacks.LearningRateMonitor())
    groups = end.trainer.optimizers[0].param_groups
    assert sorted((group["initial_lr"], group["weight_decay"], len(group["params"])) for group in groups) == [
        (0.025, 0, 3), (0.025, 0.01, 1), (0.05, 0, 1), (0.05, 0.01, 1),
    ]  # fmt: skip
    assert {round(group["lr"] / group["initial_lr"], 6) for group in groups} == {0.1}
    assert len({group["name"] for group in groups}) == 4


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "named": lambda m: torch.optim.SGD(m.named_parameters(), lr=0.1),
    "groups": lambda m: torch.optim.SGD(
        [{"params": m.net[0].parameters(), "lr": 0.2, "name": "body"}, {"params": m.net[1].parameters()}], lr=0.1
    ),
    "scheduler": lambda m: (
        [o := torch.optim.SGD(m.parameters(), lr=0.1)], [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["named", "groups", "scheduler"])
def test_optimizers_of_any_form(kind: str) -> None:
    end = run(LayerDecay(0.5), optimizers=OPTIMIZERS[kind], max_epochs=1)
    names = {parameter: name for name, parameter in end.module.named_parameters()}
    groups = end.trainer.optimizers[0].param_groups
    found = {names[p]: group.get("initial_lr", group["lr"]) for group in groups for p in group["params"]}
    body = 0.1 if kind == "groups" else 0.05
    assert found == {name: body if name.startswith("net.0") else 0.1 for name in names.values()}


def test_two_optimizers_by_hand() -> None:
    end = run(LayerDecay(0.5), manual=True)
    assert [group["lr"] for optimizer in end.trainer.optimizers for group in optimizer.param_groups] == [0.05, 0.05]


def test_a_tensor_stays_a_tensor() -> None:
    factors = LRFactors("X", lambda parameter, _: (str(parameter.ndim), 0.5**parameter.ndim))
    lr = torch.tensor(0.1, dtype=torch.float64)
    with factors.applied():
        optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)], lr=lr)
    factors.finish(optimizer, "M")
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.05, 0.025]
    assert lr == 0.1


def test_what_it_found_is_logged() -> None:
    with log_lines() as records:
        run(LayerDecay(0.5), max_steps=1)
    assert [record.getMessage() for record in records] == [
        "LayerDecay: 2 layers, learning rate x 0.5 in net.0.0 to x 1 in net.1"
    ]


def test_resume_needs_the_same_layers(tmp_path: Any) -> None:
    saver = Saver(tmp_path, steps=(4,))
    run(saver, max_epochs=1)
    with pytest.raises(RuntimeError, match=r"LayerDecay\(decay=0.5\).*without it"):
        run(LayerDecay(0.5), ckpt_path=saver.paths[0])


def test_networks_without_layers_are_rejected() -> None:
    one = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731

    class Flat(Module):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__(optimizers=one)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    with pytest.raises(RuntimeError, match="one layer only in Flat"):
        make_trainer(LayerDecay()).fit(Flat(), train_loader(), eval_loader())
    built = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(RuntimeError, match="not built in configure_optimizers"):
        run(LayerDecay(), optimizers=lambda m: built)

    def cyclic(module: Any) -> Any:
        optimizer = one(module)
        return [optimizer], [torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, cycle_momentum=False)]

    with pytest.raises(RuntimeError, match="scheduler in configure_optimizers"):
        run(LayerDecay(), optimizers=cyclic)
    with pytest.raises(RuntimeError, match="LearningRateFinder"):
        run(LayerDecay(), lightning().callbacks.LearningRateFinder())
    model = Classifier("resnet", 3, {"depth": 18, "width": 1 / 32}, input_size=(1, 8, 8), layer_decay=0.5)
    with pytest.raises(RuntimeError, match=r"layer_decay=0\.5 of Classifier"):
        make_trainer(LayerDecay()).fit(model, train_loader(), eval_loader())


def test_one_cycle_has_a_peak_for_each_layer() -> None:
    def one_cycle(module: Any, max_lr: Any = 0.1, split: bool = False) -> Any:
        groups = [module.net[0].parameters(), module.net[1].parameters()] if split else [module.parameters()]
        optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.3, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=13)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    tricked = run(LayerDecay(0.5), optimizers=one_cycle)
    by_hand = run(optimizers=lambda module: one_cycle(module, [0.05, 0.1], split=True))
    assert not differences(tricked.weights, by_hand.weights)


def test_group_that_is_added_later_is_an_error() -> None:
    class Adds(lightning().Callback):  # type: ignore[misc,name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    with pytest.raises(RuntimeError, match="added"):
        run(LayerDecay(), Adds())


def test_factors_of_two_tricks_give_the_same_bits_in_any_order() -> None:
    ends = [run(*[LayerDecay(0.7), Unfreeze({"net.0": 0.25}, {"net.0": 0.3})][::order]) for order in (1, -1)]
    assert not differences(ends[0].weights, ends[1].weights)
