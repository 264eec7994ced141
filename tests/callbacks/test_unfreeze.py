"""Unfreeze: the schedule, the learning rates of its parts, and DDP at the moment of unfreezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import Saver, differences, log_lines, run, weights_of
from helpers.modules import lightning, module_class

from lit_tricks.callbacks import Freeze, LayerDecay, LinearScaling, NoBiasDecay, Unfreeze, WarmupCosine

HEAD = {"net.1.weight", "net.1.bias"}
CONVOLUTION = {"net.0.0.weight", "net.0.0.bias"}
NORM = {"net.0.1.weight", "net.0.1.bias"}


class Recorder(lightning().Callback):  # type: ignore[misc,name-defined]
    """Keeps what is trained in each step, and the learning rates."""

    def __init__(self) -> None:
        self.trained: list[set[str]] = []
        self.rates: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        self.trained.append({name for parameter, name in names.items() if parameter.grad is not None})
        self.rates.append({names[p]: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]})


def test_parts_are_trained_from_their_moments_on() -> None:
    seen = Recorder()
    run(Unfreeze({"net.0.1": 1, "net.0.0": 2}), seen)
    assert seen.trained == [HEAD] * 4 + [HEAD | NORM] * 4 + [HEAD | NORM | CONVOLUTION] * 4


@pytest.mark.parametrize("schedule", [{"net.0.1": 0.25, "backbone": 0.5}, {"backbone": 0.5, "net.0.1": 0.25}])
def test_what_two_entries_name_belongs_to_the_smaller_part(schedule: dict[str, float]) -> None:
    seen = Recorder()
    run(Unfreeze(schedule, unit="run"), seen)
    assert seen.trained == [HEAD] * 3 + [HEAD | NORM] * 3 + [HEAD | NORM | CONVOLUTION] * 6


@pytest.mark.parametrize("manual", [False, True])
def test_factors_multiply_the_learning_rates_under_schedules_and_other_tricks(manual: bool) -> None:
    seen, plain = Recorder(), Recorder()
    tricks = [WarmupCosine(warmup_epochs=1), LinearScaling(base_batch_size=8, batch_size=4), NoBiasDecay()]
    run(Unfreeze({"net.0.0": 1}, {"net.0.0": 0.1}), *tricks, seen, manual=manual)
    run(*tricks, plain, manual=manual)
    assert len(seen.rates) == len(plain.rates)
    for rates, others in zip(seen.rates, plain.rates, strict=True):
        for name, rate in rates.items():
            assert rate == pytest.approx(others[name] * (0.1 if name in CONVOLUTION else 1))


def test_factors_and_layer_decay_multiply_in_any_order() -> None:
    found = []
    for order in (1, -1):
        seen = Recorder()
        tricks = [Unfreeze({"net.0.0": 1}, {"net.0.0": 0.3}), LayerDecay(0.7), LinearScaling(12, batch_size=4)]
        end = run(*tricks[::order], seen)
        found.append((seen.rates, end.weights))
        assert seen.rates[0]["net.0.0.weight"] == pytest.approx(0.1 * 0.3 * 0.7 / 3)
    assert not differences(*found)


def test_groups_have_names_for_monitors() -> None:
    end = run(Unfreeze({"net.0.0": 1}, {"net.0.0": 0.1}), lightning().callbacks.LearningRateMonitor())
    assert [(group["name"], group["lr"]) for group in end.optimizers[0]["param_groups"]] == [
        ("net.0.0", pytest.approx(0.01)),
        ("rest", 0.1),
    ]
    assert all(not key.startswith("lit_tricks") for group in end.optimizers[0]["param_groups"] for key in group)


def test_resume_is_bitwise_from_every_checkpoint(tmp_path: Path) -> None:
    """Also in the middle of an epoch, at each moment, and one step before and after it."""

    def tricks() -> list[Any]:
        return [Unfreeze({"net.0.1": 0.75, "net.0.0": 1.5}, {"net.0.0": 0.5}), LayerDecay(0.5)]

    saver, seen = Saver(tmp_path), Recorder()
    full = run(*tricks(), seen, saver)
    assert seen.trained == [HEAD] * 3 + [HEAD | NORM] * 3 + [HEAD | NORM | CONVOLUTION] * 6
    for path in saver.paths:
        again = Recorder()
        resumed = run(*tricks(), again, ckpt_path=path)
        assert again.trained == seen.trained[len(seen.trained) - len(again.trained) :]
        assert not differences((resumed.weights, resumed.optimizers), (full.weights, full.optimizers)), path.name


def test_checkpoint_with_other_factors_is_an_error(tmp_path: Path) -> None:
    saver = Saver(tmp_path, steps=(4,))
    run(Unfreeze({"net.0.0": 0.5}, {"net.0.0": 0.5}), saver, max_epochs=1)
    with pytest.raises(RuntimeError, match=r"Unfreeze\(lr_factors=.*net\.0\.1\.weight"):
        run(Unfreeze({"net.0": 0.5}, {"net.0": 0.5}), ckpt_path=saver.paths[0])


def test_scheduler_with_learning_rates_of_its_own_is_an_error() -> None:
    def cyclic(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2)]

    with pytest.raises(RuntimeError, match=r"Unfreeze.*scheduler"):
        run(Unfreeze({"net.0.0": 1}, {"net.0.0": 0.5}), optimizers=cyclic)
    run(Unfreeze({"net.0.0": 1}), optimizers=cyclic)


def test_schedule_is_logged_and_a_late_moment_is_a_warning() -> None:
    with log_lines() as records, pytest.warns(UserWarning, match=r"ends after 12 steps.*step 20"):
        run(Unfreeze({"net.0.1": 1, "net.0.0": 5}, {"net.0.0": 0.5}))
    [record] = records
    assert "net.0.1 (8 parameters, 8%) frozen until step 4" in record.getMessage()
    assert "net.0.0 (40 parameters, 40%) frozen until step 20, learning rate x 0.5" in record.getMessage()


def test_overlap_with_freeze_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Unfreeze.*Freeze.*net\.0\.0|Freeze.*Unfreeze.*net\.0\.0"):
        run(Freeze(["net.0"]), Unfreeze({"net.0.0": 1}))
    seen = Recorder()
    run(Freeze(["net.0.0"]), Unfreeze({"net.0.1": 1}), seen)
    assert seen.trained == [HEAD] * 4 + [HEAD | NORM] * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": {}}, "schedule="),
        ({"schedule": {"net.0": 0}}, "schedule="),
        ({"schedule": {"net.0": 2}, "unit": "run"}, "schedule="),
        ({"schedule": {"net.0": True}}, "schedule="),
        ({"schedule": {"net.0": 1}, "lr_factors": {"net.1": 0.5}}, "'net.1' is not in the schedule"),
        ({"schedule": {"net.0": 1}, "lr_factors": {"net.0": 0}}, "lr_factors="),
    ],
)
def test_arguments_that_do_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unfreeze(**arguments)


def test_entry_without_parameters_of_its_own_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"net\.0\.\[01\].*no own parameters"):
        run(Unfreeze({"net.0.[01]": 1, "net.0": 2}))


# --- two processes ----------------------------------------------------------------------------------------------------


def test_ddp_averages_what_is_trained_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP registers parameters when it wraps the module; the contract tests compare two ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    seen: list[tuple[Any, int]] = []  # wrappers are kept, since the next one may have the id of one that is gone

    class Wrapper(lightning().Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            averaged = trainer.strategy.model._get_ddp_logging_data()["num_parameter_tensors"]
            seen.append((trainer.strategy.model, averaged))

    strategy = lightning().strategies.DDPStrategy()
    try:
        ddp = run(Unfreeze({"net.0.1": 1, "net.0.0": 2}), Wrapper(), strategy=strategy, use_distributed_sampler=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert [count for _, count in seen] == [2] * 4 + [4] * 4 + [6] * 4
    assert len({id(wrapper) for wrapper, _ in seen}) == 3
    assert not differences(ddp.weights, run(Unfreeze({"net.0.1": 1, "net.0.0": 2})).weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Freeze", "Unfreeze", "late"])
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_ranks_stay_together_after_unfreezing(strategy: str, name: str, ranks: Any) -> None:
    """Under Lightning's callback, DDP does not average the gradients of what is unfrozen (its issue 20340)."""

    def trained(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in weights.items() if key.endswith((".weight", ".bias"))}

    runs = [rank[strategy][name] for rank in ranks]
    one, other = (trained(end["weights"]) for end in runs)
    assert not differences(one, other)
    assert moved(one) == set(one)
    torch.testing.assert_close(one, trained(ranks[0]["DDP"][name]["weights"]))
    for weights in runs[0]["resumed"].values():
        assert not differences(trained(weights), one)


def moved(weights: dict[str, torch.Tensor]) -> set[str]:
    start = weights_of(module_class("lightning")())
    return {name for name, weight in weights.items() if differences(weight, start[name])}
