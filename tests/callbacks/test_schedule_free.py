"""ScheduleFree: which weights are validated, saved and trained, with a small optimizer and the authors' package."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.averages import History, Interrupt, Weights, all_weights, assert_close, loaded
from helpers.fits import Saver, differences, log_lines, make_trainer, run
from helpers.modules import BATCHES, eval_loader, lightning, module_class, train_loader
from helpers.schedule_free import ReplacedScheduleFree, Replacing, ScheduleFreeSGD

from lit_tricks import Classifier
from lit_tricks.callbacks import EMA, SWA, Lookahead, PreciseBN, ScheduleFree, WarmupCosine, WarmupStep
from lit_tricks.callbacks.batchnorm.data_pass import StatisticsPass
from lit_tricks.data import Digits

pl = lightning()
STEPS = 3 * BATCHES


def small(module: Any) -> Any:
    return ScheduleFreeSGD(module.parameters(), lr=0.1)


def params_of(weights: Weights, module: Any) -> Weights:
    return {name: weights[name] for name, _ in module.named_parameters()}


class Record(pl.Callback):
    """Keeps the weights before each batch, the gradients of each step, and the weights that validations use."""

    def __init__(self) -> None:
        self.before: list[Weights] = []
        self.gradients: list[Weights] = []
        self.validated: list[Weights] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before.append(all_weights(module))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None})

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.validated.append(all_weights(module))


def averages(record: Record, beta: float = 0.9, lr: float = 0.1) -> list[tuple[Weights, Weights]]:
    """Return ``x`` and ``y`` after each step by equations 1 to 3 of the paper, in float64, from its gradients."""
    z = {name: record.before[0][name].double() for name in record.gradients[0]}
    x, found = dict(z), []
    for t, gradients in enumerate(record.gradients, start=1):
        z = {name: z[name] - lr * gradient.double() for name, gradient in gradients.items()}
        x = {name: (1 - 1 / t) * x[name] + z[name] / t for name in z}
        found.append((x, {name: (1 - beta) * z[name] + beta * x[name] for name in z}))
    return found


def test_validation_and_the_end_have_the_average():
    record = Record()
    result = run(ScheduleFree(), record, optimizers=small)
    expected = averages(record)
    for epoch, validated in enumerate(record.validated, start=1):
        x, y = expected[epoch * BATCHES - 1]
        assert_close({name: validated[name] for name in x}, x, rtol=1e-4, atol=1e-5)
        if epoch < 3:  # training continues from y
            before = record.before[epoch * BATCHES]
            assert_close({name: before[name] for name in y}, y, rtol=1e-4, atol=1e-5)
    assert_close(params_of(result.weights, result.module), expected[-1][0], rtol=1e-4, atol=1e-5)
    assert not result.trainer.optimizers[0].param_groups[0]["training"]


def test_training_is_not_changed_by_validation_and_saving(tmp_path):
    """``eval`` and ``train`` of the optimizer round. Training equals a run without either, bit by bit."""
    plain, tricked = History(), History()
    run(Replacing(), plain, limit_val_batches=0)
    run(ReplacedScheduleFree(), tricked, Saver(tmp_path))
    assert not differences(tricked.weights, plain.weights)
    optimizer = ScheduleFreeSGD([torch.nn.Parameter(torch.randn(1000))])  # the premise
    [parameter] = optimizer.param_groups[0]["params"]
    optimizer.train()
    for _ in range(3):
        parameter.grad = torch.randn(1000)
        optimizer.step()
    before = parameter.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert not torch.equal(parameter, before)


def test_checkpoints_have_the_average_and_optimizers_in_evaluation_mode(tmp_path):
    record, saver = Record(), Saver(tmp_path)
    result = run(ScheduleFree(), record, saver, optimizers=small)
    expected = averages(record)
    for path in saver.paths:
        content = loaded(path)
        x, y = expected[int(path.name.partition("-")[0]) - 1]
        assert_close({n: content["state_dict"][n] for n in x}, x, rtol=1e-4, atol=1e-5)
        assert_close(content["callbacks"]["ScheduleFree"]["raw"], y, rtol=1e-4, atol=1e-5)
        assert content["optimizer_states"][0]["param_groups"][0]["training"] is False
    result.trainer.save_checkpoint(tmp_path / "after.ckpt")
    after = loaded(tmp_path / "after.ckpt")
    assert not differences(after["state_dict"], result.weights)
    assert after["callbacks"]["ScheduleFree"]["raw"].keys() == expected[-1][0].keys()


def test_weights_only_checkpoints_have_the_average(tmp_path):
    class WeightsOnly(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    record = Record()
    run(ScheduleFree(), record, WeightsOnly(), optimizers=small)
    x, _ = averages(record)[5]
    state = loaded(tmp_path / "weights.ckpt")["state_dict"]
    assert_close({n: state[n] for n in x}, x, rtol=1e-4, atol=1e-5)


def test_a_run_continues_from_the_checkpoint_without_the_trick(tmp_path):
    """As the authors advise: weights are the average, and ``train()`` of the optimizer computes the rest."""
    saver, history = Saver(tmp_path, steps=[6]), History()
    run(ScheduleFree(), saver, history, optimizers=small)
    content = loaded(saver.paths[0])
    module = module_class("lightning")()
    module.load_state_dict(content["state_dict"])
    optimizer = small(module)
    optimizer.load_state_dict(content["optimizer_states"][0])
    optimizer.train()
    assert_close(params_of(all_weights(module), module), history.weights[5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", ["on_train_batch_start", "on_validation_batch_end", "on_validation_end"])
@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_after_an_error_the_optimizer_trains(stop, error, restored_interrupts):
    history, plain = History(), History()
    module = module_class("lightning")(optimizers=small)
    trainer = make_trainer(ScheduleFree(), history, Interrupt(stop, error))
    torch.manual_seed(0)
    with pytest.raises((ZeroDivisionError, SystemExit)):
        trainer.fit(module, train_loader(), eval_loader())
    run(ScheduleFree(), plain, optimizers=small)
    names = [name for name, _ in module.named_parameters()]
    expected = plain.weights[len(history.weights) - 1]
    assert not differences({n: all_weights(module)[n] for n in names}, {n: expected[n] for n in names})
    assert trainer.optimizers[0].param_groups[0]["training"] is True


@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint')
def test_checkpoint_of_an_error_has_the_average(tmp_path):
    saver = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    record, how = Record(), {"optimizers": small, "enable_checkpointing": True}
    with pytest.raises(ZeroDivisionError):
        run(ScheduleFree(), record, saver, Interrupt("on_train_batch_start", ZeroDivisionError()), **how)
    content = loaded(tmp_path / "on_exception.ckpt")
    x, y = averages(record)[-1]
    assert_close({n: content["state_dict"][n] for n in x}, x, rtol=1e-4, atol=1e-5)
    assert_close(content["callbacks"]["ScheduleFree"]["raw"], y, rtol=1e-4, atol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """Names of the tricks that pass over the training data."""
    found: list[str] = []
    original = StatisticsPass.run

    def counted(self: Any) -> Any:
        found.append(self.trick)
        return original(self)

    monkeypatch.setattr(StatisticsPass, "run", counted)
    return found


def statistics_by_hand(weights: Weights) -> Weights:
    """Return mean and population variance of the first layer's maps over the training images, in float64."""
    conv = torch.nn.Conv2d(1, 4, 3).double()
    conv.load_state_dict({name: weights[f"net.0.0.{name}"].double() for name in ("weight", "bias")})
    with torch.no_grad():
        maps = conv(torch.cat([batch[0] for batch in train_loader()]).double())
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    return {"net.0.1.running_mean": mean, "net.0.1.running_var": variance}


def test_validations_checkpoints_and_the_end_have_statistics_of_the_average(tmp_path, passes):
    """Also a checkpoint in the middle of an epoch. Its callback state has the statistics of training."""
    record, saver, plain = Record(), Saver(tmp_path, steps=[2, 4, 6]), History()
    result = run(ScheduleFree(), record, saver, optimizers=small)
    assert passes == ["ScheduleFree"] * 5  # steps 2, 4, 6, 8 and 12: one per average
    run(ScheduleFree(num_samples=0), plain, optimizers=small)
    for weights in (*record.validated, result.weights):
        expected = statistics_by_hand(weights)
        assert_close({name: weights[name] for name in expected}, expected)
    assert saver.paths
    for path in saver.paths:
        content = loaded(path)
        expected = statistics_by_hand(content["state_dict"])
        assert_close({name: content["state_dict"][name] for name in expected}, expected)
        trained = plain.weights[content["global_step"] - 1]
        replaced = content["callbacks"]["ScheduleFree"]["replaced"]
        assert not differences(replaced, {name: trained[name] for name in replaced})
        resumed = run(ScheduleFree(), ckpt_path=path, optimizers=small)
        assert not differences(resumed.weights, result.weights)
        assert not differences(resumed.optimizers, result.optimizers)
    result.trainer.save_checkpoint(tmp_path / "after.ckpt")
    complete = run(ScheduleFree(), ckpt_path=tmp_path / "after.ckpt", optimizers=small)
    assert not differences(complete.weights, result.weights)
    complete.trainer.save_checkpoint(tmp_path / "again.ckpt")
    states = [loaded(tmp_path / name)["callbacks"]["ScheduleFree"] for name in ("after.ckpt", "again.ckpt")]
    assert not differences(states[0]["replaced"], states[1]["replaced"])


def test_a_second_fit_continues_with_the_statistics_of_training():
    full = run(ScheduleFree(), optimizers=small, max_epochs=3)
    first = run(ScheduleFree(), optimizers=small, max_epochs=2)
    first.trainer.fit_loop.max_epochs = 3
    first.trainer.fit(first.module, train_loader(), eval_loader())
    names = ["net.0.1.running_mean", "net.0.1.running_var"]
    now = all_weights(first.module)
    assert_close({name: now[name] for name in names}, statistics_by_hand(now))
    covered = [result.trainer.callbacks[0]._override.covered() for result in (full, first)]
    assert set(covered[0]) == set(names)


def test_statistics_are_estimated_for_the_average():
    """PreciseBN passes data through the weights that are validated, here against a pass by hand."""
    record = Record()
    result = run(ScheduleFree(), PreciseBN(num_samples=16), record, optimizers=small)
    plain = run(ScheduleFree(), optimizers=small)
    names = [name for name, _ in result.module.named_parameters()]
    assert not differences({n: result.weights[n] for n in names}, {n: plain.weights[n] for n in names})
    conv = result.module.net[0][0]
    images = torch.cat([batch[0] for batch in train_loader()])
    with torch.no_grad():
        maps = conv(images)
    torch.testing.assert_close(result.weights["net.0.1.running_mean"], maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_test_and_predict_after_the_fit_use_the_average(tmp_path):
    saver = Saver(tmp_path, steps=[6])
    result = run(ScheduleFree(), saver, optimizers=small)
    final = dict(result.weights)
    trainer = result.trainer
    trainer.validate(result.module, eval_loader(), verbose=False)
    assert not differences(all_weights(result.module), all_weights(result.module) | final)
    trainer.validate(result.module, eval_loader(), ckpt_path=saver.paths[0], verbose=False, weights_only=True)
    saved = loaded(saver.paths[0])["state_dict"]
    assert not differences({n: all_weights(result.module)[n] for n in saved}, saved)


# ---------------------------------------------------------------------------------------------------------------------
# Conflicts


def test_needs_such_an_optimizer():
    with pytest.raises(RuntimeError, match=r"ScheduleFree found no optimizer with `train\(\)` and `eval\(\)`"):
        run(ScheduleFree())


@pytest.mark.parametrize(
    "make", [lambda: EMA(0.5), lambda: EMA(0.5, validate=False), lambda: SWA(0.1), lambda: Lookahead()]
)
def test_rejects_other_averages(make):
    for tricks in ([ScheduleFree(), make()], [make(), ScheduleFree()]):
        with pytest.raises(RuntimeError, match=r"both average weights|assumes a constant"):
            run(*tricks, optimizers=small)


@pytest.mark.parametrize("make", [WarmupCosine, lambda: WarmupStep([1], warmup_epochs=0), lambda: SWA(0.1)])
@pytest.mark.parametrize("with_trick", [True, False])
def test_schedules_reject_such_optimizers(make, with_trick):
    with pytest.raises(RuntimeError, match=r"assumes a constant learning rate|both average weights"):
        run(make(), *([ScheduleFree()] if with_trick else []), optimizers=small)


def test_loader_that_cannot_be_read_again_is_rejected():
    """The remedy keeps the running statistics of training."""
    module = module_class("lightning")(optimizers=small)
    with pytest.raises(RuntimeError, match=r"ScheduleFree reads training data a second time.*num_samples=0"):
        make_trainer(ScheduleFree()).fit(module, iter(list(train_loader())), eval_loader())
    trick = ScheduleFree(num_samples=0)
    make_trainer(trick, max_epochs=1).fit(module, iter(list(train_loader())), eval_loader())
    assert "BatchNorm" not in trick.effect


def test_precise_bn_replaces_the_estimate(passes):
    trick = ScheduleFree()
    result = run(trick, PreciseBN(num_samples=4), optimizers=small)
    assert "BatchNorm" not in trick.effect
    assert passes == ["PreciseBN"] * 3
    assert result.trainer.optimizers[0].param_groups[0]["training"] is False


def test_other_inputs_of_forward_are_a_warning():
    class Scaled(module_class("lightning")):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([batch[0] / 2, batch[1]], batch_idx)

    module = Scaled(optimizers=small)
    with pytest.warns(UserWarning, match="ScheduleFree runs `forward` of Scaled"):
        make_trainer(ScheduleFree(), max_epochs=1).fit(module, train_loader(), eval_loader())
    assert not module._forward_pre_hooks


def test_only_one_of_two_optimizers_is_schedule_free():
    def both(module: Any) -> Any:
        body, head = module.net
        return [ScheduleFreeSGD(body.parameters(), lr=0.1), torch.optim.SGD(head.parameters(), lr=0.1)]

    with log_lines() as records:
        result = run(ScheduleFree(), manual=True, optimizers=both)
    assert all(value.isfinite().all() for value in result.weights.values())
    assert [r for r in records if "average of ScheduleFreeSGD" in r.getMessage()]


# ---------------------------------------------------------------------------------------------------------------------
# The package of the authors

PACKAGE = ("SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree")


@pytest.mark.parametrize("name", PACKAGE)
def test_optimizers_of_the_package(name, tmp_path):
    schedulefree = pytest.importorskip("schedulefree")

    def make(module: Any) -> Any:
        return getattr(schedulefree, name)(module.parameters(), lr=0.05)

    saver = Saver(tmp_path)
    full = run(ScheduleFree(), saver, optimizers=make)
    for path in saver.paths[:: len(saver.paths) // 4]:
        resumed = run(ScheduleFree(), ckpt_path=path, optimizers=make)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.optimizers, full.optimizers), path.name
    module = full.module  # by hand: the average is what its eval() writes
    before = all_weights(module)
    full.trainer.optimizers[0].train()
    assert differences(all_weights(module), before)
    full.trainer.optimizers[0].eval()
    assert_close(params_of(all_weights(module), module), before, rtol=1e-5, atol=1e-6)


def test_the_small_optimizer_is_that_of_the_package():
    schedulefree = pytest.importorskip("schedulefree")
    ours, theirs = History(), History()
    run(ScheduleFree(), ours, optimizers=small)
    run(ScheduleFree(), theirs, optimizers=lambda module: schedulefree.SGDScheduleFree(module.parameters(), lr=0.1))
    for our, their in zip(ours.weights, theirs.weights, strict=True):
        assert_close(our, their)


def test_our_classifier_leaves_the_state_of_the_optimizer_alone(tmp_path):
    """It restores settings when training starts, and the package counts its steps among them."""
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    network = {"depth": 18, "width": 1 / 32, "small_input": True}
    counts = []

    class Look(lightning().Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            group = trainer.optimizers[0].param_groups[0]
            counts.append((group["k"], group["train_mode"]))

    def make() -> Any:
        optimizer = partial(schedulefree.SGDScheduleFree, lr=0.1)
        return Classifier("resnet", 10, model_args=network, optimizer=optimizer, input_size=(1, 8, 8))

    options = {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 1}
    trainer = make_trainer(ScheduleFree(), PreciseBN(num_samples=64), Look(), **options)
    trainer.fit(make(), Digits(batch_size=64))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = make_trainer(ScheduleFree(), PreciseBN(num_samples=64), Look(), **(options | {"max_epochs": 2}))
    again.fit(make(), Digits(batch_size=64), ckpt_path=tmp_path / "x.ckpt")
    assert counts == [(step, True) for step in range(1, 7)]
