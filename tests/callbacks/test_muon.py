"""Muon: its update against torch.optim.Muon and the formula in float64, and with other tricks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from helpers.fits import Saver, differences, make_trainer, run
from helpers.modules import lightning
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lit_tricks.callbacks import SWA, LayerDecay, LinearScaling, Muon, NoBiasDecay, WarmupCosine
from lit_tricks.callbacks.muon import muon_lr_scale, orthogonalize

LR, MOMENTUM, DECAY = 0.03, 0.8, 0.2


def formula(matrix: Any) -> Any:
    """Newton and Schulz's iteration of fifth order, with Jordan's coefficients, in float64."""
    x = np.asarray(matrix, dtype=np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(5, 5), (3, 20), (20, 3)])
def test_orthogonalize_is_the_iteration(shape: tuple[int, int]) -> None:
    matrices = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices)
    np.testing.assert_allclose(found.numpy(), [formula(matrix) for matrix in matrices.numpy()], rtol=1e-9, atol=1e-12)
    values = torch.linalg.svdvals(found)
    assert 0.3 < values.min() < values.max() < 1.3
    assert orthogonalize(torch.zeros(1, *shape)).count_nonzero() == 0


class Net(nn.Module):
    """Filters, a depthwise convolution, norm layers, two linear layers: three matrices before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.wide = nn.Conv2d(8, 12, 1)
        self.hidden = nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu()).relu()
        result: Tensor = self.head(self.hidden(self.wide(x).relu().mean((2, 3))).relu())
        return result


MATRICES = ("net.stem.weight", "net.wide.weight", "net.hidden.weight")


class Trained(lightning().LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self, make: Any = lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.make = Net(), make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def images(count: int = 24) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(count, 3, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=4)


def fitted(module: Any, *callbacks: Any, **options: Any) -> Any:
    trainer = make_trainer(*callbacks, **{"max_epochs": 1} | options)
    trainer.fit(module, images())
    return trainer


def reference(make: Any = lambda rest: SGD(rest, lr=0.1, momentum=0.9, weight_decay=1e-3), steps: int = 6) -> nn.Module:
    """Train by hand: torch's Muon on matrices, with filters as matrices, and another optimizer on the rest."""
    module = Trained()
    named = dict(module.named_parameters())
    flat = {name: nn.Parameter(named[name].detach().flatten(1).clone()) for name in MATRICES}
    muon = torch.optim.Muon(list(flat.values()), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    rest = make([parameter for name, parameter in named.items() if name not in MATRICES])
    for _, batch in zip(range(steps), images(), strict=False):
        module.zero_grad()
        module.training_step(batch, 0).backward()
        for name, matrix in flat.items():
            matrix.grad = named[name].grad.flatten(1)  # type: ignore[union-attr]
        muon.step()
        rest.step()
        for name, matrix in flat.items():
            named[name].data.copy_(matrix.detach().view_as(named[name]))
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
        lambda parameters: AdamW(parameters, lr=1e-2),
        lambda parameters: AdamW(parameters, lr=1e-2, fused=True),
        lambda parameters: timm.optim.Lamb(parameters, lr=1e-2),
    ],
    ids=["SGD", "AdamW", "fused", "Lamb"],
)
def test_steps_are_those_of_torch_and_of_the_optimizer(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes in bf16; here with our iteration, whose precision is another test's."""
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz", lambda matrix, *_: orthogonalize(matrix[None].float())[0]
    )
    module = Trained(make)
    fitted(module, Muon(LR, MOMENTUM, DECAY))
    expected = reference(make)
    torch.testing.assert_close(dict(module.named_parameters()), dict(expected.named_parameters()), rtol=2e-4, atol=2e-5)


def test_matrices_are_chosen_and_others_keep_the_optimizer() -> None:
    module, trick = Trained(), Muon(LR)
    optimizer = fitted(module, trick, max_steps=1).optimizers[0]
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = {group["name"]: [names[p] for p in group["params"]] for group in optimizer.param_groups}
    assert groups["muon"] == list(MATRICES)
    assert len(groups["rest"]) == len(names) - len(MATRICES)
    assert trick.effect.startswith("3 weights (384 of ")


def test_scale_of_the_learning_rate_is_torchs() -> None:
    from torch.optim._muon import _adjust_lr

    for rows, columns in ((8, 27), (12, 8), (64, 64)):
        assert muon_lr_scale(rows, columns) == _adjust_lr(1.0, None, torch.Size((rows, columns)))


def test_schedules_change_both_learning_rates() -> None:
    def make(parameters: Any) -> Any:
        return SGD(parameters, lr=0.1)

    rates: list[Any] = []

    class Look(lightning().Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    fitted(Trained(make), Muon(LR), WarmupCosine(warmup_epochs=0.5), Look())
    ratios = {round(each["muon"] / each["rest"], 9) for each in rates if each["rest"]}
    assert ratios == {round(LR / 0.1, 9)}
    assert len({each["rest"] for each in rates}) > 3


def test_a_scheduler_of_the_module_steps_without_a_warning() -> None:
    """Warnings are errors here. torch's scheduler warns if the step that it has wrapped is replaced."""

    def make(parameters: Any) -> Any:
        optimizer = SGD(parameters, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Trained(make)
    groups = fitted(module, Muon(LR)).optimizers[0].param_groups
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx({"rest": 0.1 / 8, "muon": LR / 8})


def test_swa_sets_both_learning_rates_within_a_step() -> None:
    """The rate of the average is lent only for the step, also to the matrices."""
    last: dict[str, float] = {}

    class Spy(Muon):
        def _after_step(self, optimizer: Any, *rest: Any) -> None:
            last.update({group["name"]: group["lr"] for group in optimizer.param_groups})
            super()._after_step(optimizer, *rest)

    module = Trained(lambda parameters: SGD(parameters, lr=0.1))
    module.net.norm = nn.GroupNorm(2, 8)
    fitted(module, Spy(LR), SWA(lr=0.02, start=0.5, every_n_steps=1))
    assert last == pytest.approx({"rest": 0.02, "muon": 0.02 * LR / 0.1})


@pytest.mark.parametrize("order", [1, -1])
def test_other_tricks_of_groups_combine_in_any_order(order: int) -> None:
    tricks = [Muon(LR), NoBiasDecay(), LayerDecay(0.5), LinearScaling(8, batch_size=4)]
    module = Trained()
    optimizer = fitted(module, *tricks[::order], max_steps=1).optimizers[0]
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {
        names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    lr, decay = found["net.hidden.weight"]
    assert (lr, decay) == (pytest.approx(LR / 2 * 0.5), 0.05)
    lr, decay = found["net.head.weight"]
    assert (lr, decay) == (pytest.approx(0.1 / 2), 1e-3)
    assert found["net.hidden.bias"][1] == 0


def test_a_later_scheduler_can_wrap_the_step() -> None:
    class Late(lightning().Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            torch.optim.lr_scheduler.LambdaLR(trainer.optimizers[0], lambda step: 1.0)

    module, plain = Trained(), Trained()
    fitted(module, Muon(LR), Late())
    fitted(plain, Muon(LR))
    assert not differences(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize("where", [1, 3, 5])
def test_a_resumed_run_is_bitwise_the_whole_one(tmp_path: Any, where: int) -> None:
    def make() -> Any:
        return Muon(LR, MOMENTUM, DECAY)

    whole = run(make(), Saver(tmp_path, steps=(where,)))
    resumed = run(make(), ckpt_path=str(tmp_path / f"{where}-batch.ckpt"))
    assert not differences(whole.weights, resumed.weights)
    assert whole.trainer.global_step == resumed.trainer.global_step


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RMSprop", "ASGD", "Adagrad", "OneCycleLR"])
def test_a_run_resumes_with_any_optimizer(tmp_path: Any, kind: str) -> None:
    """Adam and others expect entries of their own in every state that they load."""

    def make(module: Any) -> Any:
        if kind == "OneCycleLR":
            return one_cycle(module.parameters(), max_lr=0.2, total_steps=13)
        return getattr(torch.optim, kind)(module.parameters(), lr=1e-3)

    saver = Saver(tmp_path, steps=(3,))
    whole = run(Muon(LR), saver, optimizers=make)
    resumed = run(Muon(LR), ckpt_path=saver.paths[0], optimizers=make)
    assert whole.trainer.global_step == resumed.trainer.global_step
    assert not differences((whole.weights, whole.optimizers), (resumed.weights, resumed.optimizers))


def test_parameters_without_a_gradient_do_not_move() -> None:
    module = Trained()
    module.net.wide.requires_grad_(False)
    before = module.net.wide.weight.detach().clone()
    fitted(module, Muon(LR))
    assert torch.equal(module.net.wide.weight, before)


def test_gradients_are_there_for_hooks_and_for_clipping() -> None:
    seen: list[float] = []

    class Look(lightning().Callback):  # type: ignore[misc,name-defined]
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                seen.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))

    module = Trained()
    fitted(module, Muon(LR), Look(), gradient_clip_val=1e-3)
    assert len(seen) >= 5
    assert seen == pytest.approx([1e-3] * len(seen), rel=1e-2)


def test_optimizer_is_as_before_after_the_fit() -> None:
    module = Trained(lambda parameters: AdamW(parameters, fused=True))
    optimizer: Any = fitted(module, Muon(LR)).optimizers[0]
    assert optimizer._step_supports_amp_scaling
    assert "step" not in vars(optimizer)
    assert not optimizer._optimizer_step_post_hooks


class Averaging(SGD):
    """An optimizer with the two methods of schedule-free optimizers."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda parameters: torch.optim.LBFGS(parameters), "no single step|LBFGS"),
        (lambda parameters: SGD(parameters, lr=0.0), "learning rate of 0"),
        (lambda parameters: Averaging(parameters, lr=0.1), "Averaging validates an average"),
    ],
)
def test_optimizers_that_do_not_fit_are_rejected(make: Any, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        fitted(Trained(make), Muon())


def one_cycle(parameters: Any, scheduler: Any = torch.optim.lr_scheduler.OneCycleLR, **kwargs: Any) -> Any:
    optimizer = SGD(parameters, lr=0.05, momentum=0.9)
    return [optimizer], [{"scheduler": scheduler(optimizer, **kwargs), "interval": "step"}]


@pytest.mark.parametrize("order", [1, -1])
def test_one_cycle_has_the_learning_rate_of_each_part_as_its_peak(order: int) -> None:
    """OneCycleLR ignores the optimizer's learning rate, so Muon's is the peak. Other factors multiply both peaks."""
    rates: dict[str, list[float]] = {"rest": [], "muon": []}

    class Spy(Muon):
        def _after_step(self, optimizer: Any, *rest: Any) -> None:
            for group in optimizer.param_groups:
                rates[group["name"].split("_")[-1]].append(group["lr"])
            super()._after_step(optimizer, *rest)

    tricks = [Spy(0.04), LinearScaling(8, batch_size=4)]
    module = Trained(partial(one_cycle, max_lr=0.2, total_steps=7))
    fitted(module, *tricks[::order], max_steps=6)
    for name, peak in (("rest", 0.2 / 2), ("muon", 0.04 / 2)):
        [_], [reference] = one_cycle([nn.Parameter(torch.zeros(1))], max_lr=peak, total_steps=7)
        expected = []
        for _ in range(6):
            expected.append(reference["scheduler"].get_last_lr()[0])
            reference["scheduler"].optimizer.step()
            reference["scheduler"].step()
        assert rates[name] == pytest.approx(expected, rel=1e-12), name


def test_schedulers_that_set_one_rate_are_rejected() -> None:
    make = partial(one_cycle, scheduler=torch.optim.lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1)
    with pytest.raises(RuntimeError, match="a scheduler in configure_optimizers of Trained set others"):
        fitted(Trained(make), Muon(LR))


def test_a_module_without_matrices_is_rejected() -> None:
    class Flat(Trained):
        def configure_optimizers(self) -> Any:
            return SGD(self.net.head.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match="no effect"):
        fitted(Flat(), Muon())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, r"Muon\(lr=0\)"),
        ({"lr": math.nan}, r"Muon\(lr=nan\)"),
        ({"momentum": 1.0}, r"Muon\(momentum=1.0\)"),
        ({"weight_decay": -1}, r"Muon\(weight_decay=-1\)"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(**arguments)


def test_manual_optimization_steps_both_parts() -> None:
    class Manual(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module, plain = Manual(), Trained()
    fitted(module, Muon(LR))
    fitted(plain, Muon(LR))
    assert not differences(module.state_dict(), plain.state_dict())


def test_groups_of_a_convolution_are_matrices() -> None:
    class Grouped(Trained):
        def __init__(self) -> None:
            super().__init__(lambda parameters: SGD(parameters, lr=0.1))
            self.net.depthwise = nn.Conv2d(8, 12, 3, groups=4)
            self.net.wide = nn.Conv2d(12, 12, 1)

    module = Grouped()
    before = module.net.depthwise.weight.detach().clone()
    module.training_step(next(iter(images())), 0).backward()
    gradient = module.net.depthwise.weight.grad
    assert gradient is not None
    expected = [formula(part) for part in gradient.double().reshape(4, 3, 18).numpy()]
    module.zero_grad()
    fitted(module, Muon(1.0, momentum=0.0, weight_decay=0.0), max_steps=1)
    found = (before - module.net.depthwise.weight.detach()).reshape(4, 3, 18).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
