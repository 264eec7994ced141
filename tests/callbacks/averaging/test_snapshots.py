"""``EMA(power=...)``: its averages, the files it leaves, and that a resumed run leaves the same."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.averages import History, Interrupt, Weights, assert_close, whole_average
from helpers.fits import Result, Saver, differences, make_trainer, run
from helpers.modules import BATCHES, eval_loader, lightning, module_class, train_loader

from lit_tricks.callbacks import EMA
from lit_tricks.callbacks.averaging.power_law import power_ema_exponent
from lit_tricks.callbacks.averaging.snapshots import (
    Snapshot,
    read_snapshot,
    snapshot_interval,
    snapshots_in,
    write_snapshot,
)
from lit_tricks.commands.ema_lengths import mixed, mixtures_of, snapshots_of

POWER = [0.05, 0.2]
pl = lightning()


def exact(history: list[Weights], length: float) -> Weights:
    """The power-law average of all steps, in float64, from the integral of its profile over each step."""
    power, end = power_ema_exponent(length) + 1, len(history)
    shares = [(step / end) ** power - ((step - 1) / end) ** power for step in range(1, end + 1)]
    names = [name for name, value in history[0].items() if value.is_floating_point()]
    return {name: sum(share * w[name].double() for share, w in zip(shares, history, strict=True)) for name in names}


def fit(folder: Path, *callbacks: Any, power: list[float] | None = None, snapshots: int = 4, **how: Any) -> Result:
    arguments = {name: how.pop(name) for name in ("validate", "name", "device", "every_n_steps") if name in how}
    trick = EMA(power=power or POWER, snapshots=snapshots, **arguments)
    return run(trick, *callbacks, default_root_dir=folder, **how)


def contents(folder: Path) -> dict[str, Any]:
    """Return the content of the snapshots of a run."""
    files = sorted((folder / "ema_snapshots").iterdir())
    return {file.name: torch.load(file, weights_only=True) for file in files}


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("most", [2, 5, 16])
def test_number_of_snapshots_is_bounded_at_every_moment(first, most):
    kept: list[int] = []
    for updates in range(1, 1000):
        interval = snapshot_interval(updates, first, most)
        kept = [each for each in [*kept, updates] if each % interval == 0]
        assert len(kept) <= most
        assert len(kept) >= min(updates // first, most // 2)


def test_snapshot_keeps_tensors_of_any_range(tmp_path):
    values = torch.tensor([1.0, -1.2345, 1e-3, 3.14159])
    average = {
        "variance": values * 1e9,
        "small": values * 1e-30,
        "double": values.double() * 1e200,
        "zero": torch.zeros(3),
        "empty": torch.zeros(0),
        "mask": torch.tensor([0.0, -torch.inf]),
        "complex": torch.tensor([1 + 2j]),
    }
    write_snapshot(tmp_path / "x", Snapshot(7, POWER, [average, average]))
    [file] = snapshots_in(tmp_path / "x").values()
    found = read_snapshot(file)
    assert (found.updates, found.lengths) == (7, POWER)
    for name, value in average.items():
        for each in found.averages:
            expected = value if value.is_complex() else value.double()
            torch.testing.assert_close(each[name], expected, rtol=2**-11, atol=0)


def test_damaged_and_other_files_are_named(tmp_path):
    write_snapshot(tmp_path, Snapshot(1, POWER, [{"a": torch.randn(9000)}] * 2))
    file = snapshots_in(tmp_path)[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"1\.pt is damaged"):
        read_snapshot(file)
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ValueError, match=r"1\.pt is not a snapshot"):
        read_snapshot(file)


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, list[Weights]]:
    """200 steps with 16 snapshots, and a checkpoint of the end."""
    folder, history = tmp_path_factory.mktemp("long"), History()
    done = fit(folder, history, snapshots=16, max_epochs=200 // BATCHES, limit_val_batches=0)
    done.trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
    return folder, done, history.weights


def test_both_averages_are_those_of_the_profile(long_run):
    _, done, history = long_run
    [trick] = [each for each in done.trainer.callbacks if isinstance(each, EMA)]
    assert_close(whole_average(trick), exact(history, POWER[0]))
    second = dict(zip(trick._second.names, trick._second._average, strict=True))
    assert_close(second, exact(history, POWER[1]))
    assert_close({n: v for n, v in done.weights.items() if v.is_floating_point()}, exact(history, POWER[0]))


@pytest.mark.parametrize("length", [0.04, 0.05, 0.075, 0.1, 0.2, 0.25])
def test_mixture_of_snapshots_is_the_average_of_all_steps(length, long_run):
    """Within 2 % of its distance from the last weights, and 0.2 % of the weights' own size."""
    folder, done, history = long_run
    snapshots = snapshots_of(folder / "last.ckpt", torch.load(folder / "last.ckpt", weights_only=True))
    [(shares, _)] = mixtures_of(snapshots, [length]).values()
    found = mixed(snapshots, shares, done.module.state_dict(), done.module)
    expected = exact(history, length)

    def distance(left: Weights, right: Weights | None = None) -> float:
        values = [(left[n].double() - (right[n].double() if right else 0)).flatten() for n in expected]
        return float(torch.cat(values).norm())

    assert distance(found, expected) < 0.02 * distance(history[-1], expected)
    assert distance(found, expected) < 2e-3 * distance(expected)


def test_disk_use_is_bounded_as_stated(tmp_path):
    class Wide(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = torch.nn.Sequential(torch.nn.Linear(16, 20_000), torch.nn.Linear(20_000, 3))

    trick = EMA(power=POWER, snapshots=2)
    make_trainer(trick, default_root_dir=tmp_path, max_epochs=2).fit(Wide(), train_loader(), eval_loader())
    files = [file.stat().st_size for file in (tmp_path / "ema_snapshots").iterdir()]
    stated = float(re.search(r"up to 3 snapshots, ([\d.]+) MB", trick.effect)[1]) * 1e6
    assert stated == pytest.approx(3 * 4 * sum(p.numel() for p in Wide().parameters()), rel=0.01)
    assert len(files) <= 3
    assert 0.6 * stated < sum(files) < 1.02 * stated


def test_a_run_of_unknown_length_thins_its_snapshots(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 23

    fit(tmp_path, Stop(), max_epochs=-1, limit_val_batches=0)
    assert sorted(map(int, (name.split(".")[0] for name in contents(tmp_path)))) == [8, 16, 23]


def test_steps_without_an_update_write_nothing(tmp_path):
    fit(tmp_path, every_n_steps=2, accumulate_grad_batches=2, max_epochs=4)  # 8 steps
    assert list(contents(tmp_path)) == ["1.pt", "2.pt", "3.pt", "4.pt"]


@pytest.mark.parametrize("how", [{"manual": True}, {"precision": "16-mixed"}], ids=str)
def test_steps_are_counted_as_those_of_the_average(how, tmp_path):
    trainer = fit(tmp_path, **how).trainer
    scaler = getattr(trainer.precision_plugin, "scaler", None)  # halves its scale in each step that it skips
    skipped = round(math.log2(scaler._init_scale / scaler.get_scale())) if scaler else 0
    assert bool(skipped) == ("precision" in how)
    assert list(contents(tmp_path)) == sorted([f"{12 - skipped}.pt", "3.pt", "6.pt", "9.pt"])


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, fast_dev_run=2)
    assert not list(tmp_path.iterdir())


def test_files_are_in_the_folder_of_the_checkpoints(tmp_path):
    saver = pl.callbacks.ModelCheckpoint(tmp_path / "saved")
    fit(tmp_path, saver, enable_checkpointing=True, name="a/b")
    assert len(snapshots_in(tmp_path / "saved" / "ema_snapshots-a_b")) == 4
    assert not (tmp_path / "ema_snapshots").exists()


def test_another_run_gets_a_folder_of_its_own(tmp_path):
    trick = EMA(power=POWER, snapshots=2)
    for namespace in ("lightning", "pytorch_lightning"):  # the same trick with another Trainer and module
        run(trick, default_root_dir=tmp_path, max_epochs=1, namespace=namespace)
    assert {path.name for path in tmp_path.iterdir()} == {"ema_snapshots", "ema_snapshots-v1"}
    assert not differences(*(contents_of(tmp_path / name) for name in ("ema_snapshots", "ema_snapshots-v1")))


def contents_of(folder: Path) -> dict[str, Any]:
    return {file.name: torch.load(file, weights_only=True) for file in sorted(folder.iterdir())}


def test_a_second_fit_of_the_same_run_continues_its_snapshots(tmp_path):
    trick, module = EMA(power=POWER, snapshots=4), module_class("lightning")()
    trainer = make_trainer(trick, default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(module, train_loader(), eval_loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, train_loader(), eval_loader())
    assert [path.name for path in tmp_path.iterdir()] == ["ema_snapshots"]
    assert list(snapshots_in(tmp_path / "ema_snapshots")) == [4, 8, 12]


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def without_place(tricks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in state.items() if key != "snapshots"} for state in tricks]


@pytest.mark.parametrize(
    "arguments", [{}, {"validate": False, "name": "aside"}, {"device": "cpu", "precision": "bf16-true"}], ids=str
)
def test_resume_is_bitwise_and_has_the_same_snapshots(arguments, tmp_path):
    saver = Saver(tmp_path, steps=(2, 5, 8))
    name = "ema_snapshots" + ("-aside" if "name" in arguments else "")
    full = fit(tmp_path / "full", saver, **arguments)
    expected = contents_of(tmp_path / "full" / name)
    assert list(expected) == ["12.pt", "3.pt", "6.pt", "9.pt"]
    for number, path in enumerate(saver.paths[::2]):
        for folder in (tmp_path / f"other{number}", tmp_path / "full"):  # the second has later snapshots already
            resumed = fit(folder, ckpt_path=path, **arguments)
            assert not differences(resumed.weights, full.weights), path.name
            assert not differences(without_place(resumed.tricks), without_place(full.tricks)), path.name
            assert not differences(contents_of(folder / name), expected), path.name
            assert [each.name for each in folder.iterdir()] == [name]


def test_a_run_is_found_after_its_folder_was_moved(tmp_path):
    saver = Saver(tmp_path / "a", steps=(8,))
    fit(tmp_path / "a", saver)
    (tmp_path / "a").rename(tmp_path / "b")
    resumed = tmp_path / "b" / saver.paths[0].name
    fit(tmp_path / "c", ckpt_path=resumed)
    assert list(snapshots_in(tmp_path / "c" / "ema_snapshots")) == [3, 6, 9, 12]


def test_a_run_killed_before_the_snapshot_of_its_step_writes_it_later(tmp_path):
    class Early(Saver):  # runs before EMA, which has not written its snapshot
        pass

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 6:
                raise SystemExit

    early = Early(tmp_path / "full", steps=(6,))
    with pytest.raises(SystemExit):
        run(early, Kill(), EMA(power=POWER, snapshots=4), default_root_dir=tmp_path / "full")
    assert list(snapshots_in(tmp_path / "full" / "ema_snapshots")) == [3]
    fit(tmp_path / "full", ckpt_path=early.paths[0])
    fit(tmp_path / "plain")
    assert not differences(contents(tmp_path / "full"), contents(tmp_path / "plain"))


def test_a_longer_run_keeps_the_number_bounded(tmp_path):
    first = fit(tmp_path)
    first.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    fit(tmp_path, ckpt_path=tmp_path / "x.ckpt", max_epochs=7)  # 28 steps, and a snapshot every 6
    assert list(snapshots_in(tmp_path / "ema_snapshots")) == [6, 12, 18, 24, 28]


def test_missing_snapshots_of_a_resumed_run_are_warned_of(tmp_path, caplog):
    saver = Saver(tmp_path, steps=(7,))
    fit(tmp_path / "full", saver)
    for file in (tmp_path / "full" / "ema_snapshots").iterdir():
        file.unlink()
    fit(tmp_path / "other", ckpt_path=saver.paths[0])
    assert "snapshots of the first 7 updates are gone" in caplog.text
    assert list(snapshots_in(tmp_path / "other" / "ema_snapshots")) == [9, 12]


def test_interrupted_fit_leaves_no_half_file_and_can_be_repeated(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, Interrupt("on_train_batch_start", RuntimeError("stop")))
    assert list(contents(tmp_path)) == ["3.pt", "6.pt"]


@pytest.mark.parametrize(
    ("before", "found"), [({"decay": 0.9}, "one exponential average"), ({"power": [0.1, 0.2]}, "power=")], ids=str
)
def test_average_of_another_kind_is_not_continued(before, found, tmp_path):
    saver = Saver(tmp_path, steps=(5,))
    run(EMA(**before), saver, default_root_dir=tmp_path, max_epochs=2)
    with pytest.raises(RuntimeError, match=rf"EMA\(power=.*{found}"):
        fit(tmp_path, ckpt_path=saver.paths[0])


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": 0.1}, r"EMA\(power=0.1\)"),
        ({"power": [0.1]}, r"EMA\(power=\[0.1\]\)"),
        ({"power": [0.05, 0.3]}, r"power=\[0.05, 0.3\]"),
        ({"power": [0.1, 0.1]}, "must differ"),
        ({"power": POWER, "decay": 0.9}, "decay=0.9"),
        ({"power": POWER, "half_life": 1.0}, "half_life=1.0"),
        ({"power": POWER, "warmup": False}, "warmup=False"),
        ({"power": POWER, "snapshots": 1}, "snapshots=1"),
        ({"snapshots": 32}, "snapshots=32.*Give power"),
    ],
    ids=str,
)
def test_arguments_of_power_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(**arguments)


def test_a_remote_folder_is_rejected(tmp_path):
    saver = pl.callbacks.ModelCheckpoint("memory://somewhere")
    with pytest.raises(RuntimeError, match=r"EMA\(power=.*local folder"):
        fit(tmp_path, saver, enable_checkpointing=True)


def test_summary_states_lengths_and_place(tmp_path):
    trick = EMA(power=POWER, snapshots=4)
    run(trick, default_root_dir=tmp_path, max_epochs=1)
    assert trick.effect.startswith("power-law averages of lengths 0.05 and 0.2, every step; validated and saved")
    assert trick.effect.endswith(str(tmp_path / "ema_snapshots"))
    assert not list(itertools.chain(tmp_path.glob("**/.*")))
