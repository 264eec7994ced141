"""Requirements on a platform: the commands, each on a small network, and files in a folder with a space."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from helpers.cli import COSINE, FIT, QUIET, cli, done, metrics, results, workplace, write_image_folder

pytestmark = pytest.mark.smoke


def test_commands_train_resume_test_and_predict(tmp_path: Path) -> None:
    place = tmp_path / "a folder"
    place.mkdir()
    with workplace(place):
        images = write_image_folder(place / "images")
        data = ("--data=ImageFolder", f"--data.root={images}", "--data.image_size=16", "--data.batch_size=4")
        done(*FIT, *data, "--data.num_workers=1", "--config=tricks/ema", *COSINE)
        first = Path("runs/tiny/v0")
        assert results(first)["averaged"]["val"]["top1"] >= 0
        last = first / "checkpoints" / "last.ckpt"
        done(
            *FIT,
            *data,
            "--config=tricks/ema",
            *COSINE,
            "--trainer.max_epochs=2",
            f"--ckpt_path={last}",
        )
        assert [row["epoch"] for row in metrics("runs/tiny/v1") if "val/loss" in row] == [1]
        best = first / "checkpoints" / "best.ckpt"
        assert "top1" in done("validate", f"--ckpt_path={best}", *QUIET).out
        done("predict", f"--ckpt_path={best}", f"--images={images / 'val'}", "--output=predictions.csv", *QUIET)
        with Path("predictions.csv").open(newline="") as stream:
            assert len(list(csv.DictReader(stream))) == 6
        done("report", str(first))
        assert (first / "report.html").stat().st_size > 1000


def test_error_is_one_line(tmp_path: Path) -> None:
    with workplace(tmp_path):
        outcome = cli("fit", "--config=nowhere.yaml")
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
