"""Run folders wherever a command takes a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import FIT, QUIET, checkpoint, cli, done, workplace

from lit_tricks.commands.checkpoints import checkpoint_at


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_file_stands_for_itself(tmp_path: Path) -> None:
    files(tmp_path, "checkpoints/best.ckpt", "checkpoints/epoch=3.ckpt")
    path = tmp_path / "checkpoints" / "epoch=3.ckpt"
    assert checkpoint_at(path) == checkpoint_at(str(path)) == path


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_run_folder_stands_for_its_best_checkpoint(tmp_path: Path, inner: str) -> None:
    run = files(tmp_path, "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/other.ckpt")
    assert checkpoint_at(run / inner).name == "best.ckpt"
    assert checkpoint_at(run / inner, prefer="last").name == "last.ckpt"
    (run / "results.json").write_text(json.dumps({"best_checkpoint": "/gone/checkpoints/other.ckpt"}))
    assert checkpoint_at(run / inner) == run / "checkpoints" / "other.ckpt"


def test_an_interrupted_run_has_what_it_has(tmp_path: Path) -> None:
    files(tmp_path / "a", "checkpoints/last.ckpt")
    assert checkpoint_at(tmp_path / "a").name == "last.ckpt"
    files(tmp_path / "b", "checkpoints/epoch=0-step=2.ckpt")
    (tmp_path / "b" / "results.json").write_text("{")  # cut off
    assert checkpoint_at(tmp_path / "b", prefer="last").name == "epoch=0-step=2.ckpt"


@pytest.mark.parametrize(
    ("names", "error", "remedy"),
    [
        ((), FileNotFoundError, "no such file"),
        (("notes.txt",), FileNotFoundError, "this folder has no checkpoint"),
        (("checkpoints/a.ckpt", "checkpoints/b.ckpt"), IsADirectoryError, "has 2 checkpoints.*b.ckpt"),
        (("v0/checkpoints/best.ckpt", "v1/checkpoints/best.ckpt"), IsADirectoryError, "folder of 2 runs.*v1"),
        ((".metadata",), IsADirectoryError, "consolidate_checkpoint"),
    ],
)
def test_checkpoint_at_other_folder_raises(
    tmp_path: Path, names: tuple[str, ...], error: type[OSError], remedy: str
) -> None:
    with pytest.raises(error, match=rf"--ckpt {tmp_path}/x.*{remedy}"):
        checkpoint_at(files(tmp_path / "x", *names), "--ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("run")):
        done(*FIT)
        yield Path("runs/tiny/v0")


COMMANDS = {
    "test": (("test", "--ckpt_path=runs/tiny/v0", *QUIET), ""),
    "validate": (("validate", "--ckpt_path", "runs/tiny/v0", *QUIET), ""),
    "fit": (
        ("fit", "--config=runs/tiny/v0/config.yaml", "--ckpt_path=runs/tiny/v0", "--name=again"),
        "runs/again/v0/results.json",
    ),
    "card": (("card", "runs/tiny/v0"), "runs/tiny/v0/README.md"),
    "export": (("export", "runs/tiny/v0", "--format=safetensors"), "runs/tiny/v0/checkpoints/best.safetensors"),
    "average": (("average", "runs/tiny/v0", "runs/tiny/v0/checkpoints/last.ckpt", "-o", "soup.ckpt"), "soup.ckpt"),
    "resolution": (("resolution", "--ckpt=runs/tiny/v0", "--sizes", "8", "--out=sizes"), "sizes/resolution.csv"),
    "calibrate": (("calibrate", "--ckpt=runs/tiny/v0", "-o=cal.ckpt"), "cal.ckpt"),
    "fixres": (("fixres", "--ckpt=runs/tiny/v0/checkpoints", "--test-size=9", "-o=fixed.ckpt"), "fixed.ckpt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_run_folder(run: Path, command: str) -> None:
    words, made = COMMANDS[command]
    outcome = cli(*words)
    assert outcome.code == 0, outcome
    assert Path(made).exists()
    if command == "average":
        folder = run / "checkpoints"
        assert checkpoint(made)["averaged_from"] == [str(folder / "best.ckpt"), str(folder / "last.ckpt")]
