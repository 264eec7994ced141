"""The tricks whose strength follows the run: MixUp, CutMix, DropPath and LabelSmoothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fits import Saver, differences, run
from helpers.losses import fit_with
from torch import Tensor

from lit_tricks.callbacks import CutMix, DropPath, LabelSmoothing, MixUp
from lit_tricks.callbacks.drop_path import drop_path
from lit_tricks.utils.strength import strength_at

CE = F.cross_entropy
TRICKS: dict[str, tuple[Callable[..., Any], str, float]] = {  # with what each logs of its strength, and its full value
    "MixUp": (lambda **how: MixUp(alpha=1.0, **how), "mixup/strength", 1.0),
    "CutMix": (lambda **how: CutMix(**how), "cutmix/strength", 1.0),
    "DropPath": (lambda **how: DropPath(0.5, layers=["net.0.1"], **how), "drop_path/rate", 0.5),
    "LabelSmoothing": (lambda **how: LabelSmoothing(0.2, **how), "label_smoothing/smoothing", 0.2),
}
COURSES: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {  # arguments, and the strength by progress
    "constant": ({"start": 0.25, "end": 0.75}, lambda p: float(0.25 <= p < 0.75)),
    "rise": ({"start": 0.25, "end": 0.75, "schedule": "rise"}, lambda p: np.interp(p, [0.25, 0.75], [0, 1])),
    "fall": ({"start": 0.5, "schedule": "fall"}, lambda p: np.interp(p, [0.5, 1], [1, 0])),
}
each_trick = pytest.mark.parametrize("name", TRICKS)


# ---------------------------------------------------------------------------------------------------------------------
# The strength


@pytest.mark.parametrize("course", COURSES)
def test_strength_is_the_interpolation(course):
    how, expected = COURSES[course]
    for progress in np.linspace(0, 1, 41):
        assert strength_at(float(progress), **how) == pytest.approx(expected(progress), abs=1e-15)


def test_ends_are_exact_steps():
    """The share of a step is the nearest float, as the literal of the argument is."""
    for tenths, steps in itertools.product(range(1, 10), (10, 70, 390, 12_510)):
        at = tenths * steps // 10
        end = float(f"0.{tenths}")
        assert [strength_at(step / steps, end=end) for step in (at - 1, at)] == [1, 0]
        assert [strength_at(step / steps, start=end) for step in (at - 1, at)] == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


@pytest.mark.parametrize(("name", "course"), list(zip(TRICKS, ["rise", "fall"] * 2, strict=True)))
def test_each_step_has_its_strength(name, course):
    """All batches of an accumulated step have one strength."""
    make, logged, full = TRICKS[name]
    how, expected = COURSES[course]
    found = fit_with(CE, make(**how), max_epochs=4, accumulate_grad_batches=2).logged
    values = {step: row[logged] for step, row in found.items() if logged in row}
    assert values == pytest.approx({step: full * expected(step / 8) for step in range(8)})


@each_trick
def test_a_trick_is_off_outside_its_part_of_the_run(name):
    make, _, _ = TRICKS[name]

    def losses(*tricks: Any) -> list[float]:
        return [row["train_loss"] for row in fit_with(CE, *tricks, max_epochs=2).logged.values() if "train_loss" in row]

    plain, whole, late, early = losses(), losses(make()), losses(make(start=0.5)), losses(make(end=0.5))
    assert len(plain) == 8
    assert late[:4] == plain[:4]
    assert late[4] != plain[4]
    assert early[:4] == pytest.approx(whole[:4], rel=1e-6)
    assert early[4] != pytest.approx(whole[4], rel=1e-3)


@pytest.mark.parametrize("course", ["constant", "rise"])
def test_smoothing_is_that_of_the_step(course):
    how, expected = COURSES[course]
    steps = itertools.count()
    found = fit_with(CE, LabelSmoothing(0.2, **how), max_epochs=2)
    own = fit_with(lambda z, y: CE(z, y, label_smoothing=0.2 * float(expected(next(steps) / 8))), max_epochs=2)
    torch.testing.assert_close(found.weights, own.weights)


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_batches_that_are_mixed_are_mixed_as_at_full_strength(name):
    make, _, _ = TRICKS[name]
    key = f"{name.lower()}/lambda"
    full, falling = (fit_with(CE, trick, max_epochs=4).logged for trick in (make(), make(schedule="fall")))
    pairs = [(falling[step][key], full[step][key]) for step in falling if key in falling[step]]
    assert all(found in (expected, 1.0) for found, expected in pairs)
    assert 0 < sum(found == expected for found, expected in pairs) < len(pairs)


@pytest.mark.parametrize(
    ("strengths", "probs", "shares"),
    [
        ((1.0, 1.0), (1.0, 1.0), (0.5, 0.5)),
        ((0.5, 0.5), (0.2, 0.6), (0.125, 0.375)),
        ((0.5, 0.25), (1.0, 1.0), (1 / 3, 1 / 6)),
        ((1.0, 0.5), (1.0, 1.0), (2 / 3, 1 / 3)),
    ],
)
def test_mixup_and_cutmix_share_the_batches_by_their_strengths(strengths, probs, shares):
    tricks = [MixUp(prob=probs[0]), CutMix(prob=probs[1])]
    drawn = []
    for _ in range(4000):
        tricks[0]._draw_turns(dict(zip(tricks, strengths, strict=True)))
        drawn.append([trick.turn for trick in tricks])
    found = torch.tensor(drawn).double()
    assert found.sum(1).max() == 1
    torch.testing.assert_close(found.mean(0), torch.tensor(shares).double(), rtol=0, atol=0.03)


def test_a_run_resumes_within_the_change(tmp_path):
    def tricks() -> list[Any]:
        (mixup, *_), (cutmix, *_), (drop, *_), (smooth, *_) = TRICKS.values()
        return [
            mixup(schedule="fall"),
            cutmix(schedule="rise", end=0.75),
            drop(schedule="fall", start=0.25),
            smooth(end=0.5),
        ]

    saver = Saver(tmp_path, {5})
    whole = run(*tricks(), saver, max_epochs=3, accumulate_grad_batches=1)
    resumed = run(*tricks(), ckpt_path=saver.paths[0], max_epochs=3)
    assert not differences(resumed.weights, whole.weights)
    assert not differences(resumed.tricks, whole.tricks)
    assert [resumed.logged[step] for step in range(5, 12)] == [whole.logged[step] for step in range(5, 12)]


@each_trick
def test_manual_optimization_counts_batches(name):
    make, logged, full = TRICKS[name]
    found = run(make(schedule="rise"), manual=True, max_epochs=2, limit_val_batches=0).logged
    values = [row[logged] for row in found.values() if logged in row]
    assert values == pytest.approx([full * batch / 8 for batch in range(8)])


def test_a_fast_dev_run_tries_the_trick():
    assert fit_with(CE, MixUp(start=0.5), fast_dev_run=True).trainer.callback_metrics["mixup/lambda"] < 1


@each_trick
def test_runs_that_the_strength_does_not_fit(name):
    make, _, _ = TRICKS[name]
    with pytest.raises(RuntimeError, match=rf"{name} needs the length of the run.*max_steps"):
        fit_with(CE, make(end=0.5), max_epochs=-1, max_time={"minutes": 1})
    with pytest.raises(RuntimeError, match=rf"{name}\(start=0.99, end=1\) has no effect in a run of 4 steps"):
        fit_with(CE, make(start=0.99))
    with pytest.raises(ValueError, match=rf"{name}\(start=0.5, end=0.5\)"):
        make(start=0.5, end=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Drop path by a tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_rate_in_a_tensor_is_as_good_as_a_number(dtype):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    kept = torch.tensor([True, False, True, True, False, True])
    for rate in (0.0, 0.1, 0.3):
        found, expected = drop_path(x, kept, torch.tensor(rate)), drop_path(x, kept, rate)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.float32).eps, atol=0)
        gradients = [torch.autograd.grad(y.double().square().sum(), x)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=torch.finfo(torch.float32).eps * 4, atol=0)


def test_changing_rates_compile_once():
    graphs = []

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def branch(x: Tensor, kept: Tensor, rate: Tensor) -> Tensor:
        return drop_path(x, kept, rate)

    torch._dynamo.reset()
    compiled = torch.compile(branch, backend=counting)
    for rate in (0.1, 0.2, 0.3, 0.4):
        x, kept = torch.randn(4, 3), torch.tensor([True, False, True, True])
        torch.testing.assert_close(compiled(x, kept, torch.tensor(rate)), drop_path(x, kept, rate))
    assert len(graphs) == 1
