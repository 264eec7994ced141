"""Frozen parts and layer-wise learning rates of the modules of the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from helpers.cli import cli, workplace
from lightning.pytorch import Callback, Trainer
from torch import nn

from lit_tricks import Classifier, NoBiasDecay, WarmupCosine
from lit_tricks.data import Digits
from lit_tricks.models import create_model, freeze, layer_scales

SMALL: dict[str, Any] = {"depth": 18, "width": 1 / 32, "small_input": True, "drop_rate": 0.5}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def classifier(**arguments: Any) -> Classifier:
    return Classifier("resnet", 10, SMALL, input_size=(1, 8, 8), optimizer=SGD, **arguments)


def fit(model: Classifier, *callbacks: Any, **settings: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=3, limit_val_batches=1, callbacks=list(callbacks),
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(model, Digits(batch_size=16))
    return trainer


# --- frozen parts -----------------------------------------------------------------------------------------------------


def test_frozen_parts_keep_weights_and_statistics_in_a_fit() -> None:
    model = classifier(freeze=["conv1", "bn1", "layer1", "layer2.0"])
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    trainer = fit(model, num_sanity_val_steps=1)
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.0.")
    changed = {key for key, value in model.model.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith(frozen) for key in changed)
    assert changed == {key for key in before if not key.startswith(frozen)}
    given = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert len(given) == sum(parameter.requires_grad for parameter in model.parameters())


def test_backbone_is_all_but_the_classifier() -> None:
    model, training = classifier(freeze=["backbone"]), set()

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            training.update(name for name, part in model.named_modules() if part.training)

    fit(model, Look(), num_sanity_val_steps=1)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.fc.weight", "model.fc.bias"]
    assert training >= {"model", "model.fc"}  # the network itself: its dropout before the classifier acts
    assert not any(name.startswith(("model.layer", "model.bn1")) for name in training)
    assert all(part.training for part in model.modules())  # afterwards
    fit(model)  # and again, without a warning


def test_backbone_of_a_transformer_is_frozen() -> None:
    net = create_model("vit_tiny_patch16_224", 10, img_size=32)
    freeze(net, ["backbone"])
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer5"], "freeze='layer5' is no part of ResNet, which has conv1.*, .*fc"),
        (["model.layer1"], "freeze='model.layer1' is no part"),
        ([""], r"freeze=\[''\]"),
        (["backbone", "fc"], "leaves nothing to train"),
    ],
)
def test_names_that_are_wrong(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(freeze=names)


# --- layer-wise rates -------------------------------------------------------------------------------------------------


def rates_of(model: Classifier) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = model.configure_optimizers()
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("resnet", SMALL), ("resnet50d", {}), ("vit_tiny_patch16_224", {"img_size": 32}), ("convnext_atto", {})],
)
def test_rates_are_those_of_timm(name: str, arguments: dict[str, Any]) -> None:
    net: Any = create_model(name, 10, **arguments)
    scales = layer_scales(net, 0.5)
    groups = timm.optim.param_groups_layer_decay(net, weight_decay=0.0, layer_decay=0.5)
    theirs = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scales == theirs


def test_rates_fall_from_block_to_block() -> None:
    rates = rates_of(classifier(layer_decay=0.5))
    assert rates["model.fc.weight"] == rates["model.fc.bias"] == 0.1
    blocks = [f"layer{stage}.{block}" for stage in (4, 3, 2, 1) for block in (1, 0)]
    for distance, block in enumerate(blocks, 1):
        assert {v for k, v in rates.items() if f".{block}." in k} == {0.1 * 0.5**distance}
    assert {v for k, v in rates.items() if "conv1.0" in k or "model.bn1" in k} == {0.1 * 0.5**9}


def test_with_frozen_parts_schedule_and_weight_decay_that_differ_by_layer() -> None:
    model = classifier(layer_decay=0.5, freeze=["conv1", "bn1", "layer1"])
    trainer = fit(model, NoBiasDecay(), WarmupCosine(warmup_epochs=0))
    groups = trainer.optimizers[0].param_groups
    assert {group["initial_lr"] for group in groups} == {0.1 * 0.5**distance for distance in range(7)}
    assert {group["weight_decay"] for group in groups} == {0, 0.01}
    assert not any("lr_scale" in group for group in groups)
    shares = {group["lr"] / group["initial_lr"] for group in groups}
    assert max(shares) == pytest.approx(min(shares))  # the same point of the schedule


@pytest.mark.parametrize("decay", [0.0, -1, 1.5])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match="layer_decay="):
        classifier(layer_decay=decay)


def test_a_network_of_one_layer() -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10, layer_decay=0.9)
    with pytest.raises(ValueError, match=r"layer_decay=0\.9.*Sequential has one layer"):
        model.configure_optimizers()


def test_frozen_layers_stay_in_evaluation_mode_whoever_calls_train() -> None:
    model, training = classifier(freeze=["layer[12]"]), set()

    class Calls(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.train()

        def on_train_batch_end(self, *_: Any) -> None:
            training.update(name for name, part in model.named_modules() if part.training)

    fit(model, Calls())
    assert "model.layer3" in training
    assert not any(name.startswith(("model.layer1", "model.layer2")) for name in training)


# --- both, from the command line --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transfer_in_one_line(tmp_path: Path) -> None:
    with workplace(tmp_path):
        cli("fit", "--config=tiny.yaml")
        [best] = tmp_path.glob("runs/**/best.ckpt")
        outcome = cli(
            "fit", "--config=tiny.yaml", f"--model.weights={best}", "--model.freeze=[conv1,bn1]",
            "--model.layer_decay=0.8", "--name=transfer",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        [last] = tmp_path.glob("runs/transfer/**/last.ckpt")
        one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (best, last))
        same = {key for key in one if torch.equal(one[key], other[key])}
        assert {key for key in one if key.startswith(("model.conv1.", "model.bn1."))} == same
        model = Classifier.load_from_checkpoint(last, weights_only=True)
        assert model.hparams["freeze"] == ["conv1", "bn1"]
        outcome = cli("fit", "--config=tiny.yaml", "--model.freeze=[layer9]")
        assert outcome.code == 1
        assert "freeze='layer9' is no part of" in outcome.err
