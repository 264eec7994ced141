"""The numbers of the schedules, and what they find in a run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.fits import Saver, differences, make_trainer, run
from helpers.modules import BATCHES, eval_loader, lightning, module_class, train_loader
from helpers.tricks import TRICKS
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from lit_tricks.callbacks import (
    WarmupCosine,
    WarmupExponential,
    WarmupLinear,
    WarmupPoly,
    WarmupStableDecay,
    WarmupStep,
)
from lit_tricks.callbacks.warmup_cosine import warmup_cosine
from lit_tricks.callbacks.warmup_exponential import warmup_exponential
from lit_tricks.callbacks.warmup_linear import warmup_linear
from lit_tricks.callbacks.warmup_poly import warmup_poly
from lit_tricks.callbacks.warmup_stable_decay import warmup_stable_decay
from lit_tricks.callbacks.warmup_step import warmup_step

STEPS = 3 * BATCHES  # of a run of ``_fits.run``


def sgds(*lrs: float | tuple[float, ...]) -> Any:
    """Makes an SGD for the module, or one for each of its parts; with a group for each of several rates."""

    def make(module: Any) -> list[torch.optim.SGD]:
        optimizers = []
        for part, rates in zip([module.net] if len(lrs) == 1 else module.net, lrs, strict=True):
            parts = part if isinstance(rates, tuple) else [part]
            groups = [{"params": list(p.parameters())} for p in parts]
            for group, lr in zip(groups, rates if isinstance(rates, tuple) else [rates], strict=True):
                group["lr"] = lr
            optimizers.append(torch.optim.SGD(groups, lr=0.0, momentum=0.9))
        return optimizers

    return make


class Recorder:
    """Makes the optimizers, and keeps the rates of all their groups at each step: ``lrs[optimizer][step]``."""

    def __init__(self, make: Any) -> None:
        self.make = make
        self.lrs: list[list[list[float]]] = []

    def __call__(self, module: Any) -> Any:
        optimizers = self.make(module)
        self.lrs = [[] for _ in optimizers]
        for optimizer, seen in zip(optimizers, self.lrs, strict=True):
            optimizer.register_step_pre_hook(
                lambda opt, *_, seen=seen: seen.append([float(group["lr"]) for group in opt.param_groups])
            )
        return optimizers


def rates(*callbacks: Any, base_lr: float = 0.25, **kwargs: Any) -> list[float]:
    """Learning rates of the steps of a run with one parameter group."""
    recorder = Recorder(sgds(base_lr))
    run(*callbacks, optimizers=recorder, **kwargs)
    return [lr for [lr] in recorder.lrs[0]]


def scheduled(make_scheduler: Any, *callbacks: Any, **kwargs: Any) -> tuple[list[float], Any]:
    """Learning rates, and the end, of the same run with a scheduler of torch in ``configure_optimizers``."""
    recorder = Recorder(sgds(0.25))

    def optimizers(module: Any) -> Any:
        [optimizer] = recorder(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make_scheduler(optimizer), "interval": "step"}}

    end = run(*callbacks, optimizers=optimizers, **kwargs)
    return [lr for [lr] in recorder.lrs[0]], end


# ---------------------------------------------------------------------------------------------------------------------
# The closed forms


@pytest.mark.parametrize("schedule", ["cosine", "step", "exponential", "linear", "poly", "stable"])
def test_batch_i_of_m_of_the_warm_up_has_i_times_lr_over_m(schedule):
    """He et al., 2019, section 3.1."""
    eta, m = 0.4, 7
    lr = {
        "cosine": lambda step: warmup_cosine(step, eta, total_steps=50, warmup_steps=m),
        "step": lambda step: warmup_step(step, eta, milestones=[20], warmup_steps=m),
        "exponential": lambda step: warmup_exponential(step, eta, every_n_steps=5, warmup_steps=m),
        "linear": lambda step: warmup_linear(step, eta, total_steps=50, warmup_steps=m),
        "poly": lambda step: warmup_poly(step, eta, total_steps=50, warmup_steps=m),
        "stable": lambda step: warmup_stable_decay(step, eta, total_steps=50, decay_steps=10, warmup_steps=m),
    }[schedule]
    assert [lr(i - 1) for i in range(1, m + 1)] == [i * eta / m for i in range(1, m + 1)]
    assert lr(m) == eta


def test_cosine_of_the_paper():
    """He et al., 2019, section 5.1: ``(1 + cos(t pi / T)) / 2 * eta``, T without the warm-up; t from 0 for 64 bits."""
    eta, m, total = 0.4, 5 * 1251, 120 * 1251
    t = torch.arange(total - m, dtype=torch.float64)
    paper = (1 + torch.cos(t * torch.pi / (total - m))) / 2 * eta
    ours = [warmup_cosine(step, eta, total, m) for step in range(m, total)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), paper, rtol=0, atol=1e-15)
    assert warmup_cosine(total, eta, total, m) == 0
    assert warmup_cosine(total + 9, eta, total, m, min_lr=0.1) == 0.1


def test_cosine_ends_at_min_lr_and_has_its_mean_half_way():
    assert warmup_cosine(0, 0.5, 100, min_lr=0.1) == 0.5
    assert warmup_cosine(50, 0.5, 100, min_lr=0.1) == pytest.approx(0.3, rel=1e-15)
    assert warmup_cosine(99, 0.5, 100, min_lr=0.1) == pytest.approx(0.1 + 0.2 * (1 - math.cos(math.pi / 100)), rel=1e-9)


def test_steps_of_multi_factor_scheduler():
    """Gluon's MultiFactorScheduler: walks through the milestones and multiplies."""
    lr, gamma, milestones = 0.5, 0.1, [30, 60, 90]
    walked, left = lr, list(milestones)
    for step in range(120):
        while left and step >= left[0]:
            walked *= gamma
            left.pop(0)
        assert warmup_step(step, lr, milestones, gamma) == pytest.approx(walked, rel=1e-15)
    assert warmup_step(119, lr, []) == lr


def test_exponential_falls_every_two_epochs():
    """Szegedy et al., 2016: decay every two epochs with a rate of 0.94. Here after a warm-up of one epoch of 10."""
    lr = 0.045
    for epoch, step in itertools.product(range(9), range(10)):
        expected = (step + 1) * lr / 10 if epoch == 0 else lr * 0.94 ** ((epoch - 1) // 2)
        assert warmup_exponential(10 * epoch + step, lr, 20, warmup_steps=10) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 2.0])
def test_poly_of_deeplab(power):
    """Chen et al., 2016: ``lr * (1 - iter / max_iter) ** power``; here down to ``min_lr``."""
    share = torch.arange(100, dtype=torch.float64) / 100
    for min_lr in (0.0, 0.05):
        expected = min_lr + (0.4 - min_lr) * (1 - share) ** power
        ours = [warmup_poly(step, 0.4, 100, power, min_lr=min_lr) for step in range(100)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=0, atol=1e-15)
    assert warmup_poly(100, 0.4, 100, power, min_lr=0.05) == warmup_poly(900, 0.4, 100, power, min_lr=0.05) == 0.05


def test_linear_is_a_poly_of_power_one():
    ours = [warmup_linear(step, 0.3, 70, 9, 0.01) for step in range(75)]
    assert ours == [warmup_poly(step, 0.3, 70, 1.0, 9, 0.01) for step in range(75)]


@pytest.mark.parametrize("shape", ["1-sqrt", "linear"])
def test_stable_decay_of_the_paper(shape):
    """Hägele et al., 2024, section 3: ``f(n, N, N_decay) = 1 - sqrt((n - (N - N_decay)) / N_decay)``, or a line."""
    n = torch.arange(120, dtype=torch.float64)
    progress = ((n - (120 - 30)) / 30).clamp(min=0)
    expected = 0.02 + (0.4 - 0.02) * (1 - (progress.sqrt() if shape == "1-sqrt" else progress))
    expected[:8] = 0.4 * (n[:8] + 1) / 8
    ours = [warmup_stable_decay(step, 0.4, 120, 30, 8, 0.02, shape) for step in range(120)]
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), expected, rtol=0, atol=1e-15)
    assert warmup_stable_decay(120, 0.4, 120, 30, 8, 0.02, shape) == 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Against torch's schedulers, in runs


def test_cosine_is_a_lambda_lr_bit_by_bit():
    def factor(step: int) -> float:
        if step < 4:
            return (step + 1) / 4
        return (1 + math.cos(math.pi * ((step - 4) / (STEPS - 4)))) / 2

    recorder = Recorder(sgds(0.25))  # a power of two, so that multiplying by it is exact
    end = run(WarmupCosine(warmup_epochs=1), optimizers=recorder)
    expected, expected_end = scheduled(lambda optimizer: LambdaLR(optimizer, factor))
    assert [lr for [lr] in recorder.lrs[0]] == expected
    assert not differences(end.weights, expected_end.weights)


def test_cosine_is_a_sequential_lr():
    """The reference joins a linear and a cosine schedule, both recursive: equal up to rounding."""

    def sequence(optimizer: Any) -> Any:
        up = LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
        down = CosineAnnealingLR(optimizer, T_max=STEPS - 4, eta_min=0.05)
        return SequentialLR(optimizer, [up, down], milestones=[4])

    expected, _ = scheduled(sequence)
    assert rates(WarmupCosine(warmup_epochs=1, min_lr=0.05)) == pytest.approx(expected, rel=1e-12)


def test_steps_are_a_multi_step_lr_bit_by_bit():
    expected, _ = scheduled(lambda optimizer: MultiStepLR(optimizer, [BATCHES, 2 * BATCHES], gamma=0.5))
    assert rates(WarmupStep(milestones=[1, 2], gamma=0.5, warmup_epochs=0)) == expected


def test_exponential_is_a_step_lr_bit_by_bit():
    expected, _ = scheduled(lambda optimizer: StepLR(optimizer, step_size=6, gamma=0.5))
    assert rates(WarmupExponential(gamma=0.5, every_n_epochs=1.5, warmup_epochs=0)) == expected


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_poly_is_a_polynomial_lr(power):
    expected, _ = scheduled(lambda optimizer: PolynomialLR(optimizer, total_iters=STEPS, power=power))
    assert rates(WarmupPoly(power=power)) == pytest.approx(expected, rel=1e-12)


def test_linear_is_a_sequential_lr():
    def sequence(optimizer: Any) -> Any:
        up = LinearLR(optimizer, start_factor=1 / 4, total_iters=3)
        down = LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=STEPS - 4)
        return SequentialLR(optimizer, [up, down], milestones=[4])

    expected, _ = scheduled(sequence)
    assert rates(WarmupLinear(warmup_epochs=1, min_lr=0.05)) == pytest.approx(expected, rel=1e-12)


def test_stable_decay_extended_before_the_decay_is_the_longer_run(tmp_path):
    """A checkpoint from before the decay belongs to runs of every length, bit by bit."""
    saver = Saver(tmp_path, steps=(BATCHES,))
    run(WarmupStableDecay(decay=0.5, warmup_epochs=0.5), saver, optimizers=sgds(0.25), max_epochs=2)
    recorder = Recorder(sgds(0.25))
    whole = run(WarmupStableDecay(decay=0.5, warmup_epochs=0.5), optimizers=recorder, max_epochs=6)
    longer = run(
        WarmupStableDecay(decay=0.5, warmup_epochs=0.5), optimizers=sgds(0.25), max_epochs=6, ckpt_path=saver.paths[0]
    )
    assert [lr for [lr] in recorder.lrs[0]] == [
        warmup_stable_decay(step, 0.25, 6 * BATCHES, 3 * BATCHES, 2) for step in range(6 * BATCHES)
    ]
    assert not differences(longer.weights, whole.weights)


def test_stable_decay_begins_after_the_warm_up():
    expected = [warmup_stable_decay(step, 0.25, STEPS, STEPS - BATCHES, BATCHES) for step in range(STEPS)]
    assert rates(WarmupStableDecay(decay=0.9, warmup_epochs=1)) == expected


@pytest.mark.parametrize("trick", [WarmupCosine, WarmupLinear, WarmupPoly, WarmupStableDecay])
def test_end_above_the_configured_rate_is_rejected(trick):
    with pytest.raises(ValueError, match=rf"{trick.__name__}\(min_lr=0.5\).*0.25"):
        run(trick(min_lr=0.5, warmup_epochs=0), optimizers=sgds(0.25))


def test_every_group_keeps_its_own_rate():
    recorder = Recorder(sgds((0.5, 0.125)))
    run(WarmupCosine(warmup_epochs=1), optimizers=recorder)
    for step, lrs in enumerate(recorder.lrs[0]):
        assert lrs == [warmup_cosine(step, lr, STEPS, 4) for lr in (0.5, 0.125)]
    assert len(recorder.lrs[0]) == STEPS


def test_two_optimizers_by_hand():
    recorder = Recorder(sgds(0.5, 0.125))
    end = run(WarmupCosine(warmup_epochs=1), optimizers=recorder, manual=True)
    for lr, seen in zip((0.5, 0.125), recorder.lrs, strict=True):
        assert seen == [[warmup_cosine(step, lr, STEPS, 4)] for step in range(STEPS)]
    assert end.logged[5]["lr-SGD-1"] == pytest.approx(warmup_cosine(5, 0.125, STEPS, 4))


def test_rate_of_a_tensor_is_written_into_it():
    """Compiled and capturable optimizers hold on to the tensor."""
    tensor = torch.tensor(0.25)
    seen = []

    def adam(module: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=tensor, foreach=False)
        optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
        return optimizer

    end = run(WarmupCosine(warmup_epochs=1), optimizers=adam, max_epochs=2)
    assert all(lr is seen[0] for lr in seen)
    assert seen[0].item() == pytest.approx(warmup_cosine(7, 0.25, 8, 4))
    assert end.logged[2]["lr-Adam"] == pytest.approx(3 * 0.25 / 4)


# ---------------------------------------------------------------------------------------------------------------------
# How long the run is


def cosine(total: int, warmup: int, base_lr: float = 0.25) -> list[float]:
    return [warmup_cosine(step, base_lr, total, warmup) for step in range(total)]


def test_schedule_ends_with_max_epochs():
    assert rates(WarmupCosine(warmup_epochs=0.5), max_epochs=2) == cosine(8, 2)


@pytest.mark.parametrize("max_epochs", [-1, 5])
def test_schedule_ends_with_max_steps(max_epochs):
    assert rates(WarmupCosine(warmup_epochs=1), max_steps=10, max_epochs=max_epochs) == cosine(10, 4)


def test_max_epochs_before_max_steps():
    assert rates(WarmupCosine(warmup_epochs=1), max_steps=100, max_epochs=2) == cosine(8, 4)


def test_warm_up_of_no_epochs():
    assert rates(WarmupCosine(warmup_epochs=0)) == cosine(STEPS, 0)


def test_accumulated_batches_share_a_rate():
    """An epoch of five batches makes three steps, the last of them from one batch."""
    recorder = Recorder(sgds(0.25))
    how = {"accumulate_grad_batches": 2, "loader": train_loader(batches=5)}
    end = run(WarmupCosine(warmup_epochs=1), optimizers=recorder, **how)
    assert recorder.lrs[0] == [[lr] for lr in cosine(9, 3)]
    assert [metrics["lr-SGD"] for metrics in end.logged.values()] == pytest.approx(cosine(9, 3))


def test_accumulation_that_changes_needs_total_steps():
    def accumulation() -> Any:
        return lightning().callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})

    with pytest.raises(RuntimeError, match=r"GradientAccumulationScheduler.*WarmupCosine\(total_steps="):
        run(accumulation(), WarmupCosine(warmup_epochs=1))
    total = 4 + 2 + 1
    assert rates(accumulation(), WarmupCosine(warmup_epochs=1, total_steps=total)) == cosine(total, round(total / 3))


def test_first_rate_is_that_of_the_first_step_of_a_resumed_accumulation(tmp_path):
    saver = Saver(tmp_path, steps=(3,))
    how = {"accumulate_grad_batches": 2}
    full = rates(WarmupCosine(warmup_epochs=1), saver, **how)
    assert rates(WarmupCosine(warmup_epochs=1), ckpt_path=saver.paths[0], **how) == full[3:]


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Four batches an epoch, and no length."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4 * BATCHES):
            yield torch.randn(1, 8, 8, generator=generator), torch.randint(3, (), generator=generator)


def stream() -> Any:
    return torch.utils.data.DataLoader(Stream(), batch_size=4)


@pytest.mark.parametrize(
    "trick",
    [
        WarmupCosine(warmup_epochs=1),
        WarmupCosine(warmup_epochs=0),
        WarmupStep(milestones=[1], warmup_epochs=0),
        WarmupExponential(warmup_epochs=0),
    ],
)
def test_loader_without_length_asks_for_total_steps(trick):
    with pytest.raises(RuntimeError, match=rf"{type(trick).__name__}\(total_steps="):
        run(trick, loader=stream())


def test_loader_without_length_and_total_steps():
    assert rates(WarmupCosine(warmup_epochs=1, total_steps=STEPS), loader=stream()) == cosine(STEPS, 4)


def test_loader_without_length_by_hand(tmp_path):
    recorder, saver = Recorder(sgds(0.5, 0.125)), Saver(tmp_path)
    how: dict[str, Any] = {"optimizers": recorder, "manual": True, "loader": stream()}
    run(WarmupCosine(warmup_epochs=1, total_steps=STEPS), saver, **how)
    full = recorder.lrs
    assert full == [[[lr] for lr in cosine(STEPS, 4, base_lr)] for base_lr in (0.5, 0.125)]
    run(WarmupCosine(warmup_epochs=1, total_steps=STEPS), ckpt_path=tmp_path / "8-epoch.ckpt", **how)
    assert recorder.lrs == [lrs[4:] for lrs in full]


def test_loader_without_length_and_limit_train_batches():
    assert rates(WarmupCosine(warmup_epochs=1), loader=stream(), limit_train_batches=3) == cosine(9, 3)


def test_loader_without_length_and_max_steps():
    assert rates(WarmupCosine(warmup_epochs=0), loader=stream(), max_steps=6, max_epochs=-1) == cosine(6, 0)


def test_step_without_milestones_needs_no_length():
    trick = WarmupStep(milestones=[], warmup_epochs=0)
    assert rates(trick, loader=stream()) == [0.25] * STEPS


def test_end_must_be_known():
    with pytest.raises(RuntimeError, match="the length of the run"):
        run(WarmupCosine(warmup_epochs=1), max_epochs=-1)


# ---------------------------------------------------------------------------------------------------------------------
# What it rejects


@pytest.mark.parametrize("manual", [False, True])
def test_rejects_a_scheduler_of_the_module(manual):
    def optimizers(module: Any) -> Any:
        found = sgds(0.5, 0.125)(module) if manual else sgds(0.5)(module)
        return found, [StepLR(optimizer, 1) for optimizer in found]

    with pytest.raises(RuntimeError, match=r"WarmupCosine .*StepLR.*Classifier"):
        run(WarmupCosine(), optimizers=optimizers, manual=manual)


def test_rejects_a_second_schedule():
    with pytest.raises(RuntimeError, match="WarmupStep and WarmupCosine"):
        run(WarmupStep(), WarmupCosine())


def test_rejects_a_module_without_optimizer():
    with (
        pytest.warns(UserWarning, match="with no optimizer"),
        pytest.raises(RuntimeError, match=r"WarmupCosine found no learning rate.*from configure_optimizers"),
    ):
        run(WarmupCosine(), optimizers=lambda module: None)


def test_max_steps_by_hand_with_one_step_of_each_optimizer_per_batch():
    recorder = Recorder(sgds(0.5, 0.125))
    run(WarmupCosine(warmup_epochs=1), optimizers=recorder, manual=True, max_steps=20, max_epochs=-1)
    for lr, seen in zip((0.5, 0.125), recorder.lrs, strict=True):
        assert seen == [[rate] for rate in cosine(10, 4, lr)]


class OneOfTwo(module_class("lightning")):  # type: ignore[misc]
    """Steps the second optimizer in every second batch only."""

    batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        OneOfTwo.batches += 1
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_max_steps_by_hand_with_other_steps_is_rejected_in_the_first_batch():
    OneOfTwo.batches = 0
    trainer = make_trainer(WarmupCosine(warmup_epochs=1), max_steps=20, max_epochs=-1)
    with pytest.raises(RuntimeError, match=r"for each of 2 .*total_steps="):
        trainer.fit(OneOfTwo(manual=True), train_loader(), eval_loader())
    assert OneOfTwo.batches == 1


def test_max_steps_by_hand_with_other_steps_and_total_steps():
    recorder = Recorder(sgds(0.5, 0.125))
    trainer = make_trainer(WarmupCosine(warmup_epochs=1, total_steps=14), max_steps=20, max_epochs=-1)
    trainer.fit(OneOfTwo(manual=True, optimizers=recorder), train_loader(), eval_loader())
    assert recorder.lrs[0] == [[lr] for lr in cosine(14, 4, 0.5)]
    assert recorder.lrs[1] == [[lr] for lr in cosine(14, 4, 0.125)[1::2]]


@pytest.mark.parametrize(
    ("trick", "arguments", "message"),
    [
        (WarmupCosine, {"warmup_epochs": -1}, "warmup_epochs=-1"),
        (WarmupStep, {"warmup_epochs": -0.5}, "warmup_epochs=-0.5"),
        (WarmupExponential, {"warmup_epochs": -1}, "warmup_epochs=-1"),
        (WarmupCosine, {"total_steps": 0}, "total_steps=0"),
        (WarmupStep, {"total_steps": -3}, "total_steps=-3"),
        (WarmupExponential, {"total_steps": 0}, "total_steps=0"),
        (WarmupCosine, {"min_lr": -0.1}, "min_lr=-0.1"),
        (WarmupStep, {"gamma": 0}, r"gamma=0"),
        (WarmupStep, {"gamma": 1.1}, r"gamma=1.1"),
        (WarmupExponential, {"gamma": 0}, r"gamma=0"),
        (WarmupExponential, {"gamma": 94}, r"gamma=94"),
        (WarmupExponential, {"every_n_epochs": 0}, "every_n_epochs=0"),
        (WarmupStep, {"milestones": [60, 30]}, r"milestones=\[60, 30\]"),
        (WarmupStep, {"milestones": [30, 30]}, r"milestones=\[30, 30\]"),
        (WarmupStep, {"milestones": [3, 60]}, r"milestones=\[3, 60\]"),
        (WarmupStep, {"milestones": [0, 60], "warmup_epochs": 0}, r"milestones=\[0, 60\]"),
    ],
)
def test_arguments_out_of_range(trick, arguments, message):
    with pytest.raises(ValueError, match=message):
        trick(**arguments)


@pytest.mark.parametrize(
    "trick",
    [
        lambda: WarmupCosine(warmup_epochs=0, min_lr=0.25),
        lambda: WarmupStep(milestones=[1, 2], gamma=1, warmup_epochs=1),
        lambda: WarmupExponential(gamma=1, warmup_epochs=0),
    ],
)
def test_arguments_at_the_ends_of_their_ranges(trick):
    assert set(rates(trick())[BATCHES:]) == {0.25}


def test_min_lr_above_the_learning_rate():
    with pytest.raises(ValueError, match=r"min_lr=0.3\): .* 0.125"):
        run(WarmupCosine(min_lr=0.3), optimizers=sgds((0.5, 0.125)))


def test_warns_where_the_run_ends_within_the_warm_up():
    with pytest.warns(UserWarning, match=r"12 of 20 warm-up steps.*warmup_epochs=5"):
        lrs = rates(WarmupCosine(warmup_epochs=5))
    assert lrs == [i * 0.25 / 20 for i in range(1, STEPS + 1)]


@pytest.mark.parametrize("fast_dev_run", [True, 3])
def test_fast_dev_run_is_quiet(fast_dev_run):  # warnings are errors here
    for trick in (WarmupCosine(), WarmupStep(), WarmupExponential()):
        assert len(rates(trick, fast_dev_run=fast_dev_run)) == int(fast_dev_run)


# ---------------------------------------------------------------------------------------------------------------------
# Next to other callbacks


def test_learning_rate_finder_sets_the_full_rate(tmp_path):
    """The rate that it finds is the one to warm up to."""
    recorder = Recorder(lambda module: [torch.optim.SGD(module.parameters(), lr=module.lr)])
    module = module_class("lightning")(optimizers=recorder)
    module.lr = 0.25
    finder = lightning().callbacks.LearningRateFinder(num_training_steps=30, min_lr=1e-3, max_lr=0.2)
    trainer = make_trainer(finder, WarmupCosine(warmup_epochs=0.5), max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, train_loader(batches=32), eval_loader())
    assert 1e-3 < module.lr < 0.2
    assert [lr for [lr] in recorder.lrs[0]][-32:] == cosine(32, 16, module.lr)


class WithBackbone(module_class("lightning")):  # type: ignore[misc]
    @property
    def backbone(self) -> Any:
        return self.net[0]


def finetuned(order: int, *callbacks: Any, ckpt_path: Any = None) -> list[list[float]]:
    """Rates at each step; in epoch 1 Lightning adds the body to the optimizer."""
    recorder = Recorder(lambda module: [torch.optim.SGD(module.net[1].parameters(), lr=0.25, momentum=0.9)])
    thaw = lightning().callbacks.BackboneFinetuning(1, backbone_initial_lr=0.0625, verbose=False)
    trainer = make_trainer(*[thaw, WarmupCosine(warmup_epochs=1)][::order], *callbacks)
    how = {"ckpt_path": ckpt_path, "weights_only": True} if ckpt_path else {}
    trainer.fit(WithBackbone(optimizers=recorder), train_loader(), eval_loader(), **how)
    return recorder.lrs[0]


@pytest.mark.parametrize("order", [1, -1])
def test_group_that_is_added_later_is_scheduled_from_its_own_rate(order):
    expected = [[lr] for lr in cosine(STEPS, 4)[:4]]
    expected += [list(lrs) for lrs in zip(cosine(STEPS, 4)[4:], cosine(STEPS, 4, 0.0625)[4:], strict=True)]
    assert finetuned(order) == expected


@pytest.mark.parametrize("order", [1, -1])
def test_group_that_was_added_later_is_resumed(order, tmp_path):
    saver = Saver(tmp_path, steps=(6, 8))
    full = finetuned(order, saver)
    assert len(saver.paths) == 4
    for path in saver.paths:
        step = int(path.name.partition("-")[0])
        assert finetuned(order, ckpt_path=path) == full[step:], path.name


@pytest.mark.parametrize(
    ("optimizers", "manual"),
    [
        (sgds(0.5), False),
        (sgds((0.5, 0.125)), False),
        (sgds(0.5, 0.125), True),
        (lambda m: torch.optim.AdamW([{"params": m.parameters(), "name": "all"}]), False),
        (lambda m: torch.optim.SGD([{"params": p.parameters(), "name": n} for n, p in m.net.named_children()]), False),
        (lambda m: [torch.optim.SGD(m.net[0].parameters()), torch.optim.Adam(m.net[1].parameters())], True),
        (lambda m: [torch.optim.Adam(m.net[0].parameters()), *sgds(0.5, 0.125)(m)], True),
    ],
    ids=["one", "groups", "two", "named", "named groups", "two classes", "three"],
)
def test_names_and_values_are_those_of_learning_rate_monitor(optimizers, manual):
    monitored: list[dict[str, float]] = []

    class Monitor(lightning().callbacks.LearningRateMonitor):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            monitored.append(self._extract_stats(trainer, "any"))  # what it gives to the logger

    monitor = Monitor(logging_interval="step")
    end = run(WarmupCosine(warmup_epochs=1), monitor, optimizers=optimizers, manual=manual)
    assert len(monitored) == STEPS
    for step, expected in enumerate(monitored):
        logged = {name: value for name, value in end.logged[step].items() if name.startswith("lr-")}
        assert logged == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Resumed with something changed


def test_changed_learning_rate_takes_effect_on_resume(tmp_path):
    saver = Saver(tmp_path, steps=(6,))
    rates(WarmupCosine(warmup_epochs=1), saver)
    assert rates(WarmupCosine(warmup_epochs=1), base_lr=0.5, ckpt_path=saver.paths[0]) == cosine(STEPS, 4, 0.5)[6:]


def test_more_epochs_on_resume_take_up_the_longer_cosine(tmp_path):
    saver = Saver(tmp_path, steps=(STEPS,))
    rates(WarmupCosine(warmup_epochs=1), saver)
    for path in saver.paths:
        lrs = rates(WarmupCosine(warmup_epochs=1), ckpt_path=path, max_epochs=5)
        assert lrs == cosine(5 * BATCHES, 4)[STEPS:], path.name


def test_run_with_a_scheduler_of_torch_goes_on_with_ours(tmp_path):
    """The checkpoint has its rates in the optimizer, and other initial ones; ours go by what is configured."""
    saver = Saver(tmp_path, steps=(6,))
    scheduled(lambda optimizer: LinearLR(optimizer, start_factor=0.5), saver)
    assert rates(WarmupCosine(warmup_epochs=1), base_lr=0.5, ckpt_path=saver.paths[0]) == cosine(STEPS, 4, 0.5)[6:]


@pytest.mark.parametrize("manual", [False, True])
def test_max_steps_on_resume(manual, tmp_path):
    saver = Saver(tmp_path)
    how: dict[str, Any] = {"manual": manual, "max_steps": 20 if manual else 10, "max_epochs": -1}

    def fit(*callbacks: Any, **kwargs: Any) -> list[list[list[float]]]:
        recorder = Recorder(sgds(0.5, 0.125) if manual else sgds(0.5))
        run(WarmupCosine(warmup_epochs=1), *callbacks, optimizers=recorder, **how, **kwargs)
        return recorder.lrs

    full = fit(saver)
    for path in saver.paths:
        batches = int(path.name.partition("-")[0]) // len(full)
        assert fit(ckpt_path=path) == [lrs[batches:] for lrs in full], path.name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_rates_of_two_processes_are_those_of_one(strategy, ranks):
    for name in ("WarmupCosine", "WarmupStep", "WarmupExponential"):
        expected = {step: metrics["lr-SGD"] for step, metrics in run(TRICKS[name].make()).logged.items()}
        for rank in ranks:
            assert {s: metrics["lr-SGD"] for s, metrics in rank[strategy][name]["logged"].items()} == expected
