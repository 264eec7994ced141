"""NoBiasDecay: the parameters without decay, training equal to groups made by hand, and rejected cases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import timm.optim
import torch
from helpers.fits import Saver, differences, log_lines, make_trainer, run
from helpers.modules import eval_loader, lightning, module_class, train_loader
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from lit_tricks.callbacks import LinearScaling, NoBiasDecay, WarmupCosine
from lit_tricks.callbacks.no_bias_decay import _rule, kinds
from lit_tricks.callbacks.optim.param_groups import split_group

FREE = ["net.0.0.bias", "net.0.1.weight", "net.0.1.bias", "net.1.bias"]  # in the module of the tests
DECAYED = ["net.0.0.weight", "net.1.weight"]


# ---------------------------------------------------------------------------------------------------------------------
# What a parameter is


class LayerNorm2d(nn.Module):
    """As projects write their own, with axes to broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(1, 4, 1, 1)) for _ in range(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.ones(()))
        self.matrix = nn.Parameter(torch.ones(4, 4))
        self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))


class NormedLinear(nn.Linear):
    pass


KINDS = [
    (nn.Conv2d(4, 4, 3), {"weight": set(), "bias": {"bias"}}),
    (nn.Conv2d(4, 4, 3, groups=4), {"weight": set(), "bias": {"bias"}}),
    (nn.ConvTranspose1d(4, 1, 1), {"weight": set(), "bias": {"bias"}}),
    (nn.Linear(4, 1), {"weight": set(), "bias": {"bias"}}),
    (NormedLinear(4, 4), {"weight": set(), "bias": {"bias"}}),
    (nn.Embedding(4, 4), {"weight": {"embedding"}}),
    (nn.EmbeddingBag(4, 4), {"weight": {"embedding"}}),
    (nn.PReLU(), {"weight": {"norm"}}),
    *(
        (norm, {"weight": {"norm"}, "bias": {"bias", "norm"}})
        for norm in (
            nn.BatchNorm1d(4),
            nn.SyncBatchNorm(4),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
            nn.LayerNorm([4, 8, 8]),
            LayerNorm2d(),
            timm.layers.LayerNorm2d(4),
            timm.layers.BatchNormAct2d(4),
        )
    ),
    (nn.RMSNorm([4, 8]), {"weight": {"norm"}}),
    (timm.layers.RmsNorm2d(4), {"weight": {"norm"}}),
    (timm.layers.LayerScale2d(4), {"gamma": {"norm"}}),
    (
        Block(),
        {
            "gamma": {"norm"},
            "temperature": {"norm"},
            "matrix": set(),
            "relative_position_bias_table": {"bias"},
        },
    ),
    (
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        {"in_proj_weight": set(), "in_proj_bias": {"bias"}, "bias_k": {"bias"}, "bias_v": {"bias"}},
    ),
    (
        nn.GRU(4, 4),
        {"weight_ih_l0": set(), "weight_hh_l0": set(), "bias_ih_l0": {"bias"}, "bias_hh_l0": {"bias"}},
    ),
]


@pytest.mark.parametrize(("layer", "expected"), KINDS, ids=lambda value: type(value).__name__)
def test_kinds_of_layer_are_found(layer, expected):
    assert {name: kinds(name, p, layer) for name, p in layer.named_parameters(recurse=False)} == expected


@functools.cache
def network(name: str) -> nn.Module:
    return timm.create_model(name)


@pytest.mark.parametrize(
    "name", ["resnet18d", "convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("embeddings", [False, True])
def test_divides_the_networks_of_timm_as_timm(name, embeddings):
    net = network(name)
    listed = net.no_weight_decay() if embeddings and hasattr(net, "no_weight_decay") else set()
    if name.startswith("swin"):  # its bias tables are matrices: timm takes them for weights, unless listed
        listed = {*listed, "*bias_table"}
    theirs = param_groups_weight_decay(net, 0.1, no_weight_decay_list=listed)
    is_free = _rule(net, ["bias", "norm", *["embedding"] * embeddings])
    for group in theirs:
        for parameter in group["params"]:
            assert is_free(parameter) == (group["weight_decay"] == 0)
    assert len(theirs) == 2


def names(trainer: Any) -> list[tuple[float, list[str]]]:
    """Weight decay and parameters of each group."""
    known = {parameter: name for name, parameter in trainer.lightning_module.named_parameters()}
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [(group["weight_decay"], [known[p] for p in group["params"]]) for group in groups]


@pytest.mark.parametrize(
    ("skip", "free"),
    [
        (["bias", "norm"], FREE),
        (["bias"], [name for name in FREE if name.endswith("bias")]),
        (["norm"], [name for name in FREE if ".1." in name and "net.1" not in name]),
    ],
)
def test_skip_sets_the_parameters_without_decay(skip, free):
    end = run(NoBiasDecay(skip), max_epochs=1)
    everything = [name for name, _ in end.module.named_parameters()]
    assert names(end.trainer) == [(0.01, [name for name in everything if name not in free]), (0.0, free)]


def test_tensors_that_are_shared_or_of_another_module():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

    net = Tied()
    assert not _rule(net, ["bias", "norm"])(net.head.weight)
    assert _rule(net, ["embedding"])(net.head.weight)
    assert _rule(net, ["norm"])(torch.zeros(3))
    assert not _rule(net, ["bias"])(torch.zeros(3))
    assert not _rule(net, ["norm"])(torch.zeros(3, 3))


# ---------------------------------------------------------------------------------------------------------------------
# The groups


def is_vector(parameter: Tensor) -> bool:
    return parameter.ndim < 2


MATRIX, VECTOR = torch.zeros(2, 2), torch.zeros(2)


def test_a_group_is_split_and_keeps_its_options():
    options = {"lr": 0.3, "betas": (0.8, 0.9), "lr_scale": 0.5, "name": "head"}
    kept, free = split_group({"params": [VECTOR, MATRIX], **options}, 0.1, is_vector)
    assert kept.items() >= options.items()
    assert free.items() >= (options | {"weight_decay": 0.0, "name": "head_no_decay"}).items()
    assert "weight_decay" not in kept  # it comes from the optimizer
    assert kept["params"][0] is MATRIX
    assert free["params"][0] is VECTOR


@pytest.mark.parametrize("weight_decay", [0, 0.0, None])
def test_a_group_without_weight_decay_is_left_alone(weight_decay):
    group = {"params": iter([VECTOR, MATRIX])}
    assert split_group(group, weight_decay, is_vector)[0] is group
    assert len(list(group["params"])) == 2


def test_a_group_of_one_sort_stays_one():
    group = {"params": MATRIX, "weight_decay": 0.1}
    assert split_group(group, 0.1, is_vector)[0] is group
    [free] = split_group({"params": (VECTOR for _ in range(2)), "weight_decay": 0.1, "name": "a"}, 0.1, is_vector)
    assert free["weight_decay"] == 0
    assert (len(free["params"]), free["name"]) == (2, "a")


def test_names_stay_with_their_tensors():
    named = [("v", VECTOR), ("m", MATRIX)]
    kept, free = split_group({"params": named}, 0.1, is_vector)
    assert (kept["params"], free["params"]) == ([named[1]], [named[0]])
    kept, free = split_group({"params": [VECTOR, MATRIX], "param_names": ["v", "m"]}, 0.1, is_vector)
    assert (kept["params"], free["params"]) == ([named[1]], [named[0]])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_a_step_by_hand():
    """Without gradients SGD shrinks a weight by ``1 - lr * decay``, AdamW too; biases and norms stay."""
    for make in (SGD, AdamW):
        module = module_class("lightning")().double()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        module.optimizers_of = lambda m, make=make: make(m.parameters(), lr=0.5, weight_decay=0.2)
        module.training_step = lambda *_, m=module: 0 * sum(p.sum() for p in m.parameters())
        trainer = make_trainer(NoBiasDecay(), max_steps=1, limit_val_batches=0)
        trainer.fit(module, train_loader(), eval_loader())
        for name, parameter in module.named_parameters():
            factor = 0.9 if name in DECAYED else 1.0
            torch.testing.assert_close(parameter, before[name] * factor, rtol=1e-15, atol=0)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.3, nesterov=True),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.3),
    "Lamb": lambda params: timm.optim.Lamb(params, lr=0.01, weight_decay=0.3),
    "Lookahead": lambda params: timm.optim.Lookahead(SGD(params, lr=0.1, weight_decay=0.3), k=2),
}


def by_hand(module: Any, options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    known = dict(module.named_parameters())
    decayed = {"params": [known[name] for name in DECAYED], "name": "decay"}
    free = {"params": [known[name] for name in FREE], "name": "no_decay", "weight_decay": 0.0}
    return [group | (options or {}) for group in (decayed, free)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_with_groups_made_by_hand(optimizer):
    make = OPTIMIZERS[optimizer]
    tricked = run(NoBiasDecay(), optimizers=lambda m: make(m.parameters()), max_epochs=1)
    reference = run(optimizers=lambda m: make(by_hand(m)), max_epochs=1)
    assert not differences(tricked.weights, reference.weights)
    assert not differences(tricked.optimizers, reference.optimizers)


def test_groups_have_names_that_are_unique_in_their_optimizer():
    def two(module):
        parameters = list(module.parameters())
        half = len(parameters) // 2
        return SGD([{"params": parameters[:half]}, {"params": parameters[half:]}], lr=0.1, weight_decay=0.1)

    [optimizer] = run(NoBiasDecay(), optimizers=two, max_epochs=1).trainer.optimizers
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay", "decay_2", "no_decay_2"]


def test_trains_as_with_the_groups_of_timm():
    tricked = run(NoBiasDecay(), optimizers=lambda m: OPTIMIZERS["SGD"](m.parameters()), max_epochs=1)
    reference = run(optimizers=lambda m: OPTIMIZERS["SGD"](param_groups_weight_decay(m, 0.3)), max_epochs=1)
    assert not differences(tricked.weights, reference.weights)


def test_named_parameters_keep_names():
    end = run(NoBiasDecay(), optimizers=lambda m: SGD(m.named_parameters(), lr=0.1, weight_decay=0.1), max_epochs=1)
    assert [group["param_names"] for group in end.trainer.optimizers[0].param_groups] == [DECAYED, FREE]
    assert names(end.trainer) == [(0.1, DECAYED), (0.0, FREE)]


def test_manual_optimization_with_two_optimizers():
    end = run(NoBiasDecay(), manual=True, max_epochs=1)
    assert names(end.trainer) == [
        (0.01, DECAYED[:1]),
        (0.0, FREE[:3]),
        (0.01, DECAYED[1:]),
        (0.0, FREE[3:]),
    ]


def test_an_optimizer_without_weight_decay_beside_one_with_it():
    def optimizers(module: Any) -> Any:
        body, head = module.net
        return [SGD(body.parameters(), lr=0.1), SGD(head.parameters(), lr=0.1, weight_decay=0.1)]

    end = run(NoBiasDecay(), manual=True, optimizers=optimizers, max_epochs=1)
    assert names(end.trainer) == [(0, [DECAYED[0], *FREE[:3]]), (0.1, DECAYED[1:]), (0.0, FREE[3:])]


def test_groups_of_the_module_survive():
    def optimizers(module: Any) -> Any:
        body, head = module.net
        groups = [
            {"params": body[0].parameters(), "lr": 0.01, "weight_decay": 0.2, "name": "stem"},
            {"params": body[1].parameters(), "lr": 0.02, "name": "norm"},
            {"params": head.weight, "lr": 0.03},
            {"params": [head.bias], "weight_decay": 0.0, "momentum": 0.5},
        ]
        for i, group in enumerate(groups[2:]):
            group["name"] = f"head{i}"
        return SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)

    monitor = lightning().callbacks.LearningRateMonitor()  # it rejects names that come twice
    end = run(NoBiasDecay(), monitor, optimizers=optimizers, max_epochs=1)
    keys = ("name", "lr", "weight_decay", "momentum")
    assert [tuple(group[key] for key in keys) for group in end.trainer.optimizers[0].param_groups] == [
        ("stem", 0.01, 0.2, 0.9),
        ("stem_no_decay", 0.01, 0.0, 0.9),
        ("norm", 0.02, 0.0, 0.9),
        ("head0", 0.03, 0.1, 0.9),
        ("head1", 0.1, 0.0, 0.5),
    ]
    assert [g for _, g in names(end.trainer)] == [DECAYED[:1], FREE[:1], FREE[1:3], DECAYED[1:], FREE[3:]]


def test_layer_decay_of_timm_survives():
    class Module(module_class("lightning")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("resnet10t", in_chans=1, num_classes=3, channels=(4, 4, 4, 4), stem_width=4)

        def configure_optimizers(self) -> Any:
            groups = param_groups_layer_decay(self.net, 0.1, layer_decay=0.5, weight_decay_exclude_1d=False)
            self.scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
            return SGD([group | {"lr": 0.1 * group["lr_scale"]} for group in groups])

    module = Module()
    make_trainer(NoBiasDecay(), fast_dev_run=1).fit(module, train_loader(), eval_loader())
    groups = module.trainer.optimizers[0].param_groups
    assert len({group["lr"] for group in groups}) > 3
    for group in groups:
        assert {module.scales[p] for p in group["params"]} == {group["lr_scale"]}
        assert group["lr"] == 0.1 * group["lr_scale"]
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)


class HandsOn(Optimizer):
    """Round another optimizer, which gets its groups."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, kwargs)
        self.inner = SGD(self.param_groups)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_optimizer_in_an_optimizer():
    for parameters in (lambda m: m.parameters(), lambda m: m.named_parameters()):
        make = lambda m, of=parameters: HandsOn(of(m), lr=0.1, weight_decay=0.1)  # noqa: E731
        end = run(NoBiasDecay(), optimizers=make, max_epochs=1)
        assert names(end.trainer) == [(0.1, DECAYED), (0.0, FREE)]


SCHEDULERS = {
    "lambda": lambda opt: LambdaLR(opt, lambda step: 1 / (1 + step)),
    "lambdas": lambda opt: LambdaLR(opt, [lambda step: 1.0, lambda step: 1 / (1 + step)]),
    "sequence": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=2), ExponentialLR(opt, 0.9)], [2]),
    "one cycle": lambda opt: OneCycleLR(opt, [0.1, 0.2], total_steps=9),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_the_module_see_the_final_groups(scheduler):
    def optimizers(module: Any, groups: Any) -> Any:
        optimizer = OPTIMIZERS["SGD"](groups(module))
        schedule = {"scheduler": SCHEDULERS[scheduler](optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    tricked = run(NoBiasDecay(), optimizers=partial(optimizers, groups=lambda m: m.parameters()), max_epochs=1)
    reference = run(optimizers=partial(optimizers, groups=by_hand), max_epochs=1)
    assert not differences(tricked.weights, reference.weights)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_with_scaling_and_a_schedule_in_any_order(order):
    tricks = [NoBiasDecay(), LinearScaling(16, batch_size=4), WarmupCosine(1)]
    tricked = run(*(tricks[i] for i in order), optimizers=lambda m: OPTIMIZERS["SGD"](m.parameters()))
    reference = run(WarmupCosine(1), optimizers=lambda m: OPTIMIZERS["SGD"](by_hand(m, {"lr": 0.025})))
    assert not differences(tricked.weights, reference.weights)


# ---------------------------------------------------------------------------------------------------------------------
# What it logs and rejects


def test_says_what_decays():
    with log_lines() as records:
        end = run(NoBiasDecay(), max_epochs=1)
    assert [record.getMessage() for record in records] == [
        "NoBiasDecay: weight decay on 2 tensors (84 parameters), none on 4 tensors (15 parameters)"
    ]
    assert {metrics["no_bias_decay/share"] for metrics in end.logged.values() if "train_loss" in metrics} == {
        torch.tensor(15 / 99).item()
    }


@pytest.mark.parametrize("skip", [[], ["beta"], ["bias", "norms"], "bias"])
def test_arguments_out_of_range(skip):
    with pytest.raises(ValueError, match=r"skip=.*'bias', 'norm' and 'embedding'"):
        NoBiasDecay(skip)


@pytest.mark.parametrize(
    "optimizers",
    [
        lambda m: SGD(m.parameters(), lr=0.1),
        lambda m: SGD([m.net[1].weight], lr=0.1, weight_decay=0.1),
        lambda m: SGD(by_hand(m), lr=0.1, weight_decay=0.1),
        lambda m: torch.optim.LBFGS(m.parameters()),
    ],
    ids=["no weight decay", "weights alone", "done by hand", "no such option"],
)
def test_missing_effect_is_an_error(optimizers):
    with pytest.raises(RuntimeError, match=r"NoBiasDecay\(skip=\['bias', 'norm'\]\)"):
        run(NoBiasDecay(), optimizers=optimizers)


def test_optimizer_that_was_built_before_is_rejected():
    def optimizers(module: Any) -> Any:
        return made

    module = module_class("lightning")(optimizers=optimizers)
    made = SGD(module.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(RuntimeError, match=r"split a parameter group of SGD.*before or after"):
        make_trainer(NoBiasDecay()).fit(module, train_loader(), eval_loader())


class AddsGroup(lightning().Callback):  # type: ignore[misc]
    """Lets the head train from the second epoch on, as finetuning callbacks do."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": pl_module.net[1].parameters(), **self.options})


def test_group_that_is_added_later():
    body = lambda m: SGD(m.net[0].parameters(), lr=0.1, weight_decay=0.1)  # noqa: E731
    with pytest.raises(RuntimeError, match="split a parameter group of SGD"):
        run(NoBiasDecay(), AddsGroup(), optimizers=body)
    run(NoBiasDecay(), AddsGroup(weight_decay=0), optimizers=body)


@pytest.mark.parametrize("how", ["weights as vectors", "one flat parameter"])
def test_flattened_parameters_are_rejected(how):
    class Flattened(module_class("lightning")):  # type: ignore[misc]
        def configure_model(self) -> None:
            if how == "one flat parameter":
                self.net._flat_param = nn.Parameter(torch.zeros(9))
                self.net._flat_param._is_flat_param = True  # isinstance(..., FlatParameter)
            else:
                self.net[1].weight = nn.Parameter(self.net[1].weight.detach().flatten())

    with pytest.raises(RuntimeError, match=r"NoBiasDecay .*ModelParallelStrategy"):
        make_trainer(NoBiasDecay()).fit(Flattened(), train_loader(), eval_loader())


def test_sets_are_left_to_torch():
    with pytest.raises(TypeError, match="tensors in sets"):
        run(NoBiasDecay(), optimizers=lambda m: SGD([{"params": set(m.parameters())}], lr=0.1, weight_decay=0.1))


def test_a_failing_configure_optimizers_leaves_torch_as_it_was():
    original = Optimizer.add_param_group

    def optimizers(module: Any) -> Any:
        assert Optimizer.add_param_group is not original
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(NoBiasDecay(), optimizers=optimizers)
    assert Optimizer.add_param_group is original


# ---------------------------------------------------------------------------------------------------------------------
# Resume


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    def stop(*tricks: Any, **kwargs: Any) -> Any:
        saver = Saver(tmp_path_factory.mktemp("stopped"), steps=[3])
        run(*tricks, saver, max_epochs=1, **kwargs)
        return saver.paths[0]

    return functools.cache(stop)


@pytest.fixture(scope="module")
def checkpoint(stopped):
    return stopped(NoBiasDecay())


def test_checkpoint_has_the_names(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert content["callbacks"]["NoBiasDecay"] == {"groups": [DECAYED, FREE]}


def test_resume_with_the_same_rule(checkpoint):
    full = run(NoBiasDecay(), max_epochs=1)
    resumed = run(NoBiasDecay(["norm", "bias"]), max_epochs=1, ckpt_path=checkpoint)
    assert not differences(resumed.weights, full.weights)
    assert not differences(resumed.optimizers, full.optimizers)


@pytest.mark.parametrize(
    ("skip", "differs"), [(["bias"], "net.0.1.weight"), (["norm"], "net.0.0.bias")], ids=["bias", "norm"]
)
def test_resume_with_another_rule_is_rejected(checkpoint, skip, differs):
    message = rf"the checkpoint was made with another skip or network: '{differs}' differs. Resume with the same"
    with pytest.raises(RuntimeError, match=message):
        run(NoBiasDecay(skip), ckpt_path=checkpoint)


def test_resume_with_parameters_in_another_order_is_rejected(checkpoint):
    with pytest.raises(RuntimeError, match="'their order' differs"):
        run(
            NoBiasDecay(),
            optimizers=lambda m: SGD(list(m.parameters())[::-1], lr=0.1, momentum=0.9, weight_decay=0.1),
            ckpt_path=checkpoint,
        )


def test_resume_of_a_run_without_it_is_rejected(stopped):
    with pytest.raises(RuntimeError, match=r"checkpoint .*without it"):
        run(NoBiasDecay(), ckpt_path=stopped())


def test_resume_without_it_is_an_error(checkpoint):
    with (
        pytest.warns(UserWarning, match="following callbacks: .'NoBiasDecay'"),
        pytest.raises(ValueError, match="parameter groups"),
    ):
        run(ckpt_path=checkpoint)


def test_checkpoint_from_before_the_first_fit(tmp_path):
    """It has no optimizers yet, and no groups. Cross-validation starts its folds from one."""
    trainer = make_trainer(NoBiasDecay())
    trainer.strategy.connect(module_class("lightning")())
    trainer.save_checkpoint(tmp_path / "new.ckpt", weights_only=False)
    end = run(NoBiasDecay(), max_epochs=1, ckpt_path=tmp_path / "new.ckpt")
    assert names(end.trainer) == [(0.01, DECAYED), (0.0, FREE)]


def test_resume_where_the_checkpoint_comes_last():
    """As ModelParallelStrategy restores it: after on_fit_start."""
    trick = NoBiasDecay()
    trick._names.names = [["a"], ["b"]]
    trick.on_load_checkpoint(None, None, {"callbacks": {"NoBiasDecay": {"groups": [["a"], ["b"]]}}})
    with pytest.raises(RuntimeError, match="'b' differs"):
        trick.on_load_checkpoint(None, None, {"callbacks": {"NoBiasDecay": {"groups": [["a", "b"], []]}}})


def test_compiled_networks_have_the_same_names():
    class Compiled(module_class("lightning")):  # type: ignore[misc]
        def configure_model(self) -> None:
            if not hasattr(self.net, "_orig_mod"):
                self.net = torch.compile(self.net, backend="eager")

    trick = NoBiasDecay()
    make_trainer(trick, fast_dev_run=1).fit(Compiled(), train_loader(), eval_loader())
    assert trick.state_dict() == {"groups": [DECAYED, FREE]}
