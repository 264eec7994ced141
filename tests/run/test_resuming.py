"""A resumed run: the best checkpoint so far, the curves of the run before, and what it logs of both."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import FIT, cells_in_this_process, checkpoint, cli, done, metrics, results, workplace
from helpers.fits import differences
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_tricks import WarmupCosine
from lit_tricks.run.reading.run import read_run_folder
from lit_tricks.run.resuming import BestSoFar
from lit_tricks.run.saving import LastCheckpoint


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# With scores as they are wanted

SCORES = (0.5, 0.9, 0.7, 0.8, 0.6)  # of each epoch


class Scripted(LightningModule):
    """Logs the scores, one an epoch, of two steps each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", SCORES[self.current_epoch])
        self.log("loss", 1 - SCORES[self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(version: str, epochs: int, best: ModelCheckpoint, ckpt_path: Path | str | None = None, *more: Any) -> Trainer:
    last = LastCheckpoint(filename="last")
    every = ModelCheckpoint(filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = Trainer(
        max_epochs=epochs, logger=CSVLogger("runs", "x", version), callbacks=[best, last, every, *more, BestSoFar()],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    data = DataLoader(torch.ones(2, 1))
    trainer.fit(Scripted(), data, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def top(**kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**{"filename": "best", "monitor": "score", "mode": "max"} | kwargs)


def best_of(trainer: Trainer) -> tuple[float, str, int]:
    """Score, folder and epoch of the best checkpoint."""
    callback = trainer.checkpoint_callback
    path = Path(callback.best_model_path)
    return round(float(callback.best_model_score), 6), path.parent.parent.name, checkpoint(path)["epoch"]


@pytest.mark.parametrize("settings", [{}, {"monitor": "loss", "mode": "min"}], ids=["max", "min"])
def test_the_best_of_the_run_before_stays_the_best(settings: dict[str, Any]) -> None:
    fit("v0", 2, top(**settings))
    resumed = fit("v1", 4, top(**settings), "runs/x/v0/checkpoints/last.ckpt")
    score, where, epoch = best_of(resumed)
    assert (where, epoch) == ("v1", 1)
    assert score == pytest.approx(0.9 if not settings else 0.1)
    assert Path("runs/x/v1/checkpoints/best.ckpt").read_bytes() == Path("runs/x/v0/checkpoints/best.ckpt").read_bytes()


def test_a_better_epoch_replaces_it() -> None:
    fit("v0", 1, top())
    assert best_of(fit("v1", 4, top(), "runs/x/v0/checkpoints/last.ckpt")) == (0.9, "v1", 1)
    assert checkpoint("runs/x/v0/checkpoints/best.ckpt")["epoch"] == 0


def test_it_is_carried_over_twice_and_from_a_copy(folder: Path) -> None:
    fit("v0", 2, top())
    fit("v1", 3, top(), "runs/x/v0/checkpoints/last.ckpt")
    Path("runs/x").rename("runs/moved")
    path = "runs/moved/v1/checkpoints/last.ckpt"
    assert best_of(fit("v2", 5, top(), path)) == (0.9, "v2", 1)
    assert best_of(fit("v3", 5, top(), "runs/moved/v1/checkpoints/best.ckpt")) == (0.9, "v3", 1)


@pytest.mark.parametrize("count", [2, -1])
def test_several_best_checkpoints(count: int) -> None:
    settings = {"save_top_k": count, "filename": "{epoch}-{score:.1f}"}
    fit("v0", 3, top(**settings))
    callback = fit("v1", 5, top(**settings), "runs/x/v0/checkpoints/last.ckpt").checkpoint_callback
    found = sorted(round(float(score), 6) for score in callback.best_k_models.values())
    assert found == ([0.8, 0.9] if count == 2 else [0.6, 0.8, 0.9])  # of all, the new ones and the best
    assert all(Path(path).is_file() and "v1" in path for path in callback.best_k_models)
    assert float(callback.kth_value) == pytest.approx(found[0])
    assert {path.name for path in Path("runs/x/v0/checkpoints").glob("*score*")} >= {"epoch=1-score=0.9.ckpt"}


def test_a_file_that_is_gone_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    fit("v0", 2, top())
    Path("runs/x/v0/checkpoints/best.ckpt").unlink()
    assert best_of(fit("v1", 4, top(), "runs/x/v0/checkpoints/last.ckpt")) == (0.8, "v1", 3)
    assert "best.ckpt, is gone or of a later step" in caplog.text


def test_a_file_of_a_later_step_is_not_the_best_so_far(caplog: pytest.LogCaptureFixture) -> None:
    """Resumed from its first epoch, the run has not seen the second one, whose weights are in best.ckpt."""
    fit("v0", 3, top())
    resumed = fit("v1", 1, top(), "runs/x/v0/checkpoints/epoch=0.ckpt")
    assert resumed.checkpoint_callback.best_model_path == ""
    assert "of a later step" in caplog.text


def test_a_test_of_the_copied_checkpoint_changes_nothing() -> None:
    fit("v0", 2, top())
    trainer = fit("v1", 4, top(), "runs/x/v0/checkpoints/last.ckpt")
    before = best_of(trainer)
    best = trainer.checkpoint_callback.best_model_path
    trainer.validate(trainer.lightning_module, DataLoader(torch.ones(1, 1)), ckpt_path=best, weights_only=True)
    assert best_of(trainer) == before


def test_callbacks_that_the_run_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stop = EarlyStopping("score", mode="max", patience=9)
    fit("v0", 1, top(), None, WarmupCosine(warmup_epochs=0), stop)
    with pytest.warns(UserWarning, match="callbacks used to create"):  # Lightning's, with all their settings
        fit("v1", 2, top(), "runs/x/v0/checkpoints/last.ckpt")
    assert "resumed without EarlyStopping" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# On the command line

ROUGH = (*FIT, "--trainer.callbacks+=worse.Worse", "--trainer.limit_train_batches=1")
WORSE = """
from lightning.pytorch import Callback

class Worse(Callback):
    # no image is right from the fourth epoch on
    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch >= 3:
            images, labels = batch
            labels.copy_((module(images).argmax(1) + 1) % 10)
"""


@pytest.fixture(scope="module", autouse=True)
def worse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("worse")
    (place / "worse.py").write_text(WORSE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(place)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, worse: None) -> Path:
    """Folder with a run of five epochs, one of three that is resumed, and the rest of it."""
    with workplace(tmp_path_factory.mktemp("runs")) as folder:
        done(*ROUGH, "--trainer.max_epochs=5", "--name=whole")
        done(*ROUGH, "--trainer.max_epochs=3", "--name=part")
        outcome = done(*ROUGH, "--trainer.max_epochs=5", "--name=part", "--ckpt_path=runs/part/v0")
        (folder / "stdout").write_text(outcome.out)
    return folder / "runs"


@pytest.mark.slow
def test_a_resumed_run_is_judged_by_the_epoch_of_the_whole_one(runs: Path) -> None:
    whole, resumed = results(runs / "whole/v0"), results(runs / "part/v1")
    assert whole["epoch"] < 3
    assert resumed["epoch"] == whole["epoch"]
    assert resumed["raw"] == whole["raw"]
    one, other = (checkpoint(runs / run / "checkpoints/best.ckpt") for run in ("whole/v0", "part/v1"))
    assert not differences(one["state_dict"], other["state_dict"])


@pytest.mark.slow
def test_its_report_has_the_curves_of_the_run_before_and_names_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    whole, resumed = read_run_folder(runs / "whole/v0"), read_run_folder(runs / "part/v1")

    def curve(run: Any, key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in run.rows if key in row]

    for key in ("val/top1", "train/loss_step"):
        assert curve(resumed, key) == curve(whole, key)
        assert len(curve(resumed, key)) == 5
    assert len([row for row in metrics(runs / "part/v1") if "val/top1" in row]) == 2
    assert resumed.resumes == "runs/part/v0/checkpoints/last.ckpt"
    assert resumed.starts == [3]
    assert "runs/part/v0/checkpoints/last.ckpt" in (runs / "part/v1/report.md").read_text()
    assert "resumes  runs/part/v0/checkpoints/last.ckpt" in (runs.parent / "stdout").read_text()
    done("report", "runs/part/v1", "--out", "shown")
    text = Path("shown/report.md").read_text()
    assert "It resumes runs/part/v0/checkpoints/last.ckpt at step 3." in text
    assert "Vertical lines" in text


def test_a_report_finds_the_run_before_where_both_were_moved_or_says_that_it_is_gone(runs: Path, folder: Path) -> None:
    shutil.copytree(runs, folder / "elsewhere" / "runs")
    moved = folder / "elsewhere" / "runs" / "part"
    assert len([row for row in read_run_folder(moved / "v1").rows if "val/top1" in row]) == 5
    shutil.rmtree(moved / "v0")
    alone = read_run_folder(moved / "v1")
    assert len([row for row in alone.rows if "val/top1" in row]) == 2
    assert any("runs/part/v0" in why for why in alone.missing.values())


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_for_nothing_has_its_results(runs: Path) -> None:
    done(*ROUGH, "--trainer.max_epochs=5", "--name=again", f"--ckpt_path={runs}/whole/v0")
    assert results("runs/again/v0")["raw"] == results(runs / "whole/v0")["raw"]
    assert [row for row in metrics("runs/again/v0") if "val/top1" in row] == []


@pytest.mark.slow
def test_a_killed_run_of_an_ablation_is_judged_as_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cells_in_this_process(monkeypatch)
    words = ("ablate", "--config", "tiny.yaml", "--stack", "tricks/no_bias_decay", "--mode", "drop", "--seeds", "0")
    more = (*ROUGH[3:], "--trainer.max_epochs=5")
    done(*words, "--out", "whole", "--", *more)
    # as if it had been killed after its third epoch
    cell = ("--trainer.default_root_dir=cut/runs", "--name=without-no_bias_decay-seed0", "--seed_everything=0")
    done(*FIT, *ROUGH[3:], "--trainer.max_epochs=3", *cell)
    Path("cut/runs/without-no_bias_decay-seed0/v0/results.json").unlink()
    done(*words, "--out", "cut", "--", *more)
    found = [results(f"{out}/runs/without-no_bias_decay-seed0/{v}") for out, v in (("whole", "v0"), ("cut", "v1"))]
    assert found[0]["epoch"] == found[1]["epoch"] < 3
    assert found[0]["raw"] == found[1]["raw"]
    tables = [Path(out, "ablation.csv").read_text().splitlines() for out in ("whole", "cut")]
    assert [line.split(",")[:3] for line in tables[0]] == [line.split(",")[:3] for line in tables[1]]


@pytest.mark.slow
def test_a_run_that_was_not_resumed_says_nothing_of_it() -> None:
    outcome = cli(*FIT)
    assert "resumes" not in outcome.out
    assert math.isfinite(results("runs/tiny/v0")["seconds"])
