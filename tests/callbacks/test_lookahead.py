"""Lookahead: its numbers against the paper's formula and timm, and which weights are validated, saved and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.averages import History, Interrupt, Weights, all_weights, assert_close, loaded, whole_average
from helpers.fits import Saver, differences, log_lines, run, sgd
from helpers.modules import BATCHES, lightning, module_class, train_loader

from lit_tricks.callbacks import EMA, SWA, Lookahead, PreciseBN
from lit_tricks.callbacks.lookahead import lookahead_alpha

pl = lightning()
STEPS = 3 * BATCHES


class Window(pl.Callback):
    """Keeps the weights before each batch, and before and after the moment in which Lookahead copies."""

    def __init__(self) -> None:
        self.before: list[Weights] = []
        self.stepped: list[Weights] = []
        self.after: list[Weights] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.stepped.append(all_weights(module)))

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.before.append(all_weights(module))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.after.append(all_weights(module))


def floating(weights: Weights) -> Weights:
    return {name: value.double() for name, value in weights.items() if value.is_floating_point()}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and formulas


@pytest.mark.parametrize("arguments", [{"k": 0}, {"alpha": 0.0}, {"alpha": 1.5}, {"schedule": "linear"}])
def test_rejects_arguments(arguments):
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=rf"Lookahead\({name}={value!r}\)"):
        Lookahead(**arguments)


def test_cubic_schedule_is_that_of_airbench():
    """https://github.com/KellerJordan/cifar10-airbench/blob/master/legacy/airbench94.py: alpha_schedule."""
    total = 40
    theirs = 0.95**5 * (torch.arange(total + 1) / total).double() ** 3  # the share of the old slow weights
    ours = [1 - lookahead_alpha(1 - 0.95**5, step / total) for step in range(total + 1)]
    torch.testing.assert_close(torch.tensor(ours).double(), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("buffers", ["statistics", "copy"])
@pytest.mark.parametrize("schedule", ["constant", "cubic"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_slow_weights_are_those_of_the_formula(k, schedule, buffers):
    window = Window()
    trick = Lookahead(k=k, alpha=0.3, schedule=schedule, buffers=buffers)
    result = run(trick, window)
    slow = floating(window.before[0])
    for step, (stepped, after) in enumerate(zip(window.stepped, window.after, strict=True), start=1):
        if step % k:
            assert not differences(stepped, after)
            continue
        alpha = 0.3 if schedule == "constant" else 1 - 0.7 * (step / STEPS) ** 3
        now = floating(stepped)
        moved = {name: old + alpha * (now[name] - old) for name, old in slow.items()}
        copied = {name for name in slow if "running" in name and buffers == "copy"} | {"state"}
        slow = {name: now[name] if name in copied else value for name, value in moved.items()}
        assert_close({name: value for name, value in after.items() if name in slow}, slow)
    assert len(window.stepped) == STEPS
    final = all_weights(result.module)
    kept = {name: value for name, value in slow.items() if not ("running" in name and buffers == "copy")}
    assert_close({name: final[name] for name in kept}, kept)


def test_steps_are_those_of_timm():
    timm_optim = pytest.importorskip("timm.optim")

    def wrapped(module: Any) -> Any:
        optimizer = timm_optim.Lookahead(sgd(module)[0], alpha=0.5, k=3)
        for parameter in module.parameters():  # timm starts from the weights after k steps, the paper from the first
            optimizer._base_optimizer.state[parameter]["lookahead_slow_buff"] = parameter.detach().clone()
        return optimizer

    theirs, ours = History(), History()
    run(theirs, optimizers=wrapped)
    run(Lookahead(k=3, buffers="copy"), ours)
    assert len(theirs.weights) == len(ours.weights) == STEPS
    for their, our in zip(theirs.weights, ours.weights, strict=True):
        assert_close(our, their)


def test_alpha_of_one_does_not_change_training():
    plain, tricked = History(), History()
    run(plain)
    run(Lookahead(k=2, alpha=1.0), tricked)
    assert not differences(tricked.weights, plain.weights)


def test_state_of_the_optimizer_is_kept():
    assert not differences(run(Lookahead(k=STEPS + 1)).optimizers, run().optimizers)


# ---------------------------------------------------------------------------------------------------------------------
# Steps, not batches


def test_counts_optimizer_steps_under_accumulation():
    window = Window()
    run(Lookahead(k=2), window, accumulate_grad_batches=2)
    moved = [i for i, after in enumerate(window.after) if differences(after, window.stepped[i // 2])]
    assert len(window.stepped) == STEPS // 2
    # batch 4 ends the second step; between the batches of a step only running statistics move
    params = [name for name, _ in module_class("lightning")().named_parameters()]
    copied = [
        i for i in moved if i % 2 and any(differences(window.after[i][n], window.stepped[i // 2][n]) for n in params)
    ]
    assert copied == [3, 7, 11]


def test_does_not_count_steps_that_a_scaler_skips():
    window = Window()
    trick = Lookahead(k=2)
    result = run(trick, window, precision="16-mixed")
    steps = len(window.stepped)  # its hooks run in real steps only
    assert steps < result.trainer.global_step == STEPS
    assert trick.state_dict()["steps"] == steps
    assert trick.state_dict()["updates"] == 1 + steps // 2


def test_two_optimizers_count_a_batch_as_a_step():
    trick = Lookahead(k=4)
    run(trick, manual=True)
    assert trick.state_dict()["steps"] == STEPS


# ---------------------------------------------------------------------------------------------------------------------
# Which weights are where


def test_validation_and_checkpoints_have_the_slow_weights(tmp_path):
    seen: list[Weights] = []

    class Spy(pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            seen.append(all_weights(module))

    window, saver = Window(), Saver(tmp_path)
    run(Lookahead(k=3), Spy(), window, saver)
    validated = [window.after[step - 1] for step in (3, 6, 12)]  # the last multiple of k at steps 4, 8 and 12
    for found, expected in zip(seen, validated, strict=True):
        names = [name for name, value in expected.items() if value.is_floating_point() and name != "state"]
        assert not differences({n: found[n] for n in names}, {n: expected[n] for n in names})
    for path in saver.paths:
        content, step = loaded(path), int(path.name.partition("-")[0])
        expected = window.after[3 * (step // 3) - 1] if step >= 3 else window.before[0]
        assert not differences(content["state_dict"]["net.0.0.weight"], expected["net.0.0.weight"]), path.name
        raw = content["callbacks"]["Lookahead"]["raw"]
        assert ("net.0.0.weight" in raw) == bool(step % 3), path.name


def test_resume_in_the_middle_of_k_steps_is_bitwise(tmp_path):
    saver = Saver(tmp_path)
    how = {"k": 5, "alpha": 0.4, "schedule": "cubic"}
    full = run(Lookahead(**how), saver)
    for path in saver.paths:
        resumed = run(Lookahead(**how), ckpt_path=path)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.optimizers, full.optimizers), path.name
        assert not differences(resumed.tricks, full.tricks), path.name


def test_an_error_leaves_the_trained_weights():
    window = Window()
    with pytest.raises(ZeroDivisionError):
        run(Lookahead(k=5), window, Interrupt("on_train_batch_start", ZeroDivisionError()))
    plain = Window()
    run(Lookahead(k=5), plain)
    assert not differences(window.before[-1], plain.before[len(window.before) - 1])


def test_cubic_needs_the_length_of_the_run():
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from train_loader()

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    with pytest.raises(RuntimeError, match=r"Lookahead.*length of the run"):
        run(Lookahead(schedule="cubic"), loader=loader, max_epochs=1, limit_val_batches=0)


# ---------------------------------------------------------------------------------------------------------------------
# Together with other tricks


@pytest.mark.parametrize("other", [EMA(0.5), SWA(0.1)], ids=["EMA", "SWA"])
@pytest.mark.parametrize("first", [True, False])
def test_rejects_another_average_that_is_validated(other, first):
    tricks = [Lookahead(), other] if first else [other, Lookahead()]
    with pytest.raises(RuntimeError, match=r"both decide which weights are validated.*validate=False"):
        run(*tricks)


@pytest.mark.parametrize("first", [True, False])
def test_average_aside_is_of_the_weights_after_the_copy(first):
    ema, history = EMA(0.6, warmup=False, validate=False), History()
    tricks = [Lookahead(k=2), ema] if first else [ema, Lookahead(k=2)]
    run(*tricks, history)
    average = floating(history.weights[0])
    for weights in history.weights[1:]:
        average = {n: 0.6 * average[n] + 0.4 * v for n, v in floating(weights).items()}
    found = whole_average(ema)
    assert_close(found, average)


def test_statistics_are_estimated_for_the_slow_weights():
    trick = PreciseBN(num_samples=16)
    result = run(Lookahead(k=3, alpha=0.3), trick)
    plain = run(Lookahead(k=3, alpha=0.3))
    names = [name for name, _ in result.module.named_parameters()]
    assert not differences({n: result.weights[n] for n in names}, {n: plain.weights[n] for n in names})
    assert differences(result.weights["net.0.1.running_var"], plain.weights["net.0.1.running_var"])


def test_says_what_it_does():
    with log_lines() as records:
        run(Lookahead(k=3, alpha=0.3, schedule="cubic"))
    [line] = [r.getMessage() for r in records if r.getMessage().startswith("Lookahead")]
    assert "1 to 0.3 (cubic)" in line
    assert "every 3 steps" in line
