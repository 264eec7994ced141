"""SWA: its numbers, the learning rate of each step, and every situation that other averaging callbacks fail in."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.averages import (
    HOOKS,
    SAVERS,
    History,
    Interrupt,
    Weights,
    all_weights,
    assert_close,
    loaded,
    spy,
    whole_average,
)
from helpers.fits import Saver, differences, log_lines, make_trainer, run, weights_of
from helpers.modules import BATCHES, eval_loader, image_and_label, lightning, module_class, train_loader
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, SequentialLR, StepLR
from torch.optim.swa_utils import SWALR, AveragedModel

from lit_tricks.callbacks import EMA, SWA, PreciseBN, WarmupCosine
from lit_tricks.callbacks.swa import swa_ends_cycle, swa_lr_share
from lit_tricks.callbacks.warmup_cosine import warmup_cosine
from lit_tricks.models import resnet

pl = lightning()
pytestmark = pytest.mark.filterwarnings("ignore:SWA averages the statistics of the BatchNorm layers")
STEPS = 3 * BATCHES  # of a run of ``_fits.run``


def mean_of(history: list[Weights], steps: list[int]) -> Weights:
    """The mean of the weights after these steps, in float64. Integers are those of the last step there is."""
    last = history[-1]
    return {
        name: torch.stack([history[step - 1][name].double() for step in steps]).mean(0)
        if value.is_floating_point()
        else value
        for name, value in last.items()
    }


class Rates:
    """Makes the optimizers, and keeps the rates of their groups in each step, and between the steps.

    Args:
        lrs: a list of rates, for the groups of each optimizer; more optimizers than one go by hand.
        scheduler: makes one for each optimizer.
    """

    def __init__(self, *lrs: list[float], scheduler: Any = None, interval: str = "step") -> None:
        self.lrs, self.scheduler, self.interval = lrs or ([0.25],), scheduler, interval
        self.used: list[list[list[float]]] = []
        self.between: list[list[float]] = []

    def __call__(self, module: Any) -> Any:
        parts = [module.net] if len(self.lrs) == 1 else list(module.net)
        optimizers = []
        self.used, self.between = [[] for _ in parts], []
        for part, lrs, used in zip(parts, self.lrs, self.used, strict=True):
            groups = [part] if len(lrs) == 1 else list(part)
            optimizer = torch.optim.SGD(
                [{"params": g.parameters(), "lr": lr} for g, lr in zip(groups, lrs, strict=True)], momentum=0.9
            )
            optimizer.register_step_post_hook(
                lambda opt, *_, used=used: used.append([float(group["lr"]) for group in opt.param_groups])
            )
            optimizer.register_step_pre_hook(
                lambda opt, *_: self.between.append([float(group["lr"]) for group in opt.param_groups])
            )
            optimizers.append(optimizer)
        if self.scheduler is None:
            return optimizers
        [optimizer] = optimizers
        config = {"scheduler": self.scheduler(optimizer), "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}


def rates(*callbacks: Any, scheduler: Any = None, interval: str = "step", **kwargs: Any) -> list[float]:
    """Learning rates of the steps of a run with one parameter group."""
    recorder = Rates(scheduler=scheduler, interval=interval)
    run(*callbacks, optimizers=recorder, **kwargs)
    return [lr for [lr] in recorder.used[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and formulas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"start": 1.0}, r"start=1.0"),
        ({"start": 75}, "start=75"),
        ({"start": -0.1}, "start=-0.1"),
        ({"anneal_epochs": -1}, "anneal_epochs=-1"),
        ({"anneal": "cosine"}, "anneal='cosine'"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"every_n_epochs": 2, "every_n_steps": 5}, "every_n_epochs=2, every_n_steps=5"),
        ({"buffers": "raw"}, "buffers='raw'"),
        ({"name": " "}, "name=' '"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        SWA(**({"lr": 0.1} | arguments))


@pytest.mark.parametrize("shape", ["cos", "linear"])
def test_glide_is_that_of_torch(shape):
    """The reference is SWALR under a constant learning rate, which anneals from its first step."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.5)
    theirs = SWALR(optimizer, swa_lr=0.05, anneal_epochs=10, anneal_strategy=shape)
    for step in range(20, 35):
        way = swa_lr_share(step, start=30, length=10, shape=shape)
        assert (1 - way) * 0.5 + way * 0.05 == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_glide_begins_and_ends():
    for shape in ("cos", "linear"):
        assert [swa_lr_share(step, 30, 10, shape) for step in (0, 20, 25, 30, 99)] == pytest.approx([0, 0, 0.5, 1, 1])
        assert [swa_lr_share(step, 30, 0, shape) for step in (0, 29, 30)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("start", "every", "epoch", "ends"),
    [
        (9, 1, 4, [12]),
        (3, 1, 4, [4, 8, 12]),
        (4, 1, 4, [8, 12]),
        (0, 2, 4, [8, 12]),
        (0, 3, 4, [12]),
        (5, 1, 5, [10, 12]),  # the run ends within an epoch
        (3, 5, 1, [8, 12]),
        (9, 1, 1, [10, 11, 12]),
        (0, 100, 1, [12]),
    ],
)
def test_ends_of_cycles(start, every, epoch, ends):
    assert [step for step in range(13) if swa_ends_cycle(step, start, 12, every, epoch)] == ends


# ---------------------------------------------------------------------------------------------------------------------
# The average: against the mean in float64

CADENCES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "as it comes": ({}, [12]),
    "every epoch": ({"start": 0.25}, [4, 8, 12]),
    "every two": ({"start": 0.25, "every_n_epochs": 2}, [8, 12]),
    "from the first": ({"start": 0}, [4, 8, 12]),
    "every five steps": ({"start": 0.25, "every_n_steps": 5}, [8, 12]),
    "every step": ({"start": 0.5, "every_n_steps": 1}, [7, 8, 9, 10, 11, 12]),
    "the end": ({"start": 0.99}, [12]),
}


@pytest.mark.parametrize("cadence", CADENCES)
def test_average_is_the_mean(cadence):
    arguments, ends = CADENCES[cadence]
    history = History()
    result = run(SWA(0.2, **arguments), history)
    assert_close(all_weights(result.module), mean_of(history.weights, ends))
    assert result.tricks[0]["updates"] == len(ends)


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_buffers_are_averaged_or_copied(buffers):
    history = History()
    result = run(SWA(0.2, start=0.25, buffers=buffers), history)
    expected = mean_of(history.weights, [4, 8, 12])
    if buffers == "copy":
        expected |= {name: history.weights[-1][name] for name, _ in result.module.named_buffers()}
    assert_close(all_weights(result.module), expected)
    assert result.weights["net.0.1.num_batches_tracked"] == STEPS


RUNS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "accumulation": ({"accumulate_grad_batches": 3}, [4, 6]),  # two steps per epoch
    "bf16-mixed": ({"precision": "bf16-mixed"}, [4, 8, 12]),
    "64-true": ({"precision": "64-true"}, [4, 8, 12]),
    "16-mixed": ({"precision": "16-mixed"}, [4, 8, 12]),  # the first steps are skipped, and count
    "two optimizers by hand": ({"manual": True}, [4, 8, 12]),
    "validation within the epoch": ({"val_check_interval": 2}, [4, 8, 12]),
    "no validation": ({"limit_val_batches": 0}, [4, 8, 12]),
    "max_steps": ({"max_steps": 10, "max_epochs": -1}, [4, 8, 10]),
    "max_steps by hand": ({"max_steps": 20, "max_epochs": -1, "manual": True}, [4, 8, 10]),
    "max_epochs before max_steps": ({"max_steps": 100}, [4, 8, 12]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_average_of_runs_of_all_kinds(kind):
    how, ends = RUNS[kind]
    history = History()
    result = run(SWA(0.2, start=0.25), history, **how)
    assert len(history.weights) == ends[-1] == result.trainer.global_step // (2 if "manual" in how else 1)
    assert_close(all_weights(result.module), mean_of(history.weights, ends))


@pytest.mark.parametrize("fused", [False, True])
def test_a_cycle_may_end_with_a_skipped_step(fused):
    def optimizers(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)

    history = History()
    result = run(SWA(0.2, start=0, every_n_steps=1), history, precision="16-mixed", optimizers=optimizers)
    assert_close(all_weights(result.module), mean_of(history.weights, list(range(1, 13))))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_without_a_validation_loader():
    history, module = History(), module_class("lightning")()
    trainer = make_trainer(SWA(0.2, start=0.25), history)
    torch.manual_seed(0)
    trainer.fit(module, train_loader())
    assert_close(all_weights(module), mean_of(history.weights, [4, 8, 12]))
    assert trainer.global_step == STEPS


def test_early_stopping_in_the_phase():
    history = History()
    stop = pl.callbacks.EarlyStopping("val_loss", patience=0, stopping_threshold=100.0)
    result = run(SWA(0.2, start=0.25), stop, history)
    assert result.trainer.global_step == BATCHES
    assert_close(result.weights, mean_of(history.weights, [4]))


def test_early_stopping_before_the_phase_keeps_the_trained_weights():
    history = History()
    stop = pl.callbacks.EarlyStopping("val_loss", patience=0, stopping_threshold=100.0)
    with pytest.warns(UserWarning, match=r"SWA averaged nothing.*start=0.5"):
        result = run(SWA(0.2, start=0.5), stop, history)
    assert not differences(result.weights, {k: history.weights[-1][k] for k in result.weights})


def test_bf16_true_keeps_an_fp32_average_that_validation_does_not_round():
    averages = []
    for how in ({}, {"limit_val_batches": 0}, {"val_check_interval": 1}):
        swa, history = SWA(0.2, start=0.25, every_n_steps=2), History()
        run(swa, history, precision="bf16-true", **how)
        averages.append(whole_average(swa))
    assert {value.dtype for value in averages[0].values()} == {torch.float32}
    assert_close(averages[0], mean_of(history.weights, [5, 7, 9, 11, 12]))
    assert not differences(averages[0], averages[1])
    assert not differences(averages[0], averages[2])


def test_average_and_rates_are_those_of_torch_on_a_resnet_and_digits():
    """SWALR and AveragedModel, by hand, on the handwritten digits."""
    digits = load_digits()
    image, label = (
        torch.tensor(digits.images[:, None], dtype=torch.float32)[:160] / 16,
        torch.tensor(digits.target)[:160],
    )
    data = torch.utils.data.TensorDataset(image, label)
    epochs, start, lr = 5, 3, 0.02

    def network() -> Any:
        torch.manual_seed(0)
        return resnet(depth=18, variant="D", width=0.125, small_input=True, num_classes=10, in_chans=1)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    ours = Module()
    trainer = make_trainer(SWA(lr, start=start / epochs), max_epochs=epochs, enable_model_summary=False)
    trainer.fit(ours, torch.utils.data.DataLoader(data, batch_size=32))

    theirs = network().train()
    average = AveragedModel(theirs, use_buffers=False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        if epoch == start:
            SWALR(optimizer, swa_lr=lr, anneal_epochs=0)
        for batch in torch.utils.data.DataLoader(data, batch_size=32):
            optimizer.zero_grad()
            F.cross_entropy(theirs(batch[0]), batch[1]).backward()
            optimizer.step()
        if epoch >= start:
            average.update_parameters(theirs)
    assert int(average.n_averaged) == epochs - start
    params = dict(average.module.named_parameters())
    torch.testing.assert_close(
        {k: v.detach() for k, v in ours.net.named_parameters()},
        {k: v.detach() for k, v in params.items()},
        rtol=1e-5,
        atol=1e-6,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


def used_from(scheduled: list[float], lr: float, start: int, length: int = 0, shape: str = "cos") -> list[float]:
    ways = [swa_lr_share(step, start, length, shape) for step in range(len(scheduled))]
    return [(1 - way) * rate + way * lr for way, rate in zip(ways, scheduled, strict=True)]


def test_rate_is_constant_from_the_start_on():
    assert rates(SWA(0.2, start=0.5)) == [0.25] * 6 + [0.2] * 6


@pytest.mark.parametrize("shape", ["cos", "linear"])
def test_learning_rate_anneals_to_swa_lr(shape):
    expected = used_from([0.25] * STEPS, 0.1, 6, 4, shape)
    assert rates(SWA(0.1, start=0.5, anneal_epochs=1, anneal=shape)) == pytest.approx(expected)
    assert len(set(expected)) == 5


@pytest.mark.parametrize("place", [0, 1])
def test_our_schedule_goes_on_underneath(place):
    tricks = [SWA(0.2, start=0.5, anneal_epochs=1), WarmupCosine(warmup_epochs=1)][:: 1 - 2 * place]
    scheduled = [warmup_cosine(step, 0.25, STEPS, 4) for step in range(STEPS)]
    recorder = Rates()
    end = run(*tricks, optimizers=recorder)
    assert recorder.used[0] == [[pytest.approx(lr)] for lr in used_from(scheduled, 0.2, 6, 4)]
    assert recorder.between == [[pytest.approx(lr)] for lr in scheduled]
    logged = [metrics["lr-SGD"] for metrics in end.logged.values() if "lr-SGD" in metrics]
    assert logged == pytest.approx(used_from(scheduled, 0.2, 6, 4))


SCHEDULERS: dict[str, Any] = {
    "ExponentialLR": lambda o: ExponentialLR(o, 0.9),  # continues from the rate that it finds, as the next two
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, STEPS),
    "SequentialLR": lambda o: SequentialLR(o, [ExponentialLR(o, 1.1), StepLR(o, 2, 0.5)], [5]),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.25, total_steps=STEPS + 1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_torch_are_not_disturbed(scheduler):
    plain = rates(scheduler=SCHEDULERS[scheduler])
    recorder = Rates(scheduler=SCHEDULERS[scheduler])
    run(SWA(0.05, start=0.5, anneal_epochs=1), optimizers=recorder)
    assert [lr for [lr] in recorder.used[0]] == pytest.approx(used_from(plain, 0.05, 6, 4))
    assert [lr for [lr] in recorder.between] == plain  # bit by bit


def test_scheduler_that_goes_by_epochs_is_not_disturbed():
    plain = rates(scheduler=SCHEDULERS["ExponentialLR"], interval="epoch")
    used = rates(SWA(0.05, start=0.5, anneal_epochs=1), scheduler=SCHEDULERS["ExponentialLR"], interval="epoch")
    assert used == pytest.approx(used_from(plain, 0.05, 6, 4))


def test_reduce_on_plateau_is_not_disturbed():
    class Module(module_class("lightning")):
        def configure_optimizers(self) -> Any:
            [self.optimizer] = self.optimizers_of(self)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.5, patience=0, threshold=9.0)
            return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def fit(*callbacks: Any) -> list[list[float]]:
        recorder = Rates()
        module = Module(optimizers=recorder)
        torch.manual_seed(0)
        make_trainer(*callbacks).fit(module, train_loader(), eval_loader())
        return recorder.between

    assert fit(SWA(0.05, start=0.5)) == fit()
    assert len(set(map(tuple, fit()))) == 3


@pytest.mark.parametrize("precision", [None, "16-mixed"])
def test_a_rate_that_the_module_sets_in_its_training_step_is_the_scheduled_one(precision):
    """As those of many papers' repositories."""

    class Module(module_class("lightning")):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.1 + 0.01 * self.trainer.global_step
            return super().training_step(batch, batch_idx)

    recorder = Rates()
    how = {"precision": precision} if precision else {}
    trainer = make_trainer(SWA(0.05, start=0.5, anneal_epochs=1), **how)
    trainer.fit(Module(optimizers=recorder), train_loader(), eval_loader())
    expected = used_from([0.1 + 0.01 * step for step in range(STEPS)], 0.05, 6, 4)
    assert recorder.used[0] == [[pytest.approx(lr)] for lr in expected[-len(recorder.used[0]) :]]
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 + 0.01 * 11)


def test_a_rate_of_a_tensor_is_written_into_it():
    """Compiled and capturable optimizers hold on to the tensor."""
    tensor, seen = torch.tensor(0.25), []

    def adam(module: Any) -> Any:
        optimizer = torch.optim.Adam(module.parameters(), lr=tensor, foreach=False)
        optimizer.register_step_post_hook(lambda opt, *_: seen.append((opt.param_groups[0]["lr"], float(tensor))))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"},
        }

    run(SWA(0.05, start=0.5, anneal_epochs=1), optimizers=adam)
    assert all(lr is seen[0][0] for lr, _ in seen)
    expected = used_from([0.25 * 0.9**step for step in range(STEPS)], 0.05, 6, 4)
    assert [lr for _, lr in seen] == pytest.approx(expected)


def test_groups_keep_their_proportions():
    recorder = Rates([0.4, 0.1])
    run(SWA(0.2, start=0.5), optimizers=recorder)
    assert recorder.used[0] == [[0.4, 0.1]] * 6 + [[0.2, pytest.approx(0.05)]] * 6


def test_optimizers_by_hand_keep_their_proportions():
    recorder = Rates([0.1], [0.4])
    end = run(SWA(0.2, start=0.5), optimizers=recorder, manual=True)
    assert recorder.used[0] == [[0.1]] * 6 + [[pytest.approx(0.05)]] * 6
    assert recorder.used[1] == [[0.4]] * 6 + [[0.2]] * 6
    assert end.logged[9]["lr-SGD"] == pytest.approx(0.05)
    assert end.logged[9]["lr-SGD-1"] == pytest.approx(0.2)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("place", [0, 1])
def test_learning_rate_monitor_sees_the_rate_that_is_used(place, interval):
    class Monitor(pl.callbacks.LearningRateMonitor):
        pass

    monitor = Monitor(logging_interval=interval)
    run(*[SWA(0.05, start=0.25), monitor][:: 1 - 2 * place], optimizers=Rates())
    assert monitor.lrs["lr-SGD"] == ([0.25] * 3 + [0.05] * 9 if interval == "step" else [0.25, 0.05, 0.05])
    assert not [name for name in vars(monitor) if name.startswith("on_")]


def test_accumulated_batches_share_a_rate():
    recorder = Rates()
    end = run(SWA(0.05, start=0.5), optimizers=recorder, accumulate_grad_batches=2)
    assert recorder.used[0] == [[0.25]] * 3 + [[0.05]] * 3
    assert [metrics["lr-SGD"] for metrics in end.logged.values() if "lr-SGD" in metrics] == pytest.approx(
        [0.25] * 3 + [0.05] * 3
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint')
@pytest.mark.parametrize("saver", ["first", "last"])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_validation_end"]
)
def test_error_gives_the_scheduled_rates_and_the_trained_weights_back(hook, saver, tmp_path):
    history, recorder = History(), Rates(scheduler=SCHEDULERS["ExponentialLR"])
    module = module_class("lightning")(optimizers=recorder)
    save = SAVERS["OnExceptionCheckpoint"](tmp_path)
    order = [Interrupt(hook, ZeroDivisionError()), SWA(0.05, start=0.25)]
    order = [save, *order] if saver == "first" else [*order, save]
    trainer = make_trainer(history, *order, enable_checkpointing=True)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, train_loader(), eval_loader())
    params = [name for name, _ in module.named_parameters()]  # the batch may have moved the statistics of BatchNorm
    assert not differences(*({name: w[name] for name in params} for w in (all_weights(module), history.weights[-1])))
    [group] = trainer.optimizers[0].param_groups
    done = loaded(tmp_path / "on_exception.ckpt")
    assert group["lr"] == pytest.approx(0.25 * 0.9 ** done["global_step"])
    assert done["optimizer_states"][0]["param_groups"][0]["lr"] == group["lr"]
    assert len(trainer.optimizers[0]._optimizer_step_pre_hooks) == 1  # that of ``Rates``
    ends = [step for step in (4, 8) if step <= done["global_step"]]
    mean = mean_of(history.weights[: done["global_step"]], ends)
    assert_close({name: done["state_dict"][name] for name in params}, mean)
    resumed = Rates(scheduler=SCHEDULERS["ExponentialLR"])
    run(SWA(0.05, start=0.25), optimizers=resumed, ckpt_path=tmp_path / "on_exception.ckpt")
    assert {lr for [lr] in resumed.used[0]} == {0.05}
    assert resumed.between[0] == [group["lr"]]


# ---------------------------------------------------------------------------------------------------------------------
# How long the run is


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Four batches an epoch, and no length."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(4 * BATCHES):
            yield torch.randn(1, 8, 8, generator=generator), torch.randint(3, (), generator=generator)


def stream() -> Any:
    return torch.utils.data.DataLoader(Stream(), batch_size=4)


def test_loader_without_length():
    with pytest.raises(RuntimeError, match=r"SWA .*Trainer\(max_steps="):
        run(SWA(0.1), loader=stream())
    with pytest.raises(RuntimeError, match=r"SWA .*SWA\(every_n_steps="):
        run(SWA(0.1), loader=stream(), max_steps=10)
    history = History()
    result = run(SWA(0.1, start=0.5, every_n_steps=2), history, loader=stream(), max_steps=10, max_epochs=-1)
    assert_close(result.weights, mean_of(history.weights, [7, 9, 10]))


def test_accumulation_that_changes_from_epoch_to_epoch():
    def accumulation() -> Any:
        return pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})

    with pytest.raises(RuntimeError, match=r"SWA .*the length of the run"):
        run(SWA(0.1), accumulation())
    history = History()
    result = run(SWA(0.1, start=0.5, every_n_steps=1), accumulation(), history, max_steps=7)
    assert_close(result.weights, mean_of(history.weights, [5, 6, 7]))


def test_glide_must_fit_before_the_start():
    with pytest.raises(RuntimeError, match=r"SWA\(anneal_epochs=2\).*start=0.5"):
        run(SWA(0.1, start=0.5, anneal_epochs=2))


@pytest.mark.parametrize("fast_dev_run", [True, 3])
def test_fast_dev_run_is_quiet(fast_dev_run):  # warnings are errors here
    run(SWA(0.1, anneal_epochs=10), fast_dev_run=fast_dev_run)


def test_module_without_an_optimizer_is_rejected():
    with (
        pytest.warns(UserWarning, match="with no optimizer"),
        pytest.raises(RuntimeError, match=r"SWA found no learning rate.*from configure_optimizers"),
    ):
        run(SWA(0.1), optimizers=lambda module: None)


def test_two_optimizers_that_do_not_step_in_every_batch_are_rejected_under_max_steps():
    class OneOfTwo(module_class("lightning")):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.raises(RuntimeError, match="for each of 2 optimizers"):
        make_trainer(SWA(0.1), max_steps=20).fit(OneOfTwo(manual=True), train_loader(), eval_loader())


# ---------------------------------------------------------------------------------------------------------------------
# Validation and checkpoints


def test_validates_the_weights_until_the_first_cycle_has_ended_and_then_the_average():
    seen: list[tuple[str, str, Weights]] = []
    history = History()
    module = spy(module_class("lightning"), seen, "module")()
    first, last = spy(pl.Callback, seen, "first")(), spy(pl.Callback, seen, "last")()
    trainer = make_trainer(first, SWA(0.2, start=0.5), history, last, num_sanity_val_steps=0)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(), eval_loader())
    part = [weights for _, name, weights in seen if name in HOOKS]
    third = len(part) // 3
    for weights in part[:third]:
        assert not differences(weights, {k: history.weights[3][k] for k in weights})
    for number, ends in ((1, [8]), (2, [8, 12])):
        for weights in part[number * third : (number + 1) * third]:
            assert_close(weights, mean_of(history.weights[: ends[-1]], ends))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_monitored_metric_is_that_of_the_saved_weights(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    run(SWA(0.2, start=0.5), saver, enable_checkpointing=True, val_check_interval=2)
    assert len(saver.best_k_models) == 6
    for path, score in saver.best_k_models.items():
        [metrics] = make_trainer().validate(
            module_class("lightning")(), eval_loader(), ckpt_path=path, verbose=False, weights_only=True
        )
        assert metrics["val_loss"] == score


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_average(weights_only, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, save_weights_only=weights_only)
    history = History()
    result = run(SWA(0.2, start=0.25), saver, history, enable_checkpointing=True)
    for path, ends in zip(sorted(tmp_path.glob("epoch*")), ([4], [4, 8], [4, 8, 12]), strict=True):
        assert_close(loaded(path)["state_dict"], mean_of(history.weights[: ends[-1]], ends))
        if not weights_only:
            raw = loaded(path)["callbacks"]["SWA"]["raw"]
            assert_close(raw or history.weights[3], history.weights[ends[-1] - 1], rtol=0, atol=0)
    result.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    assert not differences(loaded(tmp_path / "x.ckpt")["state_dict"], result.weights)


SETUPS: dict[str, dict[str, Any]] = {
    "a glide under a cosine": {"anneal_epochs": 1, "start": 0.5, "scheduler": SCHEDULERS["CosineAnnealingLR"]},
    "every five steps": {"every_n_steps": 5, "start": 0.25, "scheduler": SCHEDULERS["ExponentialLR"]},
    "every two epochs": {"every_n_epochs": 2, "start": 0, "scheduler": None},
    "kept aside": {"validate": False, "start": 0.25, "scheduler": SCHEDULERS["ExponentialLR"]},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_resume_is_bitwise(setup, tmp_path):
    arguments = dict(SETUPS[setup])
    scheduler, saver = arguments.pop("scheduler"), Saver(tmp_path)

    def fit(*callbacks: Any, **kwargs: Any) -> tuple[Any, Rates]:
        recorder = Rates(scheduler=scheduler)
        return run(SWA(0.05, **arguments), *callbacks, optimizers=recorder, **kwargs), recorder

    full, recorder = fit(saver)
    for path in saver.paths:
        resumed, again = fit(ckpt_path=path)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.tricks, full.tricks), path.name
        assert not differences(resumed.optimizers, full.optimizers), path.name
        assert recorder.used[0][len(recorder.used[0]) - len(again.used[0]) :] == again.used[0], path.name


def test_resume_of_a_skipped_run_is_bitwise(tmp_path):
    saver = Saver(tmp_path, steps=(3, 5, 8))
    full = run(SWA(0.2, start=0.25), saver, precision="16-mixed")
    for path in saver.paths:
        resumed = run(SWA(0.2, start=0.25), precision="16-mixed", ckpt_path=path)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.tricks, full.tricks), path.name


def test_more_epochs_on_resume_begin_the_average_anew(tmp_path):
    """The phase that has begun is none of the longer run."""
    saver, history = Saver(tmp_path, steps=(8,)), History()
    run(SWA(0.05, start=0.5), saver, history)
    for path in saver.paths:
        recorder, rest = Rates(), History()
        end = run(SWA(0.05, start=0.5), rest, optimizers=recorder, ckpt_path=path, max_epochs=6)
        assert [lr for [lr] in recorder.used[0]] == [0.1] * 4 + [0.05] * 12  # 0.1 came with the checkpoint
        assert_close(end.weights, mean_of(rest.weights, [8, 12, 16]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_checkpoint_saved_after_the_fit_trains_longer_with_one_average(tmp_path):
    how = {"max_steps": 12, "max_epochs": -1}
    stop = pl.callbacks.EarlyStopping("val_loss", patience=0, stopping_threshold=100.0)
    first = run(SWA(0.2, start=0.25), stop, **how)
    first.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    resumed, full = (run(SWA(0.2, start=0.25), ckpt_path=path, **how) for path in (tmp_path / "x.ckpt", None))
    assert first.trainer.global_step == BATCHES
    assert not differences(resumed.weights, full.weights)


def test_resumes_from_a_checkpoint_without_an_average(tmp_path):
    saver, history = Saver(tmp_path, steps=(8,)), History()
    run(saver)
    for path in saver.paths:
        history = History()
        result = run(SWA(0.2, start=0.25), history, ckpt_path=path)
        assert_close(result.weights, mean_of(history.weights, [4]))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("ckpt_path", [None, "last", "best"])
@pytest.mark.parametrize("trainer", ["same", "fresh", "fresh with SWA"])
def test_test_and_predict_see_the_average(trainer, ckpt_path, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, monitor="step", mode="max")
    fitted = run(SWA(0.2, start=0.25), saver, enable_checkpointing=True)
    module = module_class("lightning")()
    module.load_state_dict(fitted.weights)
    module.eval()
    expected = torch.cat([module(image_and_label(batch)[0]) for batch in eval_loader()]).detach()
    used = fitted.trainer if trainer == "same" else make_trainer(*([SWA(0.2)] if "SWA" in trainer else []))
    how: dict[str, Any] = {}
    if ckpt_path:
        how = {"ckpt_path": ckpt_path if trainer == "same" else saver.best_model_path, "weights_only": True}
    for _ in range(2):
        assert torch.equal(torch.cat(used.predict(fitted.module, eval_loader(), **how)), expected)
    assert not differences(weights_of(fitted.module), fitted.weights)


def test_same_object_in_a_second_trainer_starts_anew():
    swa = SWA(0.2, start=0.25)
    run(swa, max_epochs=2)
    assert not differences(run(swa).weights, run(SWA(0.2, start=0.25)).weights)


def test_second_fit_trains_on_from_the_trained_weights():
    history = History()
    first = run(SWA(0.2, start=0.5), history, max_epochs=2)
    assert_close(first.weights, mean_of(history.weights, [8]))
    trained = history.weights[7]
    first.trainer.fit_loop.max_epochs = 4

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.weights = all_weights(module)

    look = Look()
    first.trainer.callbacks.append(look)
    first.trainer.fit(first.module, train_loader(), eval_loader())
    assert not differences(look.weights, trained)
    assert_close(weights_of(first.module), mean_of(history.weights, [12, 16]))


# ---------------------------------------------------------------------------------------------------------------------
# Next to other callbacks


def test_warns_of_batch_norm_once_and_names_the_remedy():
    with pytest.warns(UserWarning, match=r"BatchNorm layers in Classifier.*PreciseBN") as caught:
        run(SWA(0.2), max_epochs=1)
    assert len([w for w in caught if "BatchNorm" in str(w.message)]) == 1
    for callbacks in ([SWA(0.2), PreciseBN(8)], [PreciseBN(8), SWA(0.2)], [SWA(0.2, validate=False)]):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "SWA averages the statistics")
            run(*callbacks, max_epochs=1)


@pytest.mark.parametrize("place", [0, 1])
def test_precise_bn_re_estimates_the_statistics_of_the_average(place):
    history = History()
    weights = run(*[SWA(0.2, start=0.25), PreciseBN()][:: 1 - 2 * place], history).weights
    mean = mean_of(history.weights, [4, 8, 12])
    params = [name for name, _ in module_class("lightning")().named_parameters()]
    assert_close({name: weights[name] for name in params}, mean)
    for name in ("net.0.1.running_mean", "net.0.1.running_var"):
        assert not torch.allclose(weights[name].double(), mean[name])


@pytest.mark.parametrize("place", [0, 1])
def test_two_validated_averages_are_rejected(place):
    tricks = [SWA(0.2), EMA(0.9)][:: 1 - 2 * place]
    with pytest.raises(RuntimeError, match=r"both decide .*validate=False"):
        run(*tricks)


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_other_averages_are_rejected(name):
    other = getattr(pl.callbacks, name)(**({"swa_lrs": 0.1} if name.startswith("Sto") else {}))
    for callbacks in ([SWA(0.2), other], [other, SWA(0.2)]):
        with pytest.raises(RuntimeError, match=rf"SWA and {name}.*remove {name}"):
            run(*callbacks)


@pytest.mark.parametrize("aside", ["EMA", "SWA"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_average_beside_one_that_is_validated(place, aside, tmp_path):
    def make() -> list[Any]:
        swa, ema = SWA(0.2, start=0.25, validate=aside != "SWA"), EMA(0.5, validate=aside != "EMA")
        return [swa, ema][:: 1 - 2 * place]

    tricks, history, saver = make(), History(), Saver(tmp_path, steps=(6, 8))
    result = run(*tricks, history, saver)
    swa, ema = tricks[:: 1 - 2 * place]
    mean = mean_of(history.weights, [4, 8, 12])
    ema_alone = EMA(0.5, validate=False)
    run(ema_alone, SWA(0.2, start=0.25, validate=False))
    assert not differences(whole_average(ema), whole_average(ema_alone))
    assert_close(whole_average(swa), mean)
    assert_close(
        result.weights,
        mean if aside == "EMA" else whole_average(ema) | {"net.0.1.num_batches_tracked": torch.tensor(STEPS)},
    )
    for path in saver.paths:
        resumed = run(*make(), ckpt_path=path)
        assert not differences(resumed.weights, result.weights), path.name
        assert not differences(resumed.tricks, result.tricks), path.name


class WithBackbone(module_class("lightning")):  # type: ignore[misc]
    @property
    def backbone(self) -> Any:
        return self.net[0]


def orders() -> list[tuple[int, ...]]:
    every = list(itertools.permutations(range(5)))
    return [every[0], every[-1], *random.Random(0).sample(every[1:-1], 6)]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("order", orders())
def test_any_order_of_averages_checkpoint_early_stopping_and_finetuning(order, tmp_path):
    def fit(order: tuple[int, ...], folder: Any, ckpt_path: Any = None) -> Any:
        saver = pl.callbacks.ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, filename="{step}")
        callbacks = [
            EMA(0.5, validate=False),
            SWA(0.05, start=0.25, anneal_epochs=0.5),
            saver,
            pl.callbacks.EarlyStopping("val_loss", patience=9, stopping_threshold=-1.0),
            pl.callbacks.BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_lr=0.0625, verbose=False),
        ]
        recorder = Rates()

        def optimizers(module: Any) -> Any:
            module.body, module.net = module.net, nn.Sequential(module.net[1])  # only the head is trained at first
            made = recorder(module)
            module.net = module.body
            del module.body
            return made

        module = WithBackbone(optimizers=optimizers)
        trainer = make_trainer(*[callbacks[i] for i in order], enable_checkpointing=True)
        torch.manual_seed(0)
        how = {"ckpt_path": ckpt_path, "weights_only": True} if ckpt_path else {}
        trainer.fit(module, train_loader(), eval_loader(), **how)
        tricks = {c.state_key: c.state_dict() for c in callbacks[:2]}
        return weights_of(module), tricks, recorder.used[0], saver

    expected = fit((0, 1, 2, 3, 4), tmp_path / "expected")
    found = fit(order, tmp_path / "found")
    assert not differences(found[:3], expected[:3])
    used = found[2]
    assert used[0] == [0.25]
    assert used[-1] == [0.05, pytest.approx(0.05 / 4)]  # in proportion to the rate that the backbone came with
    scores = [
        {path.rpartition("/")[2]: float(score) for path, score in s[3].best_k_models.items()} for s in (found, expected)
    ]
    assert scores[0] == scores[1]
    [metrics] = make_trainer().validate(
        WithBackbone(), eval_loader(), ckpt_path=found[3].best_model_path, verbose=False, weights_only=True
    )
    assert metrics["val_loss"] == float(found[3].best_model_score)


@pytest.mark.parametrize("place", [0, 1])
def test_learning_rate_finder_does_not_disturb_it(place, tmp_path):
    class Module(module_class("lightning")):
        lr = 0.1

        def train_dataloader(self) -> Any:
            return train_loader()

        def val_dataloader(self) -> Any:
            return eval_loader()

    def fit(*callbacks: Any) -> Any:
        module, history = Module(), History()
        find = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
        trainer = make_trainer(*[*callbacks, find][:: 1 - 2 * place], history, default_root_dir=tmp_path)
        torch.manual_seed(0)
        trainer.fit(module)
        return module, history.weights

    module, history = fit(SWA(0.2, start=0.25))
    assert_close(all_weights(module), mean_of(history, [4, 8, 12]))


def test_says_what_it_does():
    with log_lines() as records:
        run(SWA(0.2, start=0.5, anneal_epochs=1, every_n_steps=3, name="late"), max_epochs=2)
    [record] = records
    assert record.getMessage() == (
        "SWA: late: learning rate 0.2 from step 4 of 8 after a glide of 4 steps, averaged every 3 steps; "
        "validated and saved; buffers: 2 averaged"
    )


def test_logs_how_many_are_averaged():
    logged = run(SWA(0.2, start=0.25, name="x")).logged
    assert [logged[step].get("swa/x/averaged") for step in range(STEPS)] == [None] * 3 + [1] * 4 + [2] * 4 + [3]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_two_processes_use_the_rates_of_one(strategy, ranks):
    expected = {
        step: metrics["lr-SGD"] for step, metrics in run(SWA(lr=0.2, start=0.25)).logged.items() if "lr-SGD" in metrics
    }
    for rank in ranks:
        logged = rank[strategy]["SWA"]["logged"]
        assert {s: metrics["lr-SGD"] for s, metrics in logged.items() if "lr-SGD" in metrics} == expected
