"""Weights & Biases, the real package without a login: what a run file holds, and that nothing asks or waits."""

from __future__ import annotations

import functools
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from _cli import COSINE, FIT, built, cli, done, metrics, workplace
from lightning.pytorch.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

TRACKED = (*FIT, "--config=loggers/wandb")


def stranger(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Nobody is logged in here."""
    for name in os.environ:
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")  # it writes to the terminal past pytest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "home").mkdir()
    stranger(monkeypatch, tmp_path / "home")
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[None]:
    """End the process that wandb starts for all of its runs."""
    yield
    wandb.teardown()


def records(path: Path) -> list[Any]:
    """Records of a run file: LevelDB's log format, behind seven bytes of wandb's own.

    wandb 0.31 has no reader in Python any more, only a viewer; this one reads the files of all versions.
    """
    content, found, parts = path.read_bytes(), [], b""
    assert content[:4] == b":W&B"
    at = 7
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # padding at the end of a block
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def items(updates: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def track(*words: str) -> None:
    """Fit with W&B, which has its say on stderr."""
    outcome = cli(*TRACKED, *words)
    assert outcome.code == 0, outcome
    assert "error" not in outcome.err


class Tracked:
    """What W&B was told of the run in a folder."""

    def __init__(self, run: Path) -> None:
        (self.folder,) = run.glob("wandb/*run-*-*")
        (file,) = self.folder.glob("run-*.wandb")
        deadline = time.monotonic() + 30
        while True:  # W&B's process writes the last of it after the run has ended
            self.records = records(file)
            self.exits = [record.exit.exit_code for record in self.records if record.HasField("exit")]
            if self.exits or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        (self.run,) = [record.run for record in self.records if record.HasField("run")]
        self.config = items(self.run.config.update)
        for record in self.records:
            if record.HasField("config"):
                self.config |= items(record.config.update)
        self.history = [items(record.history.item) for record in self.records if record.HasField("history")]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a finished run of two epochs."""
    home = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stranger(monkeypatch, home)
        with workplace(home):
            track(*COSINE, "--trainer.max_epochs=2")
        yield home / "runs" / "tiny" / "v0"


def test_without_a_login_it_is_offline_in_the_folder_of_the_run(first: Path) -> None:
    assert Tracked(first).folder.name.startswith("offline-run-")
    assert {path.name for path in first.iterdir()} == {
        "checkpoints", "config.yaml", "hparams.yaml", "metrics.csv", "results.json", "wandb",
    }  # fmt: skip
    assert not list(first.parents[2].glob("wandb"))


def test_the_configuration_and_the_tricks_are_there(first: Path) -> None:
    run = Tracked(first)
    assert (run.run.project, run.run.display_name) == ("lit-tricks", "tiny-v0")
    assert run.config["tricks"] == ["WarmupCosine"]
    config = yaml.safe_load((first / "config.yaml").read_text())
    for key in ("seed_everything", "model", "data", "name"):
        assert run.config["config"][key] == config[key]
    assert run.config["config"]["trainer"]["max_epochs"] == 2
    assert run.config["config"]["trainer"]["callbacks"] == config["trainer"]["callbacks"]


def test_a_picture_of_the_first_batch_is_there_once(first: Path) -> None:
    steps = [row["trainer/global_step"] for row in Tracked(first).history if any("data/preview" in key for key in row)]
    assert steps == [0]
    [file] = Tracked(first).folder.glob("files/media/images/data/preview*.png")
    assert file.stat().st_size > 10_000


def test_the_history_is_that_of_metrics_csv(first: Path) -> None:
    told: dict[tuple[float, str], float] = {}
    for row in Tracked(first).history:
        step = row["trainer/global_step"]
        row = {key: value for key, value in row.items() if not key.startswith("data/preview")}  # a picture
        told |= {(step, key): value for key, value in row.items() if "/" in key or key.startswith("lr")}
    rows = metrics(first)
    written = {(row["step"], key): row[key] for row in rows for key in row if key not in ("epoch", "step")}
    assert {key for _, key in written} >= {
        "lr-SGD",
        "train/loss_step",
        "train/top1",
        "val/loss",
        "val/top1",
        "test/ece",
    }
    assert {key: value for key, value in told.items() if key[1] != "trainer/global_step"} == pytest.approx(written)


def test_a_run_ends_with_its_command(first: Path) -> None:
    assert Tracked(first).exits == [0]
    assert wandb.run is None


def test_a_second_run_is_another_one(first: Path) -> None:
    track()
    track()
    one, other = Tracked(Path("runs/tiny/v0")), Tracked(Path("runs/tiny/v1"))
    assert len({one.run.run_id, other.run.run_id, Tracked(first).run.run_id}) == 3
    assert [run.run.display_name for run in (one, other)] == ["tiny-v0", "tiny-v1"]


def test_a_resumed_run_goes_on_in_the_same_one(first: Path) -> None:
    track(*COSINE, "--trainer.max_epochs=3", f"--ckpt_path={first}/checkpoints/last.ckpt")
    before, after = Tracked(first), Tracked(Path("runs/tiny/v0"))
    assert after.run.run_id == before.run.run_id
    steps = [row["trainer/global_step"] for row in after.history if "train/loss_step" in row]
    assert steps == [4, 5]
    track(f"--model.weights={first}/checkpoints/last.ckpt")  # a new beginning
    assert Tracked(Path("runs/tiny/v1")).run.run_id != before.run.run_id


def test_a_repeated_configuration_is_another_run(first: Path) -> None:
    track(f"--ckpt_path={first}/checkpoints/last.ckpt", "--trainer.max_epochs=3")
    config = "runs/tiny/v0/config.yaml"
    assert yaml.safe_load(Path(config).read_text())["trainer"]["logger"]["init_args"]["offline"] is False
    files = sorted(Path("runs/tiny/v0").rglob("*"))
    outcome = cli("fit", "--config", config, "--ckpt_path=null")
    assert outcome.code == 0, outcome
    assert sorted(Path("runs/tiny/v0").rglob("*")) == files
    again = Tracked(Path("runs/tiny/v1"))
    assert again.run.run_id != Tracked(first).run.run_id
    assert again.run.display_name == "tiny-v1"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the loggers that are made."""
    seen: list[dict[str, Any]] = []
    init = WandbLogger.__init__

    def note(self: WandbLogger, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(WandbLogger, "__init__", functools.wraps(init)(note))
    return seen


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]) -> None:
    words = ("--trainer.logger.name=mine", "--trainer.logger.project=ours", "--trainer.logger.save_dir=there")
    built(monkeypatch, *TRACKED, *words)
    assert [asked[0][key] for key in ("name", "project", "save_dir", "offline")] == ["mine", "ours", "there", True]


@pytest.mark.parametrize(
    ("place", "content", "variables", "offline"),
    [
        (None, "", {}, True),
        (None, "", {"WANDB_API_KEY": "0" * 40}, False),
        (None, "", {"WANDB_MODE": "online"}, False),
        ("home/.netrc", "machine api.wandb.ai login user password x", {}, False),
        ("home/_netrc", "machine api.wandb.ai login user password x", {}, False),
        ("keys", "machine api.wandb.ai login user password x", {"NETRC": "keys"}, False),
        (
            "home/.netrc",
            "machine ours.example login user password x",
            {"WANDB_BASE_URL": "https://ours.example"},
            False,
        ),
        ("home/.netrc", "machine github.com login user password x", {}, True),
        ("home/.netrc", "not a netrc at all", {}, True),
    ],
)
def test_a_login_is_found(
    monkeypatch: pytest.MonkeyPatch,
    asked: list[dict[str, Any]],
    place: str | None,
    content: str,
    variables: dict[str, str],
    offline: bool,
) -> None:
    if place:
        Path(place).write_text(content)
        Path(place).chmod(0o600)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    built(monkeypatch, *TRACKED)
    assert [arguments["offline"] for arguments in asked] == [offline]


def test_wandb_beside_another_logger(
    monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]], folder: Path
) -> None:
    Path("both.yaml").write_text(
        "trainer: {logger: [{class_path: WandbLogger}, {class_path: TensorBoardLogger, init_args: {save_dir: .}}]}"
    )
    made = built(monkeypatch, *FIT, "--config=both.yaml")
    kinds = [type(logger).__name__ for logger in made.trainer.loggers]
    assert kinds == ["CSVLogger", "WandbLogger", "TensorBoardLogger"]
    assert asked[0]["save_dir"] == str(folder.resolve() / "runs" / "tiny" / "v0")


@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")  # Lightning says that it joins in
def test_the_run_of_a_caller_goes_on() -> None:
    with wandb.init(mode="offline", dir=".") as mine:
        track()
        assert wandb.run is mine
    assert wandb.run is None


@pytest.mark.slow
def test_nothing_is_asked_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SILENT")
    command = [sys.executable, "-m", "lit_tricks", *TRACKED]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert "wandb: no login found, so the run is tracked offline; `wandb sync` uploads it later." in process.stderr
    for word in ("Traceback", "Warning", "Enter", "choice"):
        assert word not in process.stdout + process.stderr
    assert Tracked(Path("runs/tiny/v0")).exits == [0]


def test_wandb_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track()
    wandb.teardown()
    assert not list(Path().rglob("*run-*"))
    assert metrics("runs/tiny/v0")


def test_tensorboard() -> None:
    done(*FIT, *COSINE, "--config=loggers/tensorboard")
    (folder,) = Path("runs/tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    told = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    rows = metrics("runs/tiny/v0")
    written = {(row["step"], key): row[key] for row in rows for key in row if key not in ("epoch", "step")}
    assert {key: value for key, value in told.items() if key in written} == pytest.approx(written)
    assert {key for _, key in written} >= {"lr-SGD", "train/loss_step", "val/top1", "test/top5"}
