"""``lit-tricks average --ema_length``: which average it writes, by what, and what it rejects."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.averages import all_weights
from helpers.cli import FIT, checkpoint, cli, done, workplace
from helpers.fits import make_trainer
from helpers.modules import datamodule_class, lightning, module_class

from lit_tricks.callbacks import EMA
from lit_tricks.callbacks.averaging.power_law import power_ema_exponent
from lit_tricks.commands import average
from lit_tricks.commands.ema_lengths import lengths_of
from lit_tricks.commands.model_card import Facts, text_of

POWER = [0.05, 0.2]
pl = lightning()


class Scored(module_class("lightning")):
    """Its metric is how near its first bias is to a target. Two of its parameters are one."""

    def __init__(self, target: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.target = target
        self.shared = self.net[1].weight
        self.net[0][0].requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))  # no statistic, so it is not averaged

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/top1", -(self.net[1].bias[0] - self.target).abs())


class Data(datamodule_class("lightning")):
    """Its test split must not be loaded."""

    def test_dataloader(self) -> Any:
        raise AssertionError


class Biases(pl.Callback):
    """Keeps the bias that the metric depends on, after each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.values.append(float(all_weights(module)["net.1.bias"][0]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of a run of 80 steps, and a bias after each of them."""
    folder, biases = tmp_path_factory.mktemp("run"), Biases()
    saver = pl.callbacks.ModelCheckpoint(folder / "checkpoints", "last")
    torch.manual_seed(0)
    trainer = make_trainer(
        EMA(power=POWER), saver, biases, enable_checkpointing=True, max_epochs=20, limit_val_batches=0
    )
    trainer.fit(Scored(), datamodule=Data())
    return folder, biases.values


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


def exact(values: list[float], length: float) -> float:
    """The average of all steps, in float64."""
    power, end = power_ema_exponent(length) + 1, len(values)
    return sum(((i + 1) ** power - i**power) / end**power * value for i, value in enumerate(values))


def table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.mark.slow
def test_the_best_length_on_validation_is_written(trained, caplog):
    run, values = trained
    target = exact(values, 0.15)
    caplog.set_level("INFO", "lit_tricks")
    average([str(run)], "x.ckpt", ema_length="0.05:0.25", data=Data(), module=Scored(target))
    content, rows = checkpoint("x.ckpt"), table("x.csv")
    assert content["ema_length"] == 0.15
    assert content["chosen_by"] == "val/top1"
    assert content["state_dict"]["net.1.bias"][0] == pytest.approx(target, abs=2e-3)
    assert [float(row["ema_length"]) for row in rows] == [0.05, 0.1, 0.15, 0.2, 0.25]
    for row in rows:
        length = float(row["ema_length"])
        assert float(row["val/top1"]) == pytest.approx(-abs(exact(values, length) - target), abs=2e-3)
        assert float(row["profile_error"]) < 0.05
    lines = caplog.messages
    assert sum("val/top1" in line for line in lines) == 5
    assert lines[-1].endswith("the best of 5 on validation")
    assert not {"callbacks", "optimizer_states", "loops"} & content.keys()
    assert "power-law average of the run, of length 0.15." in text_of(Facts.of(Path("x.ckpt")), "mit")


def test_mode_min_takes_the_lowest(trained):
    run, values = trained
    average([str(run)], "x.ckpt", ema_length="0.05:0.2:2", mode="min", data=Data(), module=Scored(exact(values, 0.2)))
    assert checkpoint("x.ckpt")["ema_length"] == 0.05


def test_state_dict_is_complete_and_not_averaged_parts_are_kept(trained):
    run, _ = trained
    average([str(run / "checkpoints" / "last.ckpt")], "x.ckpt", ema_length="0.1", data=Data(), module=Scored())
    last, found = checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"], checkpoint("x.ckpt")["state_dict"]
    assert list(found) == list(last)
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in last.items()}
    assert torch.equal(found["shared"], found["net.1.weight"])
    assert not torch.equal(found["shared"], last["shared"])
    assert found["steps"] == last["steps"] == 80
    assert torch.equal(found["net.0.0.weight"], last["net.0.0.weight"])  # frozen, and not rounded to 16 bits
    Scored().load_state_dict(found)


def test_without_data_one_length_is_written_without_a_metric(trained, caplog):
    average([str(trained[0])], "x.ckpt", ema_length="0.1", module=Scored())
    assert "not re-estimated" in caplog.text
    assert table("x.csv")[0]["val/top1"] == ""
    with pytest.raises(ValueError, match="give --data"):
        average([str(trained[0])], "y.ckpt", ema_length="0.1:0.2", module=Scored())


def test_weights_only_checkpoints_find_the_snapshots_next_to_them(trained):
    run = shutil.copytree(trained[0] / "checkpoints", "moved")
    content = checkpoint(Path(run) / "last.ckpt")
    del content["callbacks"]
    torch.save(content, "moved/last.ckpt")
    average(["moved"], "x.ckpt", ema_length="0.1", module=Scored())
    shutil.copytree("moved/ema_snapshots", "moved/ema_snapshots-v1")
    with pytest.raises(ValueError, match="several averages"):
        average(["moved"], "y.ckpt", ema_length="0.1", module=Scored())


def test_a_run_without_snapshots_is_named(trained):
    Path("x").mkdir()
    content = checkpoint(trained[0] / "checkpoints" / "last.ckpt")
    content["callbacks"] = {}
    torch.save(content, "x/last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"x/last.ckpt\. Train with EMA\(power="):
        average(["x"], "y.ckpt", ema_length="0.1", module=Scored())


def test_snapshots_of_another_model_are_named(trained):
    class Other(Scored):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = torch.nn.Linear(16, 5)

    with pytest.raises(ValueError, match=r"another model than Other, which has no '.*' of shape"):
        average([str(trained[0])], "x.ckpt", ema_length="0.1", module=Other())


@pytest.mark.parametrize("length", ["0.01", "0.28"])
def test_a_length_beyond_the_snapshots_names_the_range(length, trained):
    with pytest.raises(ValueError, match=rf"--ema_length {length}: .*lengths from 0.03 to 0.26.*snapshots="):
        average([str(trained[0])], "x.ckpt", ema_length=length, module=Scored())
    assert not Path("x.ckpt").exists()


def test_lengths_of_a_range():
    assert lengths_of("0.1") == [0.1]
    assert lengths_of("0.05:0.25") == [0.05, 0.1, 0.15, 0.2, 0.25]
    assert lengths_of("0.1:0.2:3") == [0.1, 0.15, 0.2]


@pytest.mark.parametrize("text", ["", "a", "0", "0.3", "nan", "0.2:0.1", "0.1:0.1", "0.1:0.2:1", "0.1:0.2:3:4", "0.1:"])
def test_other_lengths_are_rejected(text):
    with pytest.raises(ValueError, match=r"--ema_length .*0\.05:0\.25"):
        lengths_of(text)


def test_a_range_has_three_parts_at_most():
    with pytest.raises(ValueError, match=r"0\.1:0\.2:3:4 is not a number or a range"):
        lengths_of("0.1:0.2:3:4")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"checkpoints": ["a", "b"]}, "within one run, got 2"),
        ({"greedy": True}, "--greedy exclude each other"),
        ({"output": "x.csv"}, "end its name with .ckpt"),
        ({"num_samples": 0}, "--num_samples=0"),
    ],
    ids=str,
)
def test_arguments_that_exclude_each_other(more, message, trained):
    arguments = {"checkpoints": [str(trained[0])], "output": "x.ckpt", "ema_length": "0.1"} | more
    with pytest.raises(ValueError, match=message):
        average(**arguments)


def test_table_that_exists_is_not_overwritten(trained):
    Path("x.csv").write_text("precious")
    with pytest.raises(FileExistsError, match=r"x\.csv exists"):
        average([str(trained[0])], "x.ckpt", ema_length="0.1", module=Scored())
    average([str(trained[0])], "x.ckpt", ema_length="0.1", module=Scored(), overwrite=True)
    assert table("x.csv")


@pytest.mark.slow
def test_the_command_takes_model_and_data_from_the_run():
    more = ("--trainer.limit_train_batches=4", "--trainer.max_epochs=2", "--data.batch_size=32")
    done(*FIT, "--trainer.callbacks+=EMA", "--trainer.callbacks.power=[0.05,0.2]", *more)
    outcome = done("average", "runs/tiny/v0", "-o", "x.ckpt", "--ema-length=0.1:0.2:2", "--num-samples=64")
    assert "x.ckpt: the average of length" in outcome.log
    assert "not re-estimated" not in outcome.log
    assert [float(row["ema_length"]) for row in table("x.csv")] == [0.1, 0.2]
    outcome = cli("average", "runs/tiny/v0", "-o", "y.ckpt", "--ema-length=0.29")
    assert "--ema_length 0.29" in outcome.err
