"""ZeroGamma: the layers that are found, blocks that start as their shortcuts, and runs that keep their weights."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers.fits import Saver, differences, log_lines, make_trainer, run, weights_of
from helpers.modules import CLASSES, image_and_label, lightning, train_loader
from torch import Tensor, nn

from lit_tricks.callbacks import EMA, XavierInit, ZeroGamma
from lit_tricks.models import resnet
from lit_tricks.utils.modules import is_norm
from lit_tricks.utils.residual import last_norms

NETS: dict[str, Any] = {
    f"timm {name}": functools.partial(timm.create_model, name, in_chans=1, num_classes=3, zero_init_last=False)
    for name in ("resnet18", "resnet18d", "resnet50", "resnet50d")
}
NETS |= {
    f"torchvision {name}": functools.partial(torchvision.models.get_model, name, weights=None)
    for name in ("resnet18", "resnet50")
}
NETS |= {
    f"ours {depth} {variant}": functools.partial(resnet, depth, variant, 3, in_chans=1, width=0.25)
    for depth, variant in [(18, "B"), (18, "D"), (50, "A"), (50, "C")]
}


class Module(lightning().LightningModule):  # type: ignore[misc]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, label = image_and_label(batch)
        return F.cross_entropy(self.net(image), label)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(module: Any, *callbacks: Any, **kwargs: Any) -> Any:
    trainer = make_trainer(*callbacks, **({"max_steps": 1, "limit_val_batches": 0} | kwargs))
    trainer.fit(module, train_loader())
    return trainer


def start(net: nn.Module, *callbacks: Any) -> Any:
    """The module as its first step would find it."""
    module = Module(net)
    fit(module, *callbacks, max_steps=0)
    return module


def zeros(net: nn.Module) -> set[str]:
    """Norm layers whose scale is 0."""
    norms = {name: part for name, part in net.named_modules() if is_norm(part)}
    return {name for name, norm in norms.items() if isinstance(norm.weight, Tensor) and not norm.weight.any()}


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


@pytest.mark.parametrize("name", NETS)
def test_blocks_start_as_their_shortcuts(name):
    net = start(NETS[name](), ZeroGamma()).net.train()
    blocks = [part for part in net.modules() if type(part).__name__ in ("BasicBlock", "Bottleneck")]
    assert len(zeros(net)) == len(blocks) == (8 if "18" in name else 16)
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        shortcut = block.downsample(x) if block.downsample is not None else x
        assert torch.equal(block(x), shortcut.relu())


@pytest.mark.parametrize("name", [name for name in NETS if "18" in name])
def test_the_network_computes_as_without_its_branches(name):
    def branches_to_zero(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return 0 * output

    net = start(NETS[name](), ZeroGamma()).net.eval()
    x = torch.randn(2, 3 if "vision" in name else 1, 32, 32)
    before = net(x)
    for layer in zeros(net):
        norm = net.get_submodule(layer)
        nn.init.ones_(norm.weight)
        norm.register_forward_hook(branches_to_zero)
    assert torch.equal(net(x), before)


def test_gradients_open_the_branches():
    module = Module(NETS["ours 18 D"]())
    trainer = fit(module, trick := ZeroGamma(), max_steps=2, max_epochs=1)
    assert not zeros(module.net)
    before, after = (trainer.logger.metrics[step]["zero_gamma/scale"] for step in (0, 1))
    assert before == 0
    assert after > 0
    assert len(trick._names) == 8


TIMMS = ["resnet26t", "seresnet18", "ecaresnet26t", "resnest14d", "res2net50d", "gcresnext26ts", "regnety_002"]


@pytest.mark.parametrize("name", [*TIMMS, "cspresnet50", "swinv2_cr_tiny_ns_224"])
def test_finds_what_timm_starts_at_zero(name):
    net = timm.create_model(name)
    assert set(last_norms(net)) == zeros(net) != set()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_finds_what_torchvision_starts_at_zero(name):
    net = torchvision.models.get_model(name, weights=None, zero_init_residual=True)
    assert set(last_norms(net)) == zeros(net) != set()


@pytest.mark.parametrize(("name", "found"), [("mobilenet_v2", 10), ("efficientnet_b0", 9), ("mnasnet0_5", 10)])
def test_finds_the_blocks_of_other_networks(name, found):
    with torch.device("meta"):
        assert len(last_norms(torchvision.models.get_model(name, weights=None))) == found


@pytest.mark.parametrize("name", ["vgg11_bn", "densenet121", "convnext_tiny", "shufflenet_v2_x0_5"])
def test_finds_none_where_none_are(name):
    with torch.device("meta"):
        assert not last_norms(torchvision.models.get_model(name, weights=None))


@pytest.mark.parametrize("name", ["resnetv2_50d", "vit_tiny_patch16_224", "repvgg_a0", "legacy_seresnet18"])
def test_finds_none_where_a_norm_does_not_end_a_branch(name):
    with torch.device("meta"):
        assert not last_norms(timm.create_model(name))


# ---------------------------------------------------------------------------------------------------------------------
# Foreign blocks


def conv(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


class Sequence(nn.Module):
    """All in one sequence, with a projection."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.residual = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4))
        self.residual.append(nn.Dropout(dropout))
        self.shortcut = nn.Sequential(conv(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.residual(x))


class Gated(nn.Module):
    """A gate and a drop path between norm and addition, the addition in place, the same activation twice."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.a, self.b, self.n, self.m = conv(), conv(), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
        self.gate, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.drop = timm.layers.DropPath(dropout)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = self.m(self.b(self.act(self.n(self.a(x)))))
        y = y * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]
        y = self.drop(y) * 0.5
        if scale is not None:
            y = y.relu()
        y += x
        return self.act(y)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.a, self.m, self.b = nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.m(self.a(F.relu(self.n(x))))))


class ActivationFirst(nn.Module):
    """The branch ends with a ReLU: from scale 0 it would never open."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.n(self.a(x)))


class NormAct(ActivationFirst):
    def __init__(self) -> None:
        super().__init__()
        self.n = timm.layers.BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.n(self.a(x))


class Parallel(nn.Module):
    """Two branches of equal depth: neither is a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b, self.m = conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.a(x)) + self.m(self.b(x))


class Stubborn(nn.Module):
    """Cannot be traced itself, as its way depends on numbers; what it holds can. And it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.seen = Sequence(), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.last = torch.rand(1), random.random()
        return self.block(x) if x.sum() > 0 else x


FOREIGN = [
    (Sequence, {"residual.4"}),
    (Gated, {"m"}),
    (Stubborn, {"block.residual.4"}),
    (PreActivation, set()),
    (ActivationFirst, set()),
    (NormAct, set()),
    (Parallel, set()),
]


@pytest.mark.parametrize(("block", "found"), FOREIGN, ids=lambda value: getattr(value, "__name__", ""))
def test_foreign_blocks_are_found(block, found):
    assert set(last_norms(block())) == found
    assert set(last_norms(nn.Sequential(conv(), block(), block()))) == {f"{i}.{name}" for i in (1, 2) for name in found}


def test_a_block_that_is_used_twice_counts_once():
    block = Sequence()
    assert set(last_norms(nn.Sequential(block, block))) == {"0.residual.4"}


@pytest.mark.parametrize("part", ["a convolution", "a norm"])
def test_modules_without_blocks(part):
    assert not last_norms(conv() if part == "a convolution" else nn.BatchNorm2d(4))


def test_looking_changes_nothing():
    net = nn.Sequential(Stubborn(), Gated())
    net[1].register_forward_hook(lambda *_: 1 / 0)
    states = random.getstate(), torch.get_rng_state()
    attributes = {name: dict(vars(part)) for name, part in net.named_modules()}
    modes = [part.training for part in net.modules()]
    assert set(last_norms(net)) == {"0.block.residual.4", "1.m"}
    assert {name: dict(vars(part)) for name, part in net.named_modules()} == attributes
    assert [part.training for part in net.modules()] == modes
    assert not net[0].seen
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


# ---------------------------------------------------------------------------------------------------------------------
# When, and which


class Classifier(nn.Sequential):
    """Two residual blocks."""

    def __init__(self) -> None:
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
        super().__init__(nn.Conv2d(1, 4, 3), Gated(0.0), Sequence(0.0), *head)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, {"1.m", "2.residual.4"}),
        (["net.1.*"], {"1.n", "1.m"}),
        (["*.n", "net.2.shortcut.1"], {"1.n", "2.shortcut.1"}),
        (["*.residual.?"], {"2.residual.1", "2.residual.4"}),
    ],
)
def test_layers_by_pattern_start_at_zero(layers, expected):
    assert zeros(start(Classifier(), ZeroGamma(layers)).net) == expected


def test_a_pattern_without_a_layer_is_an_error():
    message = r"found no layers like \['\*\.bn9'\] in Module.*are trained: net.1.n, net.1.m, ..., net.2.shortcut.1\."
    with pytest.raises(RuntimeError, match=message):
        start(Classifier(), ZeroGamma(["net.1.m", "*.bn9"]))


def test_no_block_is_an_error():
    with pytest.raises(RuntimeError, match=r"no residual branches.*Classifier"):
        run(ZeroGamma())


@pytest.mark.parametrize("layers", [[], "*.bn2"])
def test_arguments_out_of_range(layers):
    with pytest.raises(ValueError, match=r"layers=.*must be a list"):
        ZeroGamma(layers)


def test_frozen_weights_stay_unchanged():
    """A frozen teacher, and a network that no optimizer has."""

    class Student(Module):
        def __init__(self) -> None:
            super().__init__(Classifier())
            self.teacher, self.other = Classifier().requires_grad_(False), Classifier()
            self.other[1].m.weight.data.normal_()  # trained

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    module = Student()
    fit(module, ZeroGamma(), max_steps=0)
    assert (zeros(module.net), zeros(module.teacher), zeros(module.other)) == ({"1.m", "2.residual.4"}, set(), set())


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_networks_that_are_built_late(hook):
    class Late(Module):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def build(self, stage: str = "") -> None:
            if isinstance(self.net, nn.Identity):
                self.net = Classifier()

    setattr(Late, hook, Late.build)
    module = Late()
    fit(module, ZeroGamma(), max_steps=0)
    assert zeros(module.net) == {"1.m", "2.residual.4"}


def test_compiled_networks_are_initialized():
    module = Module(torch.compile(Classifier(), backend="eager"))
    fit(module, ZeroGamma(), max_steps=0)
    assert zeros(module.net._orig_mod) == {"1.m", "2.residual.4"}


def test_says_what_it_found():
    with log_lines() as records:
        fit(Module(Classifier()), ZeroGamma())
        fit(Module(NETS["ours 18 D"]()), ZeroGamma())
    first, second = (record.getMessage().split(": ") for record in records)
    assert first == ["ZeroGamma", "residual branches that start at scale 0", "2 (net.1.m, net.2.residual.4)"]
    assert second[2] == "8 (net.layer1.0.bn2, net.layer1.1.bn2, ..., net.layer4.1.bn2)"


def test_other_copies_of_the_weights_are_made_later():
    """Whatever the order of the callbacks: an average starts from the scales of 0."""
    ends = []
    for tricks in ([EMA(decay=0.5), ZeroGamma()], [ZeroGamma(), EMA(decay=0.5)]):
        torch.manual_seed(0)
        module = Module(Classifier())
        fit(module, *tricks, max_steps=3)
        ends.append(weights_of(module))
    assert not differences(*ends)


def test_twice_in_the_list_is_an_error():
    with pytest.raises(RuntimeError, match=r"ZeroGamma .*twice"):
        start(Classifier(), ZeroGamma(), ZeroGamma(["*.n"]))


def test_networks_that_start_so_are_warned_of():
    trick = ZeroGamma()
    with (
        log_lines() as records,
        pytest.warns(UserWarning, match=r"ZeroGamma .*nothing: .*Module"),
    ):
        fit(Module(timm.create_model("resnet18", in_chans=1, num_classes=3)), trick)
    assert records[0].getMessage().startswith("ZeroGamma: residual branches that start at scale 0 already: 8 (net.la")


def test_a_fit_before_the_first_step_may_be_repeated():
    """As after a fit that a learning rate finder made, or one that failed at once."""
    trick, module = ZeroGamma(), Module(Classifier())
    for _ in range(2):
        fit(module, trick, max_steps=0)
        assert zeros(module.net) == {"1.m", "2.residual.4"}


# ---------------------------------------------------------------------------------------------------------------------
# Trained weights


def test_weights_that_were_trained_are_rejected():
    module = Module(Classifier())
    fit(module, ZeroGamma())
    message = r"ZeroGamma is for a run from scratch, and Module was trained before: net.1.m.weight differs from channel"
    before = weights_of(module)
    with pytest.raises(RuntimeError, match=message):
        fit(module, ZeroGamma())
    assert not differences(weights_of(module), before)


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda net: net[2].residual[1].running_mean.add_(1), "net.2.residual.1.running_mean is not 0"),
        (lambda net: net[1].n.bias.data[0].add_(1), "net.1.n.bias differs from channel to channel"),
    ],
)
@pytest.mark.parametrize("trick", [ZeroGamma, XavierInit])
def test_signs_of_training(trick, change, sign):
    net = Classifier()
    change(net)
    with pytest.raises(RuntimeError, match=rf"{trick.__name__} .*from scratch.*: {sign}"):
        start(net, trick())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_new_networks_show_no_signs_of_training(name):
    from lit_tricks.callbacks.optim.initializer import sign_of_training

    net = timm.create_model(name)
    assert not sign_of_training(net, set(net.parameters()))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_resumed_runs_are_left_alone(tmp_path):
    saver = Saver(tmp_path, steps=[2])
    torch.manual_seed(0)
    full = Module(Classifier())
    fit(full, ZeroGamma(), saver, max_steps=4)
    resumed = Module(Classifier())
    with log_lines() as records:
        trainer = make_trainer(ZeroGamma(), max_steps=4, limit_val_batches=0)
        trainer.fit(resumed, train_loader(), ckpt_path=saver.paths[0], weights_only=True)
    assert not differences(weights_of(resumed), weights_of(full))
    assert [record.getMessage() for record in records] == [
        "ZeroGamma: nothing to do, since the run resumes with its own weights"
    ]
    assert trainer.logger.metrics[2]["zero_gamma/scale"] > 0


def test_a_second_fit_of_the_same_trainer_is_left_alone():
    module = Module(Classifier())
    trainer = fit(module, ZeroGamma(), max_steps=2)
    before = weights_of(module)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(module, train_loader())
    assert not zeros(module.net)
    assert not differences(weights_of(module), before)


def test_folds_with_the_same_object():
    trick = ZeroGamma()
    for _ in range(2):
        module = Module(Classifier())
        fit(module, trick, max_steps=0)
        assert zeros(module.net) == {"1.m", "2.residual.4"}
