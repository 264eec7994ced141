"""Test what ``validate`` and ``test`` print, and what they leave in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import FIT, QUIET, checkpoint, cli, done, results, workplace

from lit_tricks.run.reading.predictions import Predictions

AVERAGED = ("--trainer.callbacks+=EMA", "--trainer.callbacks.EMA.decay=0.5")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT, "--trainer.limit_val_batches=1.0", "--trainer.limit_test_batches=1.0")
        done(*FIT, *AVERAGED, "--name=averaged")
    return folder / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_the_table_is_that_of_the_fit(trained: Path, command: str, split: str) -> None:
    out = done(command, f"--ckpt_path={trained}/tiny/v0", *QUIET).out
    found = results(trained / "tiny/v0")["raw"][split]
    (row,) = [line for line in out.splitlines() if line.startswith(f"│ {split} ")]
    assert f"{found['loss']:.4f}" in row
    assert f"{found['top1']:.2%}" in row
    assert "epoch 0, raw weights" in out
    assert "Test metric" not in out
    assert "DataLoader 0" not in out
    assert max(map(len, out.partition("checkpoint")[0].splitlines())) <= 80
    assert re.search(r"checkpoint +.*best\.ckpt\n", out)
    assert not list(Path().glob("*.json"))


@pytest.mark.slow
def test_lightnings_table_is_there_when_it_is_asked_for(trained: Path) -> None:
    assert "Test metric" in done("test", f"--ckpt_path={trained}/tiny/v0", "--verbose=true", *QUIET).out


@pytest.mark.slow
@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_results_and_predictions_are_in_the_folder(trained: Path, command: str, split: str) -> None:
    run = trained / "tiny/v0"
    out = done(command, f"--ckpt_path={run}", "--out=made/of/it", *QUIET).out
    content = results("made/of/it")
    assert content.keys() == {"checkpoint", "epoch", "raw"}
    assert (content["checkpoint"], content["epoch"]) == (str(run / "checkpoints/best.ckpt"), 0)
    assert content["raw"] == {split: pytest.approx(results(run)["raw"][split], abs=1e-6)}
    found = Predictions.read(Path("made/of/it/predictions.npz"))
    assert (found.split, found.weights, found.classes) == (split, "given", [str(i) for i in range(10)])
    assert (found.label == found.predicted).mean() == pytest.approx(content["raw"][split]["top1"])
    if split == "test":
        with np.load(run / "predictions.npz") as fitted, np.load("made/of/it/predictions.npz") as tested:
            assert {*fitted.keys()} == {*tested.keys(), "train_counts"}
            assert np.array_equal(fitted["label"], tested["label"])
            assert np.array_equal(fitted["top"], tested["top"])
    assert re.search(r"results +made/of/it/results\.json\n +predictions +made/of/it/predictions\.npz\n", out)
    done("report", "made/of/it")
    assert "with the given checkpoint" in Path("made/of/it/report.md").read_text()


@pytest.mark.slow
def test_averaged_weights_are_named(trained: Path) -> None:
    out = done("validate", f"--ckpt_path={trained}/averaged/v0", "--out=found", *QUIET).out
    assert "averaged weights" in out
    assert results("found").keys() == {"checkpoint", "epoch", "averaged"}


def test_weights_from_elsewhere_have_no_epoch(trained: Path) -> None:
    weights = f"--model.weights={trained}/tiny/v0/checkpoints/last.ckpt"
    out = done("test", "--config=tiny.yaml", weights, "--trainer.limit_test_batches=1.0", "--out=found").out
    assert "raw weights" in out
    assert "epoch" not in out
    content = results("found")
    assert (content["checkpoint"], content["epoch"]) == (None, None)
    last = checkpoint(trained / "tiny/v0/checkpoints/last.ckpt")
    assert last["epoch"] == results(trained / "tiny/v0")["epoch"]  # so that both are of the same weights
    assert content["raw"]["test"] == pytest.approx(results(trained / "tiny/v0")["raw"]["test"], abs=1e-6)


@pytest.mark.slow
def test_an_earlier_evaluation_is_replaced(trained: Path) -> None:
    for command, split in (("validate", "val"), ("test", "test")):
        done(command, f"--ckpt_path={trained}/tiny/v0", "--out=found", *QUIET)
        assert results("found")["raw"].keys() == {split}
        assert Predictions.read(Path("found/predictions.npz")).split == split


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"results.json": "{}"}, "results.json exists, and is from something else"),
        ({"results.json": '{"checkpoint": null, "mine": 1}'}, "results.json exists"),
        ({"results.json": "not JSON"}, "results.json exists"),
        ({"predictions.npz": "not an archive"}, "predictions.npz exists"),
        ({"results.json": '{"checkpoint": null, "epoch": 1, "raw": {}}', "predictions.npz": "x"}, "predictions.npz"),
    ],
)
def test_foreign_files_are_not_replaced(trained: Path, files: dict[str, str], message: str) -> None:
    Path("found").mkdir()
    for name, text in files.items():
        Path("found", name).write_text(text)
    outcome = cli("test", f"--ckpt_path={trained}/tiny/v0", "--out=found", *QUIET)
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err
    assert "Choose another folder." in outcome.err
    assert {file.name: file.read_text() for file in Path("found").iterdir()} == files


def test_a_run_keeps_its_results(trained: Path) -> None:
    run = trained / "tiny/v0"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    outcome = cli("test", f"--ckpt_path={run}", f"--out={run}", *QUIET)
    assert outcome.code == 1
    assert "belongs to a training run" in outcome.err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_folder_that_cannot_be_made(trained: Path) -> None:
    Path("file").touch()
    outcome = cli("test", f"--ckpt_path={trained}/tiny/v0", "--out=file/found", *QUIET)
    assert outcome.code == 1
    assert "--out file/found" in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.slow
def test_results_are_json_without_nan(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer.callback_metrics", {"test/loss": float("nan")})
    done("test", f"--ckpt_path={trained}/tiny/v0", "--out=found", *QUIET)
    assert json.loads(Path("found/results.json").read_text())["raw"]["test"] == {"loss": None}
