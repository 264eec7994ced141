"""A pipe where a file is read: an error or a new file within seconds, and no wait for a writer that never comes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import cli, workplace, write_image_folder, write_images
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_tricks.callbacks.soft_targets.teacher import load_teacher
from lit_tricks.commands.ablation.cells import Cell
from lit_tricks.commands.checkpoints import checkpoint_at
from lit_tricks.commands.sizes.features import FeatureFile
from lit_tricks.data import CIFAR10, CIFAR100, ImageFolder
from lit_tricks.data.io import file_index
from lit_tricks.data.io.decoded import _is_whole
from lit_tricks.models import create_model, load_weights
from lit_tricks.run.report.ablation_table import read_run
from lit_tricks.run.report.race_page import report_race
from lit_tricks.run.resuming import BestSoFar
from lit_tricks.utils.checkpoint_files import write_checkpoint

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names"),
    pytest.mark.timeout(60),
]
CHECKPOINT: dict[str, Any] = {"pytorch-lightning_version": "2.6.0", "state_dict": {"w": torch.ones(2)}}


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("cls", [CIFAR10, CIFAR100])
@pytest.mark.parametrize("kind", ["batch", "test", "meta", "archive"])
@pytest.mark.parametrize("download", [True, False])
def test_files_of_cifar(cls: Any, kind: str, download: bool, tmp_path: Path) -> None:
    reader = cls._reader
    names = {"batch": reader.train_list[-1][0], "test": reader.test_list[0][0], "meta": reader.meta["filename"]}
    path = tmp_path / reader.filename if kind == "archive" else tmp_path / reader.base_folder / names[kind]
    data = cls(str(pipe(path).parents[kind != "archive"]), download=download)
    with pytest.raises(OSError, match=path.name):
        data.prepare_data()
    with pytest.raises(OSError, match=path.name):
        data.train_dataloader()


def test_a_device_as_a_file_of_cifar(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="test_batch"):
        CIFAR10(str(tmp_path), download=False).prepare_data()


def test_a_giant_file_of_cifar(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.parent.mkdir()
    with path.open("wb") as stream:
        stream.truncate(2**31)  # without content
    with pytest.raises(OSError, match="data_batch_3"):
        CIFAR10(str(tmp_path), download=False).prepare_data()


def test_the_list_of_validation_images(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root")
    (root / "val").rename(tmp_path / "other")
    pipe(root / "train" / "split_0.25_0.csv")
    with pytest.raises(ValueError, match=r"split_0\.25_0\.csv"):
        ImageFolder(str(root), image_size=8, num_workers=0, val_fraction=0.25).val_dataloader()


@pytest.mark.parametrize("file", ["results.json", "checkpoints/last.ckpt"])
def test_a_cell_of_an_ablation(file: str, tmp_path: Path) -> None:
    cell = Cell("baseline", 0, tmp_path / "cell", [])
    pipe(cell.folder / "v0" / file)
    assert cell.finished is None
    assert cell.checkpoint is None


def test_results_and_races(tmp_path: Path) -> None:
    pipe(tmp_path / "results.json")
    pipe(tmp_path / "race.json")
    with pytest.raises(OSError, match=r"results\.json"):
        read_run(tmp_path)
    with pytest.raises(OSError, match=r"race\.json"):
        report_race(tmp_path)


def test_the_best_checkpoint_of_a_run_without_readable_results(tmp_path: Path) -> None:
    pipe(tmp_path / "results.json")
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(CHECKPOINT, tmp_path / "checkpoints" / "best.ckpt")
    found = checkpoint_at(tmp_path, "--ckpt")
    assert found is not None
    assert found.name == "best.ckpt"


def test_features_that_were_begun(tmp_path: Path) -> None:
    pipe(tmp_path / "features" / "state.json")
    assert FeatureFile(tmp_path / "features", "key", 3).done == 0
    assert not (tmp_path / "features" / "state.json").exists()


def test_the_cache_of_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_TRICKS_CACHE", str(tmp_path / "cache"))
    root = write_image_folder(tmp_path / "root")
    cache = file_index._cache_file(str(root / "train"))
    assert cache is not None
    assert file_index._read_cache(pipe(cache), str(root / "train")) == {}


@pytest.mark.parametrize("damage", ["pipe", "cut", "empty", "longer", "another number"])
def test_decoded_images_in_the_cache(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pixels"
    content = np.array([[2, 3], [1, 1]], np.int64).tobytes() + bytes(21)
    path.write_bytes(content)
    assert _is_whole(path, 2)
    path.unlink()
    if damage == "pipe":
        pipe(path)
    else:
        path.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"x"}.get(damage, content))
    assert not _is_whole(path, 3 if damage == "another number" else 2)


@pytest.mark.parametrize("ending", [".pth", ".ckpt", ".safetensors"])
def test_pipe_as_weights_is_rejected(ending: str, tmp_path: Path) -> None:
    path = pipe(tmp_path / f"x{ending}")
    with pytest.raises(OSError, match="x"):
        load_weights(create_model("resnet", 2, depth=18, width=1 / 32), str(path))


def test_pipe_as_teacher_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"x\.ckpt"):
        load_teacher(str(pipe(tmp_path / "x.ckpt")))


COMMANDS = [
    ("fit", "--config=tiny.yaml", "--ckpt_path=x.ckpt"),
    ("test", "--ckpt_path=x.ckpt"),
    ("predict", "--ckpt=x.ckpt", "photos"),
    ("predict", "--ckpt=x.onnx", "photos"),
    ("export", "x.ckpt", "--format=safetensors"),
    ("card", "x.ckpt"),
    ("resolution", "--ckpt=x.ckpt"),
    ("fixres", "--ckpt=x.ckpt", "--test_size=16", "--output=y.ckpt"),
    ("average", "x.ckpt", "y.ckpt", "--output=z.ckpt"),
    ("fit", "--config=x.ckpt"),
    ("ablate", "--config=tiny.yaml", "--stack=x.ckpt"),
    ("race", "--config=tiny.yaml", "--candidates=x.ckpt", "--budget=9"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: f"{words[0]}-{words[1]}")
def test_pipe_given_to_command_is_rejected(words: tuple[str, ...], tmp_path: Path) -> None:
    with workplace(tmp_path):
        for name in ("x.ckpt", "y.ckpt", "x.onnx"):
            pipe(tmp_path / name)
        write_images(tmp_path / "photos", 1)
        outcome = cli(*words)
        assert outcome.code == 1, outcome
        assert any(name in outcome.err for name in ("x.ckpt", "x.onnx")), outcome.err
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_pipe_in_run_folder_is_rejected(tmp_path: Path) -> None:
    with workplace(tmp_path):
        for name in ("results.json", "metrics.csv", "config.yaml", "predictions.npz"):
            pipe(tmp_path / "run" / name)
        outcome = cli("report", "run")
        assert outcome.code == 1
        assert "run" in outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint names the files that a resumed run copies


def carried(state: Any, folder: Path) -> Any:
    """Return the state that a resumed run restores into its ModelCheckpoint."""
    saver = ModelCheckpoint(folder / "new", monitor="val/top1", mode="max")
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), checkpoint_callbacks=[saver], callbacks=[saver], is_global_zero=True,
        ckpt_path=str(folder / "old" / "last.ckpt"), strategy=SimpleNamespace(barrier=lambda: None),
    )  # fmt: skip
    module: Any = None
    states = {saver.state_key: state}
    BestSoFar().on_load_checkpoint(trainer, module, {"callbacks": states, "global_step": 9})
    return states[saver.state_key]


@pytest.mark.parametrize("target", ["/", "..", ".", "{tmp}/secret", "/dev/zero", "{tmp}/pipe", "{tmp}/secret/key"])
def test_a_checkpoint_chooses_no_folder_to_copy(target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("private")
    (tmp_path / "old").mkdir()
    pipe(tmp_path / "pipe")
    path = target.format(tmp=tmp_path)
    state = {"best_model_path": path, "best_k_models": {path: torch.tensor(1.0)}, "best_model_score": torch.tensor(1.0)}
    with caplog.at_level(logging.WARNING, logger="lit_tricks"):
        found = carried(state | {"kth_value": None, "dirpath": "elsewhere"}, tmp_path)
    assert found["best_model_path"] == ""
    assert not (tmp_path / "new").exists()
    assert "gone" in caplog.text


@pytest.mark.parametrize("state", [3, [], "x", {"best_model_path": 3}, {"best_model_path": "x"}, {"best_k_models": {}}])
def test_an_odd_state_of_the_saver_is_left_to_lightning(state: Any, tmp_path: Path) -> None:
    assert carried(state, tmp_path) == state


def test_a_damaged_best_checkpoint_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "best.ckpt").write_bytes(b"cut")
    state = {"best_model_path": "best.ckpt", "best_k_models": {}, "best_model_score": torch.tensor(1.0)}
    assert carried(state | {"kth_value": None}, tmp_path)["best_model_path"] == ""
    assert "best.ckpt" in caplog.text
