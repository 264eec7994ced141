"""Freeze: what it finds, what stays as it is, and what Lightning's BackboneFinetuning gets wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import timm.optim
import torch
from helpers.fits import Saver, differences, log_lines, make_trainer, run, weights_of
from helpers.modules import eval_loader, lightning, module_class, network, train_loader
from torch import nn

from lit_tricks.callbacks import (
    EMA,
    SWA,
    Compile,
    FixRes,
    Freeze,
    L1Penalty,
    LinearScaling,
    Muon,
    NoBiasDecay,
    PreciseBN,
)
from lit_tricks.callbacks.finetuning.held import HeldPart
from lit_tricks.utils.parts import find_part

FROZEN = ["net.0.0.weight", "net.0.0.bias", "net.0.1.weight", "net.0.1.bias"]
STATISTICS = ["net.0.1.running_mean", "net.0.1.running_var", "net.0.1.num_batches_tracked"]


def start() -> dict[str, torch.Tensor]:
    return weights_of(module_class("lightning")())


def moved(weights: dict[str, torch.Tensor]) -> set[str]:
    """Names of what is not as at the start."""
    return {path.split(":")[0].strip("/") for path in differences(start(), weights)}


class Recorder(lightning().Callback):  # type: ignore[misc,name-defined]
    """Keeps which parameters need a gradient, and which modules are in training mode, by step."""

    def __init__(self) -> None:
        self.trained: dict[int, set[str]] = {}
        self.training: dict[int, set[str]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained[trainer.global_step] = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.training[trainer.global_step] = {name for name, part in pl_module.named_modules() if part.training}


# --- what stays as it is ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "all parameters": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "those that need a gradient": lambda m: torch.optim.SGD(
        [p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1
    ),
    "Adam": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "Muon": lambda m: timm.optim.create_optimizer_v2(m, "muon", lr=0.01, weight_decay=0.1),
    "Lamb": lambda m: timm.optim.Lamb(m.parameters(), lr=0.01, weight_decay=0.1),
    "groups": lambda m: torch.optim.SGD([{"params": part.parameters()} for part in m.net], lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_and_statistics_stay_until_the_moment(optimizer: str) -> None:
    """No gradient, weight decay, momentum or batch moves them; the rest is trained from the first step."""
    end = run(Freeze(["net.0"], until=1), optimizers=OPTIMIZERS[optimizer], max_steps=4)
    assert moved(end.weights) == {"net.1.weight", "net.1.bias"}
    end = run(Freeze(["net.0"], until=1), optimizers=OPTIMIZERS[optimizer], max_steps=5)
    assert moved(end.weights) == {*FROZEN, *STATISTICS, "net.1.weight", "net.1.bias"}


def test_gradients_of_an_earlier_step_do_not_move_them() -> None:
    module = module_class("lightning")()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.on_before_zero_grad = lambda optimizer: None
    trainer = make_trainer(Freeze(["net.0"]), max_epochs=1)
    trainer.fit(module, train_loader(), eval_loader())
    assert moved(weights_of(module)) == {"net.1.weight", "net.1.bias"}


@pytest.mark.parametrize("unit", ["epochs", "run"])
def test_moment_in_epochs_and_as_a_share_of_the_run(unit: Any) -> None:
    seen = Recorder()
    run(Freeze(["net.0"], until={"epochs": 1.5, "run": 0.5}[unit], unit=unit), seen)
    head = {"net.1.weight", "net.1.bias"}
    assert [seen.trained[step] == head for step in range(1, 13)] == [True] * 6 + [False] * 6
    assert all(seen.trained[step] == head | {*FROZEN} for step in range(7, 13))


def test_accumulated_batches_make_one_step() -> None:
    seen = Recorder()
    run(Freeze(["net.0"], until=1), seen, accumulate_grad_batches=2)
    assert {step: len(names) for step, names in seen.trained.items() if step} == {1: 2, 2: 6, 3: 6, 4: 6, 5: 6, 6: 6}


# --- BatchNorm, and evaluation mode -----------------------------------------------------------------------------------


def calls_train(module: Any) -> None:
    module.train()


def calls_train_of_the_layer(module: Any) -> None:
    module.net[0][1].train()


def calls_train_of_the_part(module: Any) -> None:
    module.net[0].train(True)


@pytest.mark.parametrize("call", [calls_train, calls_train_of_the_layer, calls_train_of_the_part])
def test_batchnorm_stays_in_evaluation_mode_whoever_calls_train(call: Any) -> None:
    class Module(module_class("lightning")):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            call(self)
            assert not any(part.training for part in self.net[0].modules())
            assert self.net[1].training
            return super().training_step(batch, batch_idx)

        def on_train_epoch_start(self) -> None:
            call(self)

    module = Module()
    make_trainer(Freeze(["net.0"]), max_epochs=2).fit(module, train_loader(), eval_loader())
    assert moved(weights_of(module)) == {"net.1.weight", "net.1.bias"}
    assert all(part.training for part in module.modules())
    assert not any("train" in vars(part) for part in module.modules())


def test_part_that_is_compiled() -> None:
    class Compiled(module_class("lightning")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net[0] = torch.compile(self.net[0], backend="eager")

        def on_train_epoch_start(self) -> None:
            self.train()

    module = Compiled()
    start = weights_of(module)
    make_trainer(Freeze(["net.0"])).fit(module, train_loader(), eval_loader())
    changed = {path.split(":")[0].strip("/") for path in differences(start, weights_of(module))}
    assert changed == {"net.1.weight", "net.1.bias"}
    assert all(part.training for part in module.modules())
    assert not any("train" in vars(part) for part in module.modules())


def test_flag_that_is_set_in_the_step_is_an_error() -> None:
    class Module(module_class("lightning")):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net[0][1].training = True
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"BatchNorm2d.*`training`"):
        make_trainer(Freeze(["net.0"])).fit(Module(), train_loader(), eval_loader())


def test_train_bn_trains_batchnorm_while_the_rest_is_frozen() -> None:
    """Lightning's callback ignores ``train_bn`` for what it has frozen (its issue 21531)."""
    seen = Recorder()
    end = run(Freeze(["net.0"], train_bn=True), seen)
    assert moved(end.weights) == {*FROZEN[2:], *STATISTICS, "net.1.weight", "net.1.bias"}
    assert seen.trained[12] == {*FROZEN[2:], "net.1.weight", "net.1.bias"}
    assert "net.0.1" in seen.training[12]
    assert "net.0.0" not in seen.training[12]


def test_statistics_of_frozen_layers_stay_with_averages_and_their_estimates() -> None:
    """Batch statistics of layers that Lightning freezes move (its issue 15062)."""
    for trick in (EMA(decay=0.5), SWA(lr=0.1, start=0.5), PreciseBN(num_samples=8)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PreciseBN has no effect: all BatchNorm layers")
            warnings.filterwarnings("ignore", "SWA averages the statistics")
            end = run(Freeze(["net.0"]), trick)
        assert moved(end.weights) == {"net.1.weight", "net.1.bias"}, trick


def test_layers_that_were_in_evaluation_mode_stay_so_afterwards() -> None:
    class Module(module_class("lightning")):  # type: ignore[misc]
        def on_train_start(self) -> None:
            self.net[0][1].eval()

    module = Module()
    module.net[0][0].eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found 1 module")
        make_trainer(Freeze(["net.0"], until=1), max_epochs=2).fit(module, train_loader(), eval_loader())
    assert not module.net[0][0].training
    assert module.net[0][1].training


class Merging(nn.Linear):
    """An adapter that merges in evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            self.weight.data.mul_(0.5 if mode else 2)
        return super().train(mode)


def test_adapter_that_merges_in_evaluation_mode_is_an_error() -> None:
    class Module(module_class("lightning")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(1, Merging(16, 16))

    before = weights_of(module := Module())
    with pytest.raises(RuntimeError, match=r"net\.1\.weight.*Merge"):
        make_trainer(Freeze(["net.1"])).fit(module, train_loader(), eval_loader())
    assert not differences(weights_of(module), before)


# --- no graph ---------------------------------------------------------------------------------------------------------


def test_frozen_front_has_no_graph_and_saves_nothing() -> None:
    class Module(module_class("lightning")):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            saved: list[torch.Tensor] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
                features = self.net[0](images)
            assert features.requires_grad == bool(saved) == self.expected
            return nn.functional.cross_entropy(self.net[1](features), labels)

    for tricks, expected in (([Freeze(["net.0"])], False), ([], True)):
        module = Module()
        module.expected = expected
        make_trainer(*tricks, max_steps=2).fit(module, train_loader(), eval_loader())


# --- names ------------------------------------------------------------------------------------------------------------


BACKBONE = ["conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4"]


def found(module: nn.Module, pattern: str) -> list[str]:
    return find_part(module, pattern, lambda: [module.get_submodule("model.fc")]).found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layer1", ["model.layer1"]),
        ("layer1", ["model.layer1"]),
        ("layer[12]", ["model.layer1", "model.layer2"]),
        ("model.layer[!34]", ["model.layer1", "model.layer2"]),
        ("bn1", ["model.bn1"]),  # not bn1 of the blocks
        ("*.layer4.0.bn1", ["model.layer4.0.bn1"]),
        ("layer4.*", ["model.layer4.0", "model.layer4.1"]),
        ("layer1.0.conv1.weight", ["model.layer1.0.conv1.weight"]),
        ("backbone", [f"model.{name}" for name in BACKBONE]),
    ],
)  # fmt: skip
def test_names_patterns_and_backbone(pattern: str, expected: list[str]) -> None:
    module = nn.Module()
    module.model = timm.create_model("resnet18")
    assert found(module, pattern) == expected


def test_a_part_that_is_called_backbone_comes_first() -> None:
    module = nn.Module()
    module.model = nn.Module()
    module.model.backbone, module.model.neck, module.fc = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    assert find_part(module, "backbone", lambda: []).found == ["model.backbone"]


def test_backbone_leaves_the_dropout_of_the_classifier_on() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, pos_drop_rate=0.1, drop_rate=0.1)
    part = find_part(net, "backbone", lambda: [net.head])
    assert {"pos_embed", "cls_token", "norm.weight"} <= set(part.parameters)
    assert {"pos_drop", "blocks.11", "norm"} <= set(part.modules)
    assert not {"head_drop", "head", "fc_norm"} & set(part.modules)
    assert set(dict(net.named_parameters())) - set(part.parameters) == {"head.weight", "head.bias"}


def test_tied_weights_of_the_classifier_are_trained() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    assert find_part(net, "backbone", lambda: [net[2]]).parameters == ["0.bias"]


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
def test_what_was_found_is_logged(namespace: str) -> None:
    with log_lines() as records:
        run(Freeze(), namespace=namespace, max_steps=1)
    assert [record.getMessage() for record in records] == ["Freeze: net.0 (48 parameters, 48%) frozen to the end"]


def test_a_part_is_never_logged_as_100_percent(caplog: pytest.LogCaptureFixture) -> None:
    module = module_class("lightning")()
    module.net[0].extend([nn.Linear(16, 400), nn.Linear(400, 16)])  # 99.6 % of all parameters
    with caplog.at_level("INFO", logger="lit_tricks"):
        make_trainer(Freeze(["net.0"]), max_steps=1).fit(module, train_loader(), eval_loader())
    assert "parameters, 99%) frozen" in caplog.text


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["layer9"], r"no part 'layer9'.*net\.0, net\.1"),
        (["net.0", "fc"], "no part 'fc'"),
        (["net"], "leaves nothing to train"),
        (["net.0.2"], "no own parameters"),
        (["backbone", "net.1"], "leaves nothing to train"),
    ],
)
def test_names_that_do_not_fit(modules: list[str], message: str) -> None:
    module = module_class("lightning")()
    with pytest.raises(RuntimeError, match=message):
        make_trainer(Freeze(modules)).fit(module, train_loader(), eval_loader())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_loss_of_frozen_parameters_only() -> None:
    class Module(module_class("lightning")):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net[0](batch[0]).sum()

    with pytest.raises(RuntimeError, match=r"loss of Module.*frozen"):
        make_trainer(Freeze(["net.0"])).fit(Module(), train_loader(), eval_loader())


def test_optimizer_that_lacks_what_is_to_be_trained_later() -> None:
    def head_only(module: Any) -> Any:
        return torch.optim.SGD(module.net[1].parameters(), lr=0.1)

    run(Freeze(["net.0"]), optimizers=head_only, max_steps=1)
    with pytest.raises(RuntimeError, match=r"no optimizer.*net\.0\.0\.weight|net\.0\.0\.weight.*no optimizer"):
        run(Freeze(["net.0"], until=1), optimizers=head_only)


def test_parts_that_the_module_froze_itself() -> None:
    module = module_class("lightning")()
    module.net[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match="no effect"):
        make_trainer(Freeze(["net.0"])).fit(module, train_loader(), eval_loader())
    make_trainer(Freeze(["net.0", "net.1.bias"]), max_steps=1).fit(module, train_loader(), eval_loader())
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"net.1.weight", "net.1.bias"}


@pytest.mark.parametrize(("until", "unit"), [(1.5, "run"), (0, "epochs"), (-1, "epochs")])
def test_moments_out_of_range(until: Any, unit: Any) -> None:
    with pytest.raises(ValueError, match="until="):
        Freeze(until=until, unit=unit)


# --- with others ------------------------------------------------------------------------------------------------------


def test_lightnings_own_callback_is_an_error() -> None:
    class Finetuning(lightning().callbacks.BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            pass

        def finetune_function(self, *_: Any) -> None:
            pass

    with pytest.raises(RuntimeError, match="Freeze and Finetuning"):
        run(Freeze(["net.0"]), Finetuning())


def test_fixres_and_another_freeze_are_rejected_by_name() -> None:
    with pytest.raises(RuntimeError, match="FixRes: Freeze"):
        run(FixRes(test_size=None), Freeze(["net.0"]))
    with pytest.raises(RuntimeError, match=r"Freeze.*Freeze.*net\.0\.0"):
        run(Freeze(["net.0"]), Freeze(["net.0.0"], until=1))


def test_two_disjoint_parts_with_different_moments() -> None:
    seen = Recorder()
    run(Freeze(["net.0.0"], until=2), Freeze(["net.0.1"], until=1), seen)
    assert [len(seen.trained[step]) for step in range(1, 13)] == [2] * 4 + [4] * 4 + [6] * 4


def test_penalty_acts_on_weights_once_they_are_trained() -> None:
    end = run(Freeze(["net.0"], until=1), L1Penalty(strength=10.0), max_steps=4)
    assert moved(end.weights) == {"net.1.weight", "net.1.bias"}
    plain = run(Freeze(["net.0"], until=1))
    assert differences(run(Freeze(["net.0"], until=1), L1Penalty(strength=0.1)).weights["net.0.0.weight"],
                       plain.weights["net.0.0.weight"])  # fmt: skip


def test_weight_decay_and_batch_size_tricks_see_all_groups() -> None:
    tricks = [NoBiasDecay(), LinearScaling(base_batch_size=8, batch_size=4), Compile(backend="eager")]
    end = run(Freeze(["net.0"], until=1), *tricks)
    assert [(len(group["params"]), group["weight_decay"]) for group in end.optimizers[0]["param_groups"]] == [
        (2, 0.01),
        (4, 0),
    ]


def test_frozen_classifier_is_still_the_classifier_of_other_tricks() -> None:
    """Muon leaves the classifier out, and another last layer if the classifier seemed not to be trained."""
    ends = [run(*[Freeze(["net.1"]), Muon(lr=0.1)][::order], max_epochs=1) for order in (1, -1)]
    groups = [[len(group["params"]) for group in end.optimizers[0]["param_groups"]] for end in ends]
    assert groups[0] == groups[1]
    assert not differences(ends[0].weights, ends[1].weights)


def test_gan_with_an_optimizer_that_has_only_frozen_parameters() -> None:
    end = run(Freeze(["net.0"], until=1), manual=True, max_epochs=1)
    assert moved(end.weights) == {"net.1.weight", "net.1.bias"}
    with pytest.raises(RuntimeError, match="scaler"):
        run(Freeze(["net.0"]), manual=True, precision="16-mixed")


# --- resume -----------------------------------------------------------------------------------------------------------


def test_resumed_run_has_the_parts_frozen_that_an_uninterrupted_one_has(tmp_path: Any) -> None:
    """Lightning's callback freezes all again (its issue 21901)."""
    saver, seen = Saver(tmp_path), Recorder()
    full = run(Freeze(["net.0"], until=1), seen, saver)
    assert len(saver.paths) == 18
    for path in saver.paths:
        again = Recorder()
        resumed = run(Freeze(["net.0"], until=1), again, ckpt_path=path)
        assert again.trained == {step: names for step, names in seen.trained.items() if step in again.trained}
        assert not differences((resumed.weights, resumed.optimizers), (full.weights, full.optimizers)), path.name


def test_checkpoint_of_a_run_without_it_can_be_resumed(tmp_path: Any) -> None:
    saver = Saver(tmp_path, steps=(4,))
    run(saver, max_epochs=1)
    before = torch.load(saver.paths[0], weights_only=True)["state_dict"]
    end = run(Freeze(["net.0"]), ckpt_path=saver.paths[0], max_epochs=2)
    assert not differences(before["net.0.0.weight"], end.weights["net.0.0.weight"])
    assert differences(before["net.1.weight"], end.weights["net.1.weight"])


# --- the part itself --------------------------------------------------------------------------------------------------


def test_part_restores_what_it_found() -> None:
    net = nn.Sequential(network(), nn.Dropout())
    net.get_parameter("0.0.0.bias").requires_grad_(False)
    held = HeldPart(net, find_part(net, "0.0", lambda: []))
    held.freeze()
    held.hold()
    assert not any(p.requires_grad for p in net[0][0].parameters())
    assert [part.training for part in (net, net[0], net[0][0], net[0][0][1])] == [True, True, False, False]
    held.release()
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"0.0.0.bias"}
    assert all(part.training for part in net.modules())
