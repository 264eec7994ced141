"""EMA: its numbers, what is validated, saved and kept, and every situation that averaging callbacks fail in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.averages import (
    HOOKS,
    SAVERS,
    STOPS,
    TRAINING_HOOKS,
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
from helpers.modules import (
    BATCHES,
    eval_loader,
    image_and_label,
    lightning,
    module_class,
    train_loader,
    wrapped_by_fsdp1,
)
from torch import nn

from lit_tricks.callbacks import EMA, SWA
from lit_tricks.callbacks.averaging.bf16_split import join, remainder_of, round_to
from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.callbacks.ema import ema_decay, ema_decay_of_half_life

pl = lightning()
STEPS = 3 * BATCHES  # of a run of ``_fits.run``


def reference(
    history: list[Weights], decay: float, warmup: bool = False, every: int = 1, start: int = 0, copy: str = "no name"
) -> Weights:
    """The average after the last of these steps, in float64. Integers are those of the last step."""
    average: Weights = {}
    updates = 0
    for step, weights in enumerate(history, start=1):
        if step > start and (step - start) % every == 0:
            d = 0.0 if not updates else min(decay, 1 - (1 + updates) ** (-2 / 3)) if warmup else decay
            average = {k: d * average[k] + (1 - d) * v.double() if updates else v.double() for k, v in weights.items()}
            updates += 1
    last = history[-1]
    return {k: v if last[k].is_floating_point() and copy not in k else last[k] for k, v in average.items()}


def plain_history(**kwargs: Any) -> list[Weights]:
    history = History()
    run(history, **kwargs)
    return history.weights


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and formulas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay=1.0"),
        ({"decay": -0.1}, r"decay=-0.1"),
        ({"decay": 0.9, "half_life": 1.0}, "decay=0.9, half_life=1.0"),
        ({"half_life": 0.0}, "half_life=0.0"),
        ({"half_life": math.inf}, "half_life=inf"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"start_step": -1}, "start_step=-1"),
        ({"buffers": "raw"}, "buffers='raw'"),
        ({"name": " "}, "name=' '"),
        ({"validate": "raw"}, "validate='raw'"),
        ({"device": "cuda"}, "device='cuda'"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


def test_default_decay_is_timms():
    assert EMA().decay == 0.9999


def test_warmup_is_that_of_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.utils.ModelEmaV3(nn.Linear(1, 1), decay=0.99, use_warmup=True)
    assert ema_decay(0.99, 0) == 0
    for updates in (1, 2, 10, 100, 999, 1000, 5000):
        assert ema_decay(0.99, updates) == theirs.get_decay(updates + 1)


def test_half_life_halves_whatever_the_steps():
    for steps_per_epoch in (1, 10, 1000):
        for every in (1, 4):
            decay = ema_decay_of_half_life(2.0, steps_per_epoch, every)
            assert decay ** (2 * steps_per_epoch / every) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# The average: against the recurrence in float64

CADENCES: dict[str, dict[str, Any]] = {
    "every step": {},
    "with warm-up": {"warmup": True},
    "every 5 steps": {"every_n_steps": 5},
    "from step 7": {"start_step": 7},
    "every 2 from step 3": {"start_step": 3, "every_n_steps": 2, "warmup": True},
}


@pytest.mark.parametrize("cadence", CADENCES)
def test_average_is_that_of_the_recurrence(cadence):
    arguments = {"decay": 0.8, "warmup": False} | CADENCES[cadence]
    history = History()
    result = run(EMA(**arguments), history)
    expected = reference(
        history.weights,
        0.8,
        arguments["warmup"],
        arguments.get("every_n_steps", 1),
        arguments.get("start_step", 0),
    )
    assert_close(all_weights(result.module), expected)


def test_training_is_not_changed():
    history = History()
    run(EMA(0.9), history)
    assert not differences(history.weights, plain_history())


RUNS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "two optimizers by hand": {"manual": True},
    "validation within the epoch": {"val_check_interval": 2},
    "no validation": {"limit_val_batches": 0},
    "sanity validation": {"num_sanity_val_steps": 1},
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", RUNS)
def test_counts_batches_that_step(kind, every):
    history = History()
    result = run(EMA(0.8, warmup=False, every_n_steps=every), history, **RUNS[kind])
    assert len(history.weights) == {"accumulation": 6}.get(kind, STEPS)
    assert_close(all_weights(result.module), reference(history.weights, 0.8, every=every))


@pytest.mark.parametrize("every", [4, 10])
def test_counts_batches_of_two_optimizers_by_hand(every):  # other averages count the steps of both optimizers
    history = History()
    result = run(EMA(0.8, warmup=False, every_n_steps=every), history, manual=True)
    assert_close(all_weights(result.module), reference(history.weights, 0.8, every=every))


def test_accumulation_that_changes_from_epoch_to_epoch():
    history = History()
    result = run(EMA(0.8), history, pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 4}))
    assert len(history.weights) == 6
    assert_close(all_weights(result.module), reference(history.weights, 0.8, warmup=True))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_does_not_count_skipped_steps(fused, every):
    def optimizers(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)

    history = History()
    result = run(EMA(0.8, every_n_steps=every), history, precision="16-mixed", optimizers=optimizers)
    params = [name for name, _ in result.module.named_parameters()]
    before = [all_weights(module_class("lightning")()), *history.weights[:-1]]
    real = [
        w
        for old, w in zip(before, history.weights, strict=True)
        if differences(*({k: x[k] for k in params} for x in (old, w)))
    ]
    assert 0 < len(real) < STEPS == result.trainer.global_step
    assert result.tricks[0]["steps"] == len(real)
    weights = all_weights(result.module)
    assert_close({k: weights[k] for k in params}, reference(real, 0.8, warmup=True, every=every))


@pytest.mark.parametrize("part", ["module", "submodule", "in configure_model"])
def test_compiled_module_is_averaged(part):
    class Module(module_class("lightning")):
        def configure_model(self) -> None:
            if part == "in configure_model" and not hasattr(self.net[0], "_orig_mod"):
                self.net[0] = torch.compile(self.net[0], backend="eager")

    torch._dynamo.reset()
    module = Module(quiet=True)
    if part == "submodule":
        module.net[0] = torch.compile(module.net[0], backend="eager")
    trainer = make_trainer(EMA(0.8), enable_model_summary=False)  # it warns that it cannot count compiled operations
    torch.manual_seed(0)
    fitted = torch.compile(module, backend="eager") if part == "module" else module
    trainer.fit(fitted, train_loader(), eval_loader())
    weights = {name.replace("_orig_mod.", ""): value for name, value in weights_of(module).items()}
    assert_close(weights, run(EMA(0.8), quiet=True).weights)


# ---------------------------------------------------------------------------------------------------------------------
# Low precision: the average is never rounded


def bf16_state(**kwargs: Any) -> tuple[EMA, list[Weights]]:
    ema, history = EMA(0.9, warmup=False), History()
    run(ema, history, precision="bf16-true", **kwargs)
    return ema, history.weights


def test_bf16_true_keeps_an_fp32_average_that_validation_does_not_round():
    ema, history = bf16_state()
    average = whole_average(ema)
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert history[-1]["net.1.weight"].dtype == torch.bfloat16
    assert_close(average, reference(history, 0.9))
    assert not differences(average, whole_average(bf16_state(limit_val_batches=0)[0]))
    assert not differences(average, whole_average(bf16_state(val_check_interval=1)[0]))


def test_bf16_true_resumes_bitwise(tmp_path):
    def make() -> EMA:
        return EMA(0.9)

    saver, full = Saver(tmp_path), make()
    weights = run(full, saver, precision="bf16-true").weights
    for path in saver.paths:
        checkpoint = loaded(path)
        assert {v.dtype for v in checkpoint["state_dict"].values()} == {torch.bfloat16, torch.int64}
        resumed = make()
        assert not differences(run(resumed, precision="bf16-true", ckpt_path=path).weights, weights), path.name
        assert not differences(whole_average(resumed), whole_average(full)), path.name


@pytest.mark.parametrize(("optimizer", "size"), [("SGD", 3.0), ("SGD with momentum", 2.0), ("AdamW", 5 / 3)])
def test_bf16_true_checkpoint_is_as_small_as_can_be(optimizer, size, tmp_path):
    """The rounded average, what it lacks, and the weights: 6 bytes for 2. An optimizer without state has no others."""

    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Sequential(nn.Linear(16, 50000), nn.Linear(50000, 3))

        def configure_optimizers(self) -> Any:
            if optimizer == "AdamW":
                return torch.optim.AdamW(self.parameters())
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9 if "momentum" in optimizer else 0)

    sizes = []
    for callbacks in ([], [EMA(0.8)]):
        trainer = make_trainer(*callbacks, max_epochs=1, precision="bf16-true")
        trainer.fit(Module(), train_loader(), eval_loader())
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
        sizes.append((tmp_path / "x.ckpt").stat().st_size)
    assert sizes[1] / sizes[0] == pytest.approx(size, rel=0.02)


def test_join_of_rounding_and_remainder_is_exact():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    ties = (torch.arange(-(2**15), 2**15) << 16) + 2**15
    whole = torch.cat([bits, ties, torch.tensor([0, 0x7F7FFFFF, -1])]).to(torch.int32).view(torch.float32)
    whole = whole[whole.isfinite()]
    rounded = round_to(whole, torch.bfloat16)
    assert torch.equal(join(rounded, remainder_of(whole)).view(torch.int32), whole.view(torch.int32))
    apart = rounded != whole.to(torch.bfloat16)  # at ties only
    assert ((whole.view(torch.int32)[apart] & 0xFFFF) == 2**15).all()
    strange = torch.tensor([math.inf, -math.inf, math.nan])
    torch.testing.assert_close(round_to(strange, torch.bfloat16), strange.to(torch.bfloat16), equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# On the CPU


@pytest.mark.parametrize("precision", [None, "bf16-true", "16-mixed"])
@pytest.mark.parametrize("validate", [True, False, "both"])
def test_average_on_the_cpu_is_the_same(validate, precision):
    def fit(device: Any) -> Any:
        ema = EMA(0.8, every_n_steps=2, start_step=1, validate=validate, device=device)
        result = run(ema, precision=precision, val_check_interval=2)
        return result.weights, ema.state_dict(), whole_average(ema), result.logged

    assert not differences(fit("cpu"), fit(None))


def test_average_on_the_cpu_resumes_bitwise(tmp_path):
    saver, full = Saver(tmp_path), run(EMA(0.8))
    run(EMA(0.8, device="cpu"), saver)
    for path in saver.paths[::3]:
        for device in ("cpu", None):  # a checkpoint of one goes on with the other
            resumed = run(EMA(0.8, device=device), ckpt_path=path)
            assert not differences(resumed.weights, full.weights), path.name
            assert not differences(resumed.tricks, full.tricks), path.name


def test_weights_on_their_way_to_the_cpu_are_averaged_in_time():
    """They are not those that the next step makes of them."""
    module = nn.Linear(2, 2)
    weights = AveragedWeights(module, buffers="average", on_cpu=True)
    first = module.weight.detach().clone()
    weights.update(1.0)
    with torch.no_grad():
        module.weight.zero_()
    weights.update(0.5)
    with weights.showing(True):
        torch.testing.assert_close(module.weight.detach(), first / 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_average_of_weights_on_a_gpu_is_pinned_and_the_same():
    averages = []
    for on_cpu in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(100, 100).cuda()
        weights = AveragedWeights(module, buffers="average", on_cpu=on_cpu)
        for _ in range(5):
            weights.update(0.25)
            with torch.no_grad():
                module.weight.mul_(1.5)
        weights.finish()
        assert all(average.is_cuda != on_cpu and average.is_pinned() == on_cpu for average in weights._average)
        with weights.showing(True):
            averages.append(module.weight.detach().cpu())
    torch.testing.assert_close(*averages)


# ---------------------------------------------------------------------------------------------------------------------
# half_life


@pytest.mark.parametrize("every", [1, 2])
def test_half_life_is_in_epochs(every):
    plain = run(EMA(decay=0.5 ** (every / (2 * BATCHES)), warmup=False, every_n_steps=every))
    assert_close(run(EMA(half_life=2.0, warmup=False, every_n_steps=every)).weights, plain.weights, rtol=0, atol=0)


def test_half_life_counts_accumulated_steps():
    plain = run(EMA(decay=0.5 ** (1 / 2), warmup=False), accumulate_grad_batches=3)
    assert_close(
        run(EMA(half_life=1.0, warmup=False), accumulate_grad_batches=3).weights, plain.weights, rtol=0, atol=0
    )


def test_half_life_rejects_epochs_of_unknown_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from iter([]) or ()

    with pytest.raises(RuntimeError, match=r"Give EMA\(decay=...\)"):
        run(EMA(half_life=1.0), loader=torch.utils.data.DataLoader(Stream()))
    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(RuntimeError, match="GradientAccumulationScheduler"):
        run(EMA(half_life=1.0), scheduler)


# ---------------------------------------------------------------------------------------------------------------------
# Validation: what its hooks see


def test_every_hook_around_validation_sees_the_average():
    seen: list[tuple[str, str, Weights]] = []
    history = History()
    module = spy(module_class("lightning"), seen, "module")()
    first, last = spy(pl.Callback, seen, "first")(), spy(pl.Callback, seen, "last")()
    trainer = make_trainer(first, EMA(0.8), history, last, max_epochs=2, num_sanity_val_steps=0)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(), eval_loader())
    for epoch in (1, 2):
        expected = reference(history.weights[: epoch * BATCHES], 0.8, warmup=True)
        part = [x for x in seen if x[1] in HOOKS]
        half = part[: len(part) // 2] if epoch == 1 else part[len(part) // 2 :]
        assert {(who, name) for who, name, _ in half} == {(w, n) for w in ("module", "first", "last") for n in HOOKS}
        for who, name, weights in half:
            assert_close(weights, expected), (who, name)
    for who, name, weights in [x for x in seen if x[1] in TRAINING_HOOKS]:
        assert any(
            not differences(weights, dict(h)) for h in [*history.weights, all_weights(module_class("lightning")())]
        ), (who, name)
    for who, name, weights in [x for x in seen if x[1] == "on_train_end"]:
        assert_close(weights, expected), (who, name)


def test_sanity_validation_sees_the_initial_weights():
    class Module(module_class("lightning")):
        def on_validation_start(self) -> None:
            if self.trainer.sanity_checking:
                self.sanity = weights_of(self)

    module = Module()
    make_trainer(EMA(0.5), num_sanity_val_steps=1).fit(module, train_loader(), eval_loader())
    assert not differences(module.sanity, weights_of(Module()))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("interval", [1.0, 2])
def test_monitored_metric_is_that_of_the_saved_weights(tmp_path, interval):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    run(EMA(0.8), saver, enable_checkpointing=True, val_check_interval=interval)
    assert len(saver.best_k_models) == (3 if interval == 1.0 else 6)
    for path, score in saver.best_k_models.items():
        trainer = make_trainer()
        [metrics] = trainer.validate(
            module_class("lightning")(), eval_loader(), ckpt_path=path, verbose=False, weights_only=True
        )
        assert metrics["val_loss"] == score


# ---------------------------------------------------------------------------------------------------------------------
# Before the first update


def test_validates_and_saves_the_weights_as_they_are_before_the_first_update(tmp_path):
    history, seen, saver = History(), [], Saver(tmp_path)
    module = spy(module_class("lightning"), seen, "module")()
    trainer = make_trainer(EMA(0.8, start_step=6), history, saver, num_sanity_val_steps=0)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(), eval_loader())
    validated = [weights for _, name, weights in seen if name == "on_validation_epoch_end"]
    assert not differences(validated[0], history.weights[BATCHES - 1])
    assert_close(validated[1], reference(history.weights[: 2 * BATCHES], 0.8, warmup=True, start=6))
    for step, path in enumerate(p for p in saver.paths if "batch" in p.name):
        expected = history.weights[step] if step < 6 else reference(history.weights[: step + 1], 0.8, True, start=6)
        assert_close(loaded(path)["state_dict"], expected)


@pytest.mark.parametrize("arguments", [{"start_step": 1000}, {"every_n_steps": 1000}])
def test_never_hands_back_an_untrained_model(arguments, tmp_path):
    with pytest.warns(UserWarning, match=r"EMA averaged nothing.*start_step"):
        result = run(EMA(**arguments))
    plain = run()
    assert not differences(result.weights, plain.weights)
    validation = {step: metrics["val_loss"] for step, metrics in result.logged.items() if "val_loss" in metrics}
    assert validation == {step: metrics["val_loss"] for step, metrics in plain.logged.items() if "val_loss" in metrics}
    assert "ema/decay" not in {key for metrics in result.logged.values() for key in metrics}
    result.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert not differences(loaded(tmp_path / "x.ckpt")["state_dict"], plain.weights)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Save(pl.Callback):
    """Saves once, at the end of batch 6, with or without the state to resume from."""

    def __init__(self, path: Any, weights_only: bool) -> None:
        self.path, self.weights_only = path, weights_only

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("place", ["before", "after"])
def test_checkpoint_of_another_callback_holds_the_average(place, weights_only, tmp_path):
    path, history = tmp_path / "x.ckpt", History()
    save, ema = Save(path, weights_only), EMA(0.8)
    run(*([history, save, ema] if place == "before" else [ema, history, save]))
    expected = reference(history.weights[:6], 0.8, warmup=True)
    assert_close(loaded(path)["state_dict"], expected)
    assert_close(weights_of(module_class("lightning").load_from_checkpoint(path, weights_only=True)), expected)
    assert ("callbacks" in loaded(path)) == (not weights_only)
    if not weights_only:
        assert_close(loaded(path)["callbacks"]["EMA"]["raw"], history.weights[5], rtol=0, atol=0)
        assert loaded(path)["callbacks"]["EMA"]["updates"] == 6


@pytest.mark.parametrize("weights_only", [False, True])
def test_model_checkpoint_holds_the_average(weights_only, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True, save_weights_only=weights_only)
    history = History()
    run(EMA(0.8), saver, history, enable_checkpointing=True)
    for path, step in zip(sorted(tmp_path.glob("epoch*")), (4, 8, 12), strict=True):
        assert_close(loaded(path)["state_dict"], reference(history.weights[:step], 0.8, warmup=True))
    assert_close(loaded(tmp_path / "last.ckpt")["state_dict"], reference(history.weights, 0.8, warmup=True))


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_saved_after_the_fit_holds_the_average(weights_only, tmp_path):
    result = run(EMA(0.8))
    result.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    assert not differences(loaded(tmp_path / "x.ckpt")["state_dict"], result.weights)


def test_checkpoint_saved_after_the_fit_trains_longer_as_if_never_stopped(tmp_path):
    first = run(EMA(0.8), max_epochs=2)
    first.trainer.test(first.module, eval_loader(), verbose=False)  # the trained weights survive it
    first.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    resumed, full = (run(EMA(0.8), ckpt_path=path) for path in (tmp_path / "x.ckpt", None))
    assert not differences(resumed.weights, full.weights)
    assert not differences(resumed.tricks, full.tricks)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_checkpoint_is_at_most_twice_as_large(optimizer, tmp_path):
    def optimizers(module: Any) -> Any:
        return torch.optim.AdamW(module.parameters()) if optimizer == "AdamW" else torch.optim.SGD(module.parameters())

    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__(optimizers=optimizers)
            self.net[1] = nn.Sequential(nn.Linear(16, 5000), nn.Linear(5000, 3))

    sizes = []
    for callbacks in ([], [EMA(0.8)]):
        trainer = make_trainer(*callbacks, max_epochs=1)
        trainer.fit(Module(), train_loader(), eval_loader())
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
        sizes.append((tmp_path / "x.ckpt").stat().st_size)
    assert sizes[0] < sizes[1] <= 2 * sizes[0]


def test_resumes_from_a_checkpoint_without_an_average(tmp_path):
    """As a run whose average starts there."""
    saver, history = Saver(tmp_path, steps=(4,)), History()
    run(saver)
    result = run(EMA(0.8), history, ckpt_path=saver.paths[-1])
    assert_close(result.weights, reference(history.weights, 0.8, warmup=True))


def test_resume_without_the_callback_warns(tmp_path):
    saver = Saver(tmp_path, steps=(4,))
    run(EMA(0.8), saver)
    with pytest.warns(UserWarning, match=r"following callbacks: .*EMA"):
        run(ckpt_path=saver.paths[-1])


def test_rejects_the_average_of_another_module(tmp_path):
    saver = Saver(tmp_path, steps=(4,))
    run(EMA(0.8), saver)
    checkpoint = loaded(saver.paths[-1])
    checkpoint["callbacks"]["EMA"]["raw"]["head.weight"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "y.ckpt")
    with pytest.raises(RuntimeError, match=r"'head.weight'"):
        run(EMA(0.8), ckpt_path=tmp_path / "y.ckpt")


@pytest.mark.parametrize(
    "arguments",
    [{"every_n_steps": 3, "start_step": 2}, {"half_life": 0.5}, {"buffers": "copy"}, {"validate": False}],
    ids=str,
)
def test_resume_is_bitwise(arguments, tmp_path):
    saver = Saver(tmp_path)
    full = run(EMA(**arguments), saver)
    for path in saver.paths[::2]:
        resumed = run(EMA(**arguments), ckpt_path=path)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.tricks, full.tricks), path.name


def test_resume_of_a_run_that_was_over_hands_back_the_average(tmp_path):
    full = run(EMA(0.8))
    full.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    again = run(EMA(0.8), ckpt_path=tmp_path / "x.ckpt")
    assert not differences(again.weights, full.weights)
    again.trainer.save_checkpoint(tmp_path / "y.ckpt", weights_only=False)
    assert not differences(loaded(tmp_path / "y.ckpt")["callbacks"], loaded(tmp_path / "x.ckpt")["callbacks"])


# ---------------------------------------------------------------------------------------------------------------------
# After the fit


def predictions(trainer: Any, module: Any, **kwargs: Any) -> torch.Tensor:
    if "ckpt_path" in kwargs:
        kwargs["weights_only"] = True
    return torch.cat(trainer.predict(module, eval_loader(), **kwargs))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("ckpt_path", [None, "last", "best"])
@pytest.mark.parametrize("trainer", ["same", "fresh", "fresh with EMA"])
def test_test_and_predict_see_the_average(trainer, ckpt_path, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, monitor="step", mode="max")
    fitted = run(EMA(0.8), saver, enable_checkpointing=True)
    module = module_class("lightning")()
    module.load_state_dict(fitted.weights)
    module.eval()
    expected = torch.cat([module(image_and_label(batch)[0]) for batch in eval_loader()]).detach()
    used = fitted.trainer if trainer == "same" else make_trainer(*([EMA(0.8)] if "EMA" in trainer else []))
    how = {}
    if ckpt_path:
        how["ckpt_path"] = ckpt_path if trainer == "same" else (saver.best_model_path or saver.last_model_path)
    for _ in range(2):
        assert torch.equal(predictions(used, fitted.module, **how), expected)
    [validated] = used.validate(fitted.module, eval_loader(), verbose=False)
    assert validated["val_loss"] == pytest.approx(fitted.logged[STEPS - 1]["val_loss"])
    assert not differences(weights_of(fitted.module), fitted.weights)


def test_second_fit_trains_on_from_the_trained_weights():
    def twice(*callbacks: Any) -> Any:
        history = History()
        first = run(*callbacks, history, max_epochs=2)
        first.trainer.fit_loop.max_epochs = 4
        first.trainer.fit(first.module, train_loader(), eval_loader())
        return history.weights, all_weights(first.module)

    tricked, average = twice(EMA(0.8))
    assert not differences(tricked, twice()[0])
    assert len(tricked) == 4 * BATCHES
    assert_close(average, reference(tricked, 0.8, warmup=True))


def test_second_fit_trains_from_other_weights_if_the_model_was_given_some():
    first, history = run(EMA(0.8), max_epochs=2), History()
    first.module.load_state_dict(module_class("lightning")().state_dict())
    first.trainer.callbacks.append(history)
    first.trainer.fit_loop.max_epochs = 3
    history.last = first.trainer.global_step
    first.trainer.fit(first.module, train_loader(), eval_loader())
    assert len(history.weights) == BATCHES
    assert_close(all_weights(first.module), reference(history.weights, 0.8, warmup=True))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
def test_weights_that_were_loaded_after_the_fit_are_saved_as_they_are(tmp_path):
    saver = Saver(tmp_path, steps=(4,))
    fitted = run(EMA(0.8), saver)
    fitted.trainer.test(fitted.module, eval_loader(), ckpt_path=saver.paths[0], verbose=False, weights_only=True)
    fitted.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    checkpoint = loaded(tmp_path / "x.ckpt")
    assert not differences(checkpoint["state_dict"], loaded(saver.paths[0])["state_dict"])
    assert "EMA" not in checkpoint["callbacks"]  # weights to resume from would be those of another step


def test_same_object_in_a_second_trainer_starts_anew():
    ema = EMA(0.8)
    run(ema, max_epochs=1)
    assert not differences(run(ema).weights, run(EMA(0.8)).weights)


def test_second_trainer_trains_the_same_module_as_it_is():
    ema, history = EMA(0.8), History()
    first = run(ema, max_epochs=1)
    make_trainer(ema, history, max_epochs=1).fit(first.module, train_loader(), eval_loader())
    plain, again = module_class("lightning")(), History()
    plain.load_state_dict(first.weights)
    make_trainer(again, max_epochs=1).fit(plain, train_loader(), eval_loader())
    assert not differences(history.weights, again.weights)
    assert_close(weights_of(first.module), reference(history.weights, 0.8, warmup=True))


# ---------------------------------------------------------------------------------------------------------------------
# Errors and Ctrl-C


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", STOPS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_error_leaves_the_trained_weights_and_nothing_patched(hook, kind, place, restored_interrupts):
    history, stop = History(), Interrupt(hook, kind())
    ema = EMA(0.8)
    module = module_class("lightning")()
    trainer = make_trainer(history, *([stop, ema] if place == "before" else [ema, stop]))
    torch.manual_seed(0)
    with pytest.raises((ZeroDivisionError, SystemExit)):
        trainer.fit(module, train_loader(), eval_loader())
    assert not differences(all_weights(module), history.weights[-1])
    for owner in (module, trainer.strategy, trainer.fit_loop):
        assert not any(type(value).__name__ == "Wrapped" for value in vars(owner).values())
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    assert_close(whole_average(ema), reference(history.weights, 0.8, warmup=True))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint')
@pytest.mark.parametrize("saver", ["first", "last", "ModelCheckpoint", "ModelCheckpoint, weights"])
@pytest.mark.parametrize("hook", STOPS[:-1])
def test_checkpoint_on_exception_is_right_and_resumes_bitwise(hook, saver, tmp_path):
    def stopped(*callbacks: Any, folder: Any) -> Any:
        stop = Interrupt(hook, ZeroDivisionError())
        save = SAVERS.get(saver, SAVERS["OnExceptionCheckpoint"])(folder)  # ModelCheckpoint is always called last
        order = [save, stop, *callbacks] if saver == "first" else [*callbacks, stop, save]
        with pytest.raises(ZeroDivisionError):
            run(*order, enable_checkpointing=True)
        return folder / "on_exception.ckpt"

    path = stopped(EMA(0.8), folder=tmp_path)
    done = plain_history()[: loaded(path)["global_step"]]
    assert len(done) == (8 if "validation" in hook else 6)
    assert_close(loaded(path)["state_dict"], reference(done, 0.8, warmup=True))
    if "weights" in saver:
        return
    assert_close(loaded(path)["callbacks"]["EMA"]["raw"], done[-1], rtol=0, atol=0)
    rest = History()  # what the Trainer makes of such a checkpoint without EMA
    run(rest, ckpt_path=stopped(folder=tmp_path / "plain"))
    history = History()
    resumed = run(EMA(0.8), history, ckpt_path=path)
    assert not differences(history.weights, rest.weights)
    assert_close(resumed.weights, reference([*done, *rest.weights], 0.8, warmup=True))


@pytest.mark.filterwarnings("ignore:Found 9 module.s. in eval mode")  # as Lightning leaves it after an error
@pytest.mark.parametrize("hook", STOPS)
def test_fit_again_after_an_error_goes_on_with_the_trained_weights(hook):
    def caught(*callbacks: Any) -> Any:
        history = History()
        module = module_class("lightning")()
        trainer = make_trainer(*callbacks, Interrupt(hook, ZeroDivisionError()), history)
        torch.manual_seed(0)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, train_loader(), eval_loader())
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, train_loader(), eval_loader())
        return history.weights, all_weights(module)

    tricked, _ = caught(EMA(0.8))
    assert not differences(tricked, caught()[0])


# ---------------------------------------------------------------------------------------------------------------------
# Buffers and parameters of all kinds


class Kinds(module_class("lightning")):  # type: ignore[misc]
    """Integer and boolean buffers, non-persistent and infinite ones, tied and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([7, 3]))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.tied = self.net[1]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        self.hidden.add_(1.0)
        self.center = self.center + image_and_label(batch)[0].mean()  # another tensor in its place
        self.flag.logical_not_()
        return super().training_step(batch, batch_idx)

    @classmethod
    def fit(cls, *callbacks: Any, **kwargs: Any) -> tuple[Any, list[Weights]]:
        module, history = cls(), History()
        ckpt_path = kwargs.pop("ckpt_path", None)
        torch.manual_seed(0)
        trainer = make_trainer(*callbacks, history, **kwargs)
        trainer.fit(module, train_loader(), eval_loader(), ckpt_path=ckpt_path, weights_only=bool(ckpt_path) or None)
        return module, history.weights


@pytest.mark.parametrize("buffers", ["statistics", "average", "copy"])
def test_buffers_of_all_kinds(buffers):
    module, history = Kinds.fit(EMA(0.8, buffers=buffers))
    names = [name for name, _ in module.named_buffers() if buffers == "copy" or "running" not in name]
    names = ["mask"] if buffers == "average" else names
    expected = reference(history, 0.8, warmup=True)
    weights = all_weights(module)
    for name in names:
        expected[name] = history[-1][name]
    assert_close(weights, expected)
    assert weights["steps"] == STEPS
    assert weights["net.0.1.num_batches_tracked"] == STEPS
    assert weights["index"].tolist() == [7, 3]
    assert weights["hidden"][0] < STEPS if buffers == "average" else weights["hidden"][0] == STEPS
    assert module.tied.weight is module.net[1].weight
    assert {name for name, _ in module.named_buffers()} == {name for name, _ in Kinds().named_buffers()}


def test_buffers_of_all_kinds_resume_bitwise(tmp_path):
    saver = Saver(tmp_path, steps=(3, 8))
    full, _ = Kinds.fit(EMA(0.8, buffers="average"), saver)
    for path in saver.paths:
        resumed, _ = Kinds.fit(EMA(0.8, buffers="average"), ckpt_path=path)
        assert not differences(all_weights(resumed), all_weights(full)), path.name


def test_layers_built_in_setup():
    class Module(module_class("lightning")):
        def setup(self, stage: str) -> None:
            if stage == "fit":
                torch.manual_seed(0)
                self.net[1] = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 3))

    module, history = Module(), History()
    make_trainer(EMA(0.8), history).fit(module, train_loader(), eval_loader())
    assert_close(all_weights(module), reference(history.weights, 0.8, warmup=True))


def test_layers_built_in_configure_model():
    class Module(module_class("lightning")):
        def configure_model(self) -> None:
            if not hasattr(self, "head"):
                self.head = self.net[1] = nn.Linear(16, 3)

    module, history = Module(), History()
    make_trainer(EMA(0.8), history).fit(module, train_loader(), eval_loader())
    assert_close(all_weights(module), reference(history.weights, 0.8, warmup=True))


def test_state_dict_that_leaves_frozen_weights_out(tmp_path):
    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False
            self.backbone = nn.Linear(100, 100).requires_grad_(False)

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            state = super().state_dict(*args, **kwargs)
            return {name: value for name, value in state.items() if "backbone" not in name}

    def fit(*callbacks: Any, **kwargs: Any) -> Any:
        module = Module()
        torch.manual_seed(0)
        make_trainer(*callbacks).fit(module, train_loader(), eval_loader(), **kwargs)
        return module

    saver = Saver(tmp_path, steps=(3, 8))
    full = fit(EMA(0.8), saver)
    for path in saver.paths:
        state = loaded(path)
        assert not any("backbone" in name for name in state["callbacks"]["EMA"]["raw"])
        assert not differences(all_weights(fit(EMA(0.8), ckpt_path=path, weights_only=True)), all_weights(full))


def test_module_that_writes_its_own_keys_sees_the_average_in_the_checkpoint(tmp_path):
    class Module(module_class("lightning")):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}

    module, saver = Module(), Saver(tmp_path, steps=(8,))
    make_trainer(EMA(0.8), saver).fit(module, train_loader(), eval_loader())
    for path in saver.paths:
        assert not differences(loaded(path)["mine"], loaded(path)["state_dict"])


# ---------------------------------------------------------------------------------------------------------------------
# Several averages, and other callbacks


def test_several_averages_have_own_weights(tmp_path):
    def make() -> list[EMA]:
        return [EMA(0.5, name="fast", validate=False), EMA(0.9), EMA(0.7, name="slow", validate=False)]

    emas, history, saver = make(), History(), Saver(tmp_path, steps=(3, 8))
    result = run(*emas, history, saver)
    assert_close(result.weights, reference(history.weights, 0.9, warmup=True))
    for ema, decay in zip(emas, (0.5, 0.9, 0.7), strict=True):
        assert_close(whole_average(ema), reference(history.weights, decay, warmup=True))
    assert {"ema/decay", "ema/fast/decay", "ema/slow/decay"} <= set(result.logged[5])
    for path in saver.paths:
        step = loaded(path)["global_step"]
        kept = loaded(path)["callbacks"]["EMA(fast)"]["average"]
        assert_close(kept, reference(history.weights[:step], 0.5, warmup=True))
        resumed = run(*make(), ckpt_path=path)
        assert not differences(resumed.weights, result.weights)
        assert not differences(resumed.tricks, result.tricks)
        assert not differences(run(*reversed(make()), ckpt_path=path).weights, result.weights)


def test_average_only_kept_leaves_the_run_as_it_is(tmp_path):
    ema, history, saver = EMA(0.8, validate=False), History(), Saver(tmp_path, steps=(8,))
    result, plain = run(ema, history, saver), run()
    assert not differences(result.weights, plain.weights)
    logged = {s: {k: v for k, v in metrics.items() if k != "ema/decay"} for s, metrics in result.logged.items()}
    assert not differences(logged, plain.logged)
    assert not differences(loaded(saver.paths[-1])["state_dict"], history.weights[7])
    assert_close(ema.state_dict()["average"], reference(history.weights, 0.8, warmup=True))


def test_average_only_kept_can_be_used_for_validation(tmp_path):
    saver = Saver(tmp_path, steps=(8,))
    run(EMA(0.8, validate=False), saver)
    assert not differences(run(EMA(0.8), ckpt_path=saver.paths[-1]).weights, run(EMA(0.8)).weights)


def test_two_validated_averages_are_rejected():
    with pytest.raises(RuntimeError, match=r"EMA\(a\) and EMA\(b\).*validate=False"):
        run(EMA(0.8, name="a"), EMA(0.9, name="b"))


@pytest.mark.parametrize("strategy", ["FSDP1", "DeepSpeed"])
def test_strategies_that_hide_the_weights_are_rejected(strategy):
    module = module_class("lightning")()
    if strategy == "FSDP1":
        module.other = wrapped_by_fsdp1(nn.Linear(1, 1))
    else:
        module.net[1].weight.ds_id = 0
    with pytest.raises(RuntimeError, match=r"EMA .*SingleDeviceStrategy.*FSDP2"):
        make_trainer(EMA(0.8)).fit(module, train_loader(), eval_loader())


@pytest.mark.parametrize("trick", [lambda: EMA(0.8), lambda: SWA(0.1, validate=False)])
def test_optimizers_that_hide_their_steps_are_rejected(trick):
    optim = pytest.importorskip("timm.optim")

    class Lookahead(optim.Lookahead):  # type: ignore[misc]
        step = inspect.unwrap(optim.Lookahead.step)  # a copy of one would make torch wrap it

    def lookahead(module: Any) -> Any:
        return Lookahead(torch.optim.SGD(module.parameters(), lr=0.1))

    with pytest.raises(RuntimeError, match="without Lookahead"):
        run(trick(), optimizers=lookahead)


def test_checkpoint_in_shards_without_the_weights_is_rejected(tmp_path):
    ema = EMA(0.8)
    run(ema)
    with pytest.raises(RuntimeError, match="saved after the fit"):
        ema._restore({"steps": 1, "updates": 1, "shards": str(tmp_path)})


def test_a_copy_of_the_module_made_in_the_fit_works_alone():
    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            module._trainer, trainer = None, module._trainer  # as everybody does who copies a module
            self.copy = deepcopy(module)
            module._trainer = trainer

    copy, plain = Copy(), Copy()
    run(EMA(0.8), copy)
    run(plain)
    before = weights_of(copy.copy)
    assert not differences(before, weights_of(plain.copy))
    make_trainer().validate(copy.copy, eval_loader(), verbose=False)
    assert not differences(weights_of(copy.copy), before)


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_other_averages_are_rejected(name):
    other = getattr(pl.callbacks, name)(**({"swa_lrs": 0.1} if name.startswith("Sto") else {}))
    for callbacks in ([EMA(0.8), other], [other, EMA(0.8)]):
        with pytest.raises(RuntimeError, match=rf"EMA and {name}.*remove {name}"):
            run(*callbacks)


def test_early_stopping_leaves_averaged_weights(tmp_path):
    history = History()
    stop = pl.callbacks.EarlyStopping("val_loss", patience=0, stopping_threshold=100.0)
    result = run(EMA(0.8), stop, history)
    assert result.trainer.global_step == BATCHES
    assert_close(result.weights, reference(history.weights, 0.8, warmup=True))


def test_backbone_finetuning_is_averaged():
    class Module(module_class("lightning")):
        @property
        def backbone(self) -> Any:
            return self.net[0]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def fit(*callbacks: Any) -> Any:
        module, history = Module(), History()
        finetuning = pl.callbacks.BackboneFinetuning(
            1, lambda epoch: 1.0, backbone_initial_lr=0.05, should_align=False, train_bn=False
        )
        torch.manual_seed(0)
        make_trainer(*callbacks, finetuning, history).fit(module, train_loader(), eval_loader())
        return module, history.weights

    module, history = fit(EMA(0.8))
    assert_close(all_weights(module), reference(history, 0.8, warmup=True))
    assert not differences(history, fit()[1])


@pytest.mark.parametrize("finder", ["lr", "batch size"])
def test_finders_do_not_disturb_it(finder, tmp_path):
    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=m.lr))
            self.lr, self.batch_size = 0.1, 4

        def train_dataloader(self) -> Any:
            return train_loader()

        def val_dataloader(self) -> Any:
            return eval_loader()

    def fit(*callbacks: Any, fits: int = 1) -> Any:
        module, history = Module(), History()
        if finder == "lr":
            find = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
        else:
            find = pl.callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=1)
        trainer = make_trainer(*callbacks, find, history, default_root_dir=tmp_path)
        torch.manual_seed(0)
        trainer.fit(module)
        if fits == 2:
            trainer.fit_loop.max_epochs = 5
            trainer.fit(module)
        return module, history.weights

    for fits in (1, 2):
        module, history = fit(EMA(0.8), fits=fits)
        assert not differences(history, fit(fits=fits)[1])
        assert_close(all_weights(module), reference(history, 0.8, warmup=True))


def test_finder_in_the_middle_of_a_fit_does_not_disturb_it(tmp_path):
    class Find(pl.callbacks.LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, module)

    class Module(module_class("lightning")):
        lr = 0.1

        def train_dataloader(self) -> Any:
            return train_loader()

        def val_dataloader(self) -> Any:
            return eval_loader()

    def fit(*callbacks: Any) -> Any:
        module, history = Module(), History()
        find = Find(num_training_steps=5, update_attr=False)
        torch.manual_seed(0)
        make_trainer(*callbacks, find, history, default_root_dir=tmp_path).fit(module)
        return module, history.weights

    module, history = fit(EMA(0.8))
    assert not differences(history, fit()[1])
    assert_close(all_weights(module), reference(history, 0.8, warmup=True))


def test_says_what_it_does():
    with log_lines() as records:
        run(EMA(half_life=0.5, every_n_steps=2, start_step=1, name="slow"), max_epochs=1)
    [record] = records
    assert record.getMessage() == (
        "EMA: slow: decay 0.5 (half_life=0.5 epochs) with warm-up, every 2 steps after step 1; validated and saved; "
        "buffers: 2 averaged"
    )


def test_logs_the_decay():
    logged = run(EMA(0.9, every_n_steps=3)).logged
    assert [logged[step].get("ema/decay") for step in range(2)] == [None, None]
    assert [logged[step]["ema/decay"] for step in (2, 5, 8)] == pytest.approx([ema_decay(0.9, n) for n in range(3)])
