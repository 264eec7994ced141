"""The distribution that XavierInit draws from, whose random numbers it takes, and which weights it leaves unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import Saver, differences, log_lines, make_trainer, run, weights_of
from helpers.modules import CLASSES, eval_loader, image_and_label, lightning, module_class, train_loader
from torch import Tensor, nn

from lit_tricks.callbacks import EMA, NoBiasDecay, XavierInit, ZeroGamma
from lit_tricks.callbacks.xavier_init import _variance, xavier_uniform
from lit_tricks.models import resnet
from lit_tricks.utils.dtensor import part_for, to_local


class Module(lightning().LightningModule):  # type: ignore[misc]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, label = image_and_label(batch)
        return F.cross_entropy(self.net(image), label)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=0.1)


def start(net: Any, *callbacks: Any, seed: int = 0, **kwargs: Any) -> Any:
    """The module, or the one around a network, as its first step would find it."""
    module = net if isinstance(net, lightning().LightningModule) else Module(net)
    torch.manual_seed(seed)
    trainer = make_trainer(*callbacks, **({"max_steps": 0, "limit_val_batches": 0} | kwargs))
    trainer.fit(module, train_loader())
    return module


def tiny() -> nn.Sequential:
    body = [nn.Conv2d(1, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.BatchNorm2d(6)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


# ---------------------------------------------------------------------------------------------------------------------
# The distribution

SHAPES = {  # with the bound a = sqrt(6 / (d_in + d_out)), by hand
    (512, 256): math.sqrt(6 / 768),
    (1000, 2048): math.sqrt(6 / 3048),
    (64, 3, 7, 7): math.sqrt(6 / (147 + 3136)),
    (128, 128, 3, 3): math.sqrt(6 / (1152 + 1152)),
    (96, 1, 5, 5): math.sqrt(6 / (25 + 2400)),
    (32, 16, 3, 3, 3): math.sqrt(6 / (432 + 864)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_bounds_and_moments(shape):
    bound, n = SHAPES[shape], math.prod(shape)
    weight = xavier_uniform(shape, torch.Generator().manual_seed(0)).double() / bound
    assert weight.shape == shape
    assert 1 - 20 / n < weight.abs().max() <= 1 + 1e-6
    assert weight.mean().abs() < 4 / math.sqrt(3 * n)
    assert (weight.square().mean() - 1 / 3).abs() < 4 * math.sqrt(4 / 45 / n)
    assert _variance(torch.empty(shape)) == pytest.approx(bound**2 / 3, rel=1e-15)


def test_weights_are_uniform_by_kolmogorov_smirnov():
    """Kolmogorov and Smirnov, at a level of one in a million."""
    weight = xavier_uniform((200, 100), torch.Generator().manual_seed(0)).double().flatten().sort().values
    bound = math.sqrt(6 / 300)
    empirical = torch.arange(1, len(weight) + 1, dtype=torch.float64) / len(weight)
    distance = (empirical - (weight / bound + 1) / 2).abs().max()
    assert distance < math.sqrt(-math.log(0.5e-6) / 2 / len(weight))


def test_variance_of_activations_and_gradients_is_kept():
    """The purpose of the method, in a deep linear network (Glorot & Bengio, section 4.2)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 200, generator=generator, dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(10):
        y = y @ xavier_uniform((200, 200), generator).double().T
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64))
    assert y.var().item() == pytest.approx(1, abs=0.25)
    assert x.grad.var().item() == pytest.approx(1, abs=0.25)


def test_the_generator_is_the_only_source():
    left, right = (xavier_uniform((4, 5), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(left, right)
    assert not torch.equal(left, xavier_uniform((4, 5), torch.Generator().manual_seed(4)))


# ---------------------------------------------------------------------------------------------------------------------
# A network


def test_convolutions_and_linear_layers_are_drawn_and_norms_are_not():
    net = tiny()
    with torch.no_grad():
        net[1].weight.fill_(0.5)
    before = weights_of(net)
    start(net, XavierInit())
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if not isinstance(net[int(name[0])], nn.Conv2d | nn.Linear):
            assert torch.equal(value, before[name]), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            assert torch.equal(value, nn.init.xavier_uniform_(torch.empty(value.shape), generator=generator)), name


def test_is_the_initialisation_of_our_resnet():
    """The same distribution as ``init="xavier"`` there: spread of every layer, biases and norms."""
    ours = resnet(18, "D", 10, in_chans=1, init="xavier")
    net = start(resnet(18, "D", 10, in_chans=1), XavierInit()).net
    for (name, left), right in zip(ours.named_parameters(), net.parameters(), strict=True):
        if left.ndim > 1:
            assert left.abs().max().item() == pytest.approx(right.abs().max().item(), rel=1e-1), name
            assert left.std().item() == pytest.approx(right.std().item(), rel=2e-1), name
        else:
            assert torch.equal(left, right), name


def test_same_seed_same_weights_whatever_was_drawn_before():
    first, second = tiny(), tiny()
    assert differences(weights_of(first), weights_of(second))
    assert not differences(weights_of(start(first, XavierInit())), weights_of(start(second, XavierInit())))


def test_seed_decides_the_weights():
    of_torch, same, other = (
        weights_of(start(tiny(), XavierInit(trick_seed), seed=seed))
        for trick_seed, seed in ((None, 7), (7, 0), (None, 8))
    )
    assert not differences(of_torch, same)
    assert differences(of_torch, other)


def test_global_random_numbers_are_untouched():
    states = []
    for tricks in ([], [XavierInit()]):
        start(tiny(), *tricks, seed=5)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_hold_the_same_numbers(precision):
    net, reference = start(tiny(), XavierInit(), precision=precision).net, start(tiny(), XavierInit()).net
    for left, right in zip(net.parameters(), reference.parameters(), strict=True):
        assert left.dtype != right.dtype
        assert torch.equal(left, right.to(left.dtype))


def test_ranks_take_the_seed_of_the_first(monkeypatch):
    monkeypatch.setattr(lightning().strategies.SingleDeviceStrategy, "broadcast", lambda self, seed, src=0: 7)
    with log_lines() as records:
        there = weights_of(start(tiny(), XavierInit(), seed=1, max_steps=1))
    assert "with seed 7" in records[0].getMessage()
    monkeypatch.undo()
    assert not differences(there, weights_of(start(tiny(), XavierInit(), seed=7, max_steps=1)))


def test_shards_hold_their_part(tmp_path):
    dist = torch.distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.zeros(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
        to_local(sharded).copy_(part_for(sharded, source := torch.randn(4, 3)))
        assert torch.equal(sharded.full_tensor(), source)
    finally:
        dist.destroy_process_group()


def test_shared_weights_are_drawn_once():
    net = tiny()
    twice = nn.Sequential(net[0], nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3), *net[5:])
    twice[2].weight = twice[1].weight
    with log_lines() as records:
        start(twice, XavierInit(), max_steps=1)
    assert records[0].getMessage() == "XavierInit: 3 weights drawn with seed 0, 4 biases at 0"


# ---------------------------------------------------------------------------------------------------------------------
# With others


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_any_order_of_the_callbacks(order):
    def tricks() -> list[Any]:
        made = [XavierInit(), ZeroGamma(["*.4"]), NoBiasDecay(), EMA(decay=0.5)]
        return [made[i] for i in order]

    nets = [tiny() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    left = start(nets[0], *tricks(), max_steps=3)
    right = start(nets[1], XavierInit(), ZeroGamma(["*.4"]), NoBiasDecay(), EMA(decay=0.5), max_steps=3)
    assert not differences(weights_of(left), weights_of(right))
    net = start(tiny(), *tricks()).net
    assert not net[4].weight.any()
    assert torch.equal(net[1].weight, torch.ones(6))
    assert not net[0].bias.any()


def test_growth_is_logged():
    module = start(resnet(18, "B", CLASSES, in_chans=1), XavierInit(), max_steps=2)
    growth = [module.trainer.logger.metrics[step]["xavier_init/growth"] for step in range(2)]
    assert growth[0] == pytest.approx(1, abs=2e-3)
    assert growth[1] != growth[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is left unchanged, and rejected


def test_frozen_weights_stay_unchanged():
    """A frozen teacher, the network of a metric, frozen layers."""

    class Student(Module):
        def __init__(self) -> None:
            super().__init__(tiny())
            self.net[3].requires_grad_(False)
            self.teacher, self.metric = tiny().requires_grad_(False), tiny()
            self.teacher[4].running_mean.fill_(1)  # they are trained
            self.metric[4].running_mean.fill_(1)

        def configure_optimizers(self) -> Any:
            parameters = (p for p in self.net.parameters() if p.requires_grad)
            return torch.optim.SGD(parameters, lr=0.1)

    module = Student()
    before = weights_of(module)
    start(module, XavierInit())
    changed = {name for name, value in weights_of(module).items() if not torch.equal(value, before[name])}
    assert changed == {f"net.{i}.{name}" for i in (0, 7) for name in ("weight", "bias")}


def test_loaded_weights_are_rejected():
    module = start(tiny(), max_steps=1)
    before = weights_of(module)
    message = r"XavierInit is for a run from scratch, and Module was trained before: net.1.\w+ differs from channel to"
    with pytest.raises(RuntimeError, match=message):
        start(module, XavierInit())
    assert not differences(weights_of(module), before)


def test_weights_of_a_classifier_of_the_library_are_rejected(tmp_path):
    from lit_tricks import Classifier

    trained = start(resnet(18, "B", CLASSES, in_chans=1, width=0.125), max_steps=1)
    torch.save(trained.net.state_dict(), tmp_path / "trained.pt")
    args = {"depth": 18, "variant": "B", "width": 0.125}
    module = Classifier("resnet", CLASSES, args, weights=str(tmp_path / "trained.pt"), input_size=(1, 8, 8))
    with pytest.raises(RuntimeError, match="Classifier was trained before"):
        make_trainer(XavierInit()).fit(module, train_loader(), eval_loader())


def test_nothing_to_draw_is_an_error():
    with pytest.raises(RuntimeError, match=r"found no convolution.*Module"):
        start(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), XavierInit())


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrized_weights_are_rejected(kind):
    net = tiny()
    getattr(nn.utils.parametrizations, kind)(net[0])
    with pytest.raises(RuntimeError, match=r"XavierInit .*net.0.*parametrized"):
        start(net, XavierInit())


def test_flattened_parameters_are_rejected():
    net = tiny()
    net[7].weight = nn.Parameter(net[7].weight.detach().flatten())
    with pytest.raises(RuntimeError, match=r"XavierInit .*shapes"):
        start(net, XavierInit())


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="seed=-1"):
        XavierInit(-1)


def test_resumed_runs_are_left_alone(tmp_path):
    saver = Saver(tmp_path, steps=[3])
    full = run(XavierInit(), saver, max_epochs=1)
    with log_lines() as records:
        resumed = run(XavierInit(seed=9), max_epochs=1, ckpt_path=saver.paths[0])
    assert not differences(resumed.weights, full.weights)
    assert [record.getMessage() for record in records] == [
        "XavierInit: nothing to do, since the run resumes with its own weights"
    ]


def test_checkpoint_from_before_the_first_fit(tmp_path):
    """The run that starts from it is one from scratch. Cross-validation starts its folds so."""
    trainer = make_trainer(XavierInit())
    trainer.strategy.connect(module_class("lightning")())
    trainer.save_checkpoint(tmp_path / "new.ckpt", weights_only=False)
    tricks = [XavierInit(), ZeroGamma(["net.0.1"])]
    first = run(*tricks, max_epochs=1, ckpt_path=tmp_path / "new.ckpt")
    assert not differences(first.weights, run(*tricks, max_epochs=1).weights)
    first.trainer.fit(first.module, train_loader(), eval_loader(), ckpt_path=tmp_path / "new.ckpt", weights_only=True)
    assert not differences(weights_of(first.module), first.weights)


def test_resume_where_the_checkpoint_comes_last():
    """As ModelParallelStrategy restores it: after on_fit_start. The first weights are drawn, and overwritten."""

    trick = XavierInit()
    trick._effect = "2 weights drawn"
    trick.on_load_checkpoint(None, None, {"global_step": 0})  # of a learning rate finder
    assert trick._effect == "2 weights drawn"
    trick.on_load_checkpoint(None, None, {"global_step": 3})
    assert trick._effect.startswith("nothing to do")


@pytest.mark.filterwarnings("ignore")
def test_the_tuner_of_lightning_finds_a_rate_first(tmp_path):
    """It fits, restores what was there before it, and lets the fit begin anew."""

    class Tuned(module_class("lightning")):  # type: ignore[misc]
        lr = 0.1

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = Tuned()
    trainer = make_trainer(XavierInit(), ZeroGamma(["net.0.1"]), max_epochs=1, default_root_dir=tmp_path)
    tuner = lightning().tuner.Tuner(trainer)
    torch.manual_seed(0)
    tuner.lr_find(module, train_loader(batches=30), eval_loader(), num_training=10, early_stop_threshold=None)
    with log_lines() as records:
        trainer.fit(module, train_loader(), eval_loader())
    assert [record.getMessage() for record in records] == [
        "XavierInit: 2 weights drawn with seed 0, 2 biases at 0",
        "ZeroGamma: residual branches that start at scale 0 already: 1 (net.0.1)",
    ]
