"""Work is not lost: at a full disk, at SIGKILL in any moment, with two processes in one folder."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers.cli import FIT, cells_in_this_process, cli, done, workplace
from helpers.sleepers import alive, sleepers, wait_for
from lightning.fabric.plugins import TorchCheckpointIO

from lit_tricks.commands.ablation.cells import Cell, run_here
from lit_tricks.commands.ablation.exclusive import alone_in
from lit_tricks.commands.racing.budget import Budget
from lit_tricks.commands.racing.runs import Runs
from lit_tricks.run.checkpoint_io import WholeCheckpointIO, use_whole_checkpoints
from lit_tricks.utils.checkpoint_files import read_checkpoint, write_checkpoint
from lit_tricks.utils.parent_process import held_pipe

resource = pytest.importorskip("resource")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and processes as Linux has them")
GOOD: dict[str, Any] = {"pytorch-lightning_version": "2.6.0", "state_dict": {"w": torch.ones(4)}}
LARGE: dict[str, Any] = GOOD | {"state_dict": {"w": torch.zeros(2**19)}}  # 2 MB


@contextlib.contextmanager
def small_disk(size: int = 2**20) -> Iterator[None]:
    """Limit the size of files of this process. Writing more fails in the same way as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@linux
@pytest.mark.parametrize("write", ["our own", "Lightning's"])
def test_a_full_disk_leaves_the_last_good_checkpoint(write: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(GOOD, path)
    with small_disk(), pytest.raises(OSError, match=r"last\.ckpt"):
        write_checkpoint(LARGE, path) if write == "our own" else WholeCheckpointIO().save_checkpoint(LARGE, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], torch.ones(4))
    assert list(tmp_path.iterdir()) == [path]


@linux
def test_the_first_write_on_a_small_disk_leaves_nothing_half(tmp_path: Path) -> None:
    with small_disk(), pytest.raises(OSError, match=r"best\.ckpt"):
        WholeCheckpointIO().save_checkpoint(LARGE, tmp_path / "best.ckpt")
    assert not list(tmp_path.iterdir())


def test_the_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkstemp", lambda *args, **kwargs: pytest.fail("another file system"))
    WholeCheckpointIO().save_checkpoint(GOOD, tmp_path / "new" / "last.ckpt")
    assert read_checkpoint(tmp_path / "new" / "last.ckpt")["state_dict"]


def save_for_ever(path: Path) -> None:
    io = WholeCheckpointIO()
    number = 0
    while True:
        number += 1
        io.save_checkpoint(GOOD | {"epoch": number, "state_dict": {"w": torch.full((2**17,), number)}}, path)


@pytest.mark.slow
@linux
def test_killed_at_any_moment_the_checkpoint_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint(GOOD, path)
    for attempt in range(6):
        child = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        child.start()
        time.sleep(0.05 + 0.013 * attempt)
        child.kill()
        child.join()
        content = read_checkpoint(path)
        assert len(set(content["state_dict"]["w"].tolist())) == 1
    assert len(list(tmp_path.iterdir())) <= 2  # what the last one left; it goes with the next checkpoint
    WholeCheckpointIO().save_checkpoint(GOOD, path)
    assert list(tmp_path.iterdir()) == [path]


def test_buckets_and_other_plugins_are_left_to_lightning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    saved: list[Any] = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", lambda self, *args: saved.append(args[1]))
    WholeCheckpointIO().save_checkpoint(GOOD, "memory://bucket/last.ckpt")
    assert saved == ["memory://bucket/last.ckpt"]

    class Own(TorchCheckpointIO):
        pass

    for plugin, kind in ((Own(), Own), (None, WholeCheckpointIO)):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=plugin)
        use_whole_checkpoints(trainer)
        assert type(trainer.strategy.checkpoint_io) is kind


@pytest.mark.slow
def test_a_fit_of_the_command_line_writes_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    save = WholeCheckpointIO.save_checkpoint

    def note(self: Any, content: Any, path: Any, **options: Any) -> None:
        written.append(Path(path).name)
        save(self, content, path, **options)

    monkeypatch.setattr(WholeCheckpointIO, "save_checkpoint", note)
    with workplace(tmp_path):
        done(*FIT)
    assert set(written) == {"best.ckpt", "last.ckpt"}


# ---------------------------------------------------------------------------------------------------------------------
# Ablations

GRID = ("ablate", "--config", "tiny.yaml", "--stack", "tricks/ema", "--seeds", "0")


def cell_of(folder: Path) -> Cell:
    return Cell("baseline", 0, folder / "runs" / "baseline-seed0", [])


def write_version(cell: Cell, number: int, results: str | None = None, last: bytes | None = None) -> Path:
    run = cell.folder / f"v{number}"
    (run / "checkpoints").mkdir(parents=True)
    if results is not None:
        (run / "results.json").write_text(results)
    if last is not None:
        (run / "checkpoints" / "last.ckpt").write_bytes(last)
    return run


BROKEN = ["", "{", '{"raw": {"te', "[]", "3", "null", "\x00"]


@pytest.mark.parametrize("results", BROKEN)
def test_results_that_are_not_whole_finish_no_cell(results: str, tmp_path: Path) -> None:
    cell = cell_of(tmp_path)
    write_version(cell, 0, results)
    assert cell.finished is None
    good = write_version(cell, 1, "{}")
    write_version(cell, 2, results)
    assert cell.finished == good


@pytest.fixture(scope="module")
def resumable(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a run."""
    folder = tmp_path_factory.mktemp("resumable")
    with workplace(folder):
        done(*FIT, "--name", "run")
    return (folder / "runs/run/v0/checkpoints/last.ckpt").read_bytes()


@pytest.mark.parametrize("damage", ["empty", "cut", "a flipped bit", "text", "weights alone"])
def test_a_damaged_checkpoint_falls_back_to_an_older_one_or_to_none(
    damage: str, resumable: bytes, tmp_path: Path
) -> None:
    flipped = bytearray(resumable)
    flipped[len(flipped) // 2] ^= 1
    torch.save(GOOD, tmp_path / "weights.ckpt")
    bad = {
        "empty": b"", "cut": resumable[:5000], "a flipped bit": bytes(flipped), "text": b"epoch: 3",
        "weights alone": (tmp_path / "weights.ckpt").read_bytes(),
    }[damage]  # fmt: skip
    cell = cell_of(tmp_path)
    write_version(cell, 0, last=bad)
    assert cell.checkpoint is None
    assert not any("ckpt_path" in word for word in cell.words)
    good = write_version(cell, 1, last=resumable)
    write_version(cell, 2, last=bad)
    assert cell.checkpoint == good / "checkpoints" / "last.ckpt"


@pytest.fixture
def ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which an ablation has ended."""
    with workplace(tmp_path):
        cells_in_this_process(monkeypatch)
        done(*GRID)
        yield tmp_path / "ablation"


@pytest.mark.slow
def test_an_ablation_goes_on_from_damaged_files(ablation: Path) -> None:
    table = (ablation / "ablation.csv").read_text()
    (ablation / "runs/baseline-seed0/v0/results.json").write_text("")
    (ablation / "runs/baseline-seed0/v0/checkpoints/last.ckpt").write_bytes(b"")
    (ablation / "plan.json").write_text('{"config": ["ti')
    done(*GRID)
    assert json.loads((ablation / "plan.json").read_text())["config"] == ["tiny.yaml"]
    assert (ablation / "runs/baseline-seed0/v1/results.json").is_file()
    again = (ablation / "ablation.csv").read_text()
    columns = slice(2, 4)  # the scores: a new start with the same seed gives the same
    assert [row.split(",")[columns] for row in again.splitlines()] == [
        row.split(",")[columns] for row in table.splitlines()
    ]


@pytest.mark.slow
def test_a_damaged_plan_does_not_mix_two_ablations(ablation: Path) -> None:
    (ablation / "plan.json").write_text("")
    outcome = cli("ablate", "--config", "tiny.yaml", "--stack", "tricks/mixup", "--seeds", "0")
    assert outcome.code == 1
    assert "with-ema.yaml" in outcome.err


def test_a_second_ablation_in_a_folder_is_one_clear_line(tmp_path: Path) -> None:
    with workplace(tmp_path):
        Path("ablation").mkdir()
        with FileLock("ablation/.lock"):
            outcome = cli(*GRID)
        assert outcome.code == 1
        assert "--out" in outcome.err
        assert outcome.err.count("\n") == 1
        assert not Path("ablation/runs").exists()


def test_a_second_race_in_a_folder_is_one_clear_line(tmp_path: Path) -> None:
    with workplace(tmp_path):
        Path("race").mkdir()
        with FileLock("race/.lock"):
            outcome = cli("race", "--config", "tiny.yaml", "--candidates", "tricks/ema", "--budget", "9")
        assert outcome.code == 1
        assert "--out" in outcome.err
        assert outcome.err.count("\n") == 1
        assert [path.name for path in Path("race").iterdir()] == [".lock"]


def test_an_ablation_in_the_folder_of_a_race_is_kept_out(tmp_path: Path) -> None:
    with workplace(tmp_path):
        Path("both").mkdir()
        with FileLock("both/.lock"):
            assert "--out" in cli(*GRID, "--out", "both").err


def test_a_folder_is_free_again_after_its_race(tmp_path: Path) -> None:
    with alone_in(tmp_path, "race"), pytest.raises(RuntimeError, match="race"), alone_in(tmp_path, "race"):
        pass
    with alone_in(tmp_path, "ablate"):
        pass


TIMES = '{"elapsed": -3, "runs": {"base-seed0": "x", "base-seed1": NaN, "base-seed2": -1, "y": 2}}'


@pytest.mark.parametrize("content", ["", "[]", '{"runs": 3}', TIMES])
def test_a_damaged_clock_of_a_race_is_read_as_far_as_it_goes(content: str, tmp_path: Path) -> None:
    (tmp_path / "clock.json").write_text(content)
    runs = Runs(tmp_path, [], [], 1, {}, lambda cells: iter(()), Budget.parse("9"))  # type: ignore[arg-type, return-value]
    assert (runs.took, runs.elapsed) == (({"y": 2.0}, 2.0) if content == TIMES else ({}, 0.0))


def ablate_sleepers(folder: Path) -> None:
    list(run_here(sleepers(folder, 60, (0, 2)), jobs=2, environment={}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_the_runs_end_with_a_killed_ablation(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=ablate_sleepers, args=(tmp_path,))
    child.start()
    wait_for(lambda: len(alive(tmp_path)) == 2)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    wait_for(lambda: not alive(tmp_path), seconds=10)


ENDS_WITH_PARENT = (
    "from lit_tricks.cli.entry import main; import time; time.sleep(0.3); main(['--version']); time.sleep(60)"
)


def test_a_run_ends_though_its_parent_ended_before_it_began_to_watch() -> None:
    with held_pipe() as (pipe, variable):
        run = subprocess.Popen([sys.executable, "-c", ENDS_WITH_PARENT], stdin=pipe, env=os.environ | variable)
    assert run.wait(20) in (-signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("stdin", ["another pipe", "null"])
def test_a_process_that_inherits_the_variable_only_goes_on(stdin: str) -> None:
    script = (
        "from lit_tricks.utils.parent_process import end_with_parent; end_with_parent(); import time; time.sleep(.2)"
    )
    kind: Any = {"input": b""} if stdin == "another pipe" else {"stdin": subprocess.DEVNULL}
    with held_pipe() as (_, variable):
        subprocess.run([sys.executable, "-c", script], env=os.environ | variable, check=True, timeout=20, **kind)


# ---------------------------------------------------------------------------------------------------------------------
# A fit whose disk is full at its end


@linux
def test_results_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    from lit_tricks.utils.files import write_whole

    with small_disk(10), pytest.raises(OSError, match=r"results\.json"):
        write_whole(tmp_path / "results.json", "x" * 100)
    assert not list(tmp_path.iterdir())
