"""lit-tricks data bench: what it measures, and what it logs of it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import FIT, cli, done, workplace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_tricks.commands import progress as _progress
from lit_tricks.commands.data import bench

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
    "ignore:The number of training batches",
    "ignore:.*does not have many workers",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


class Slow(Dataset[tuple[Tensor, int]]):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        return torch.full((3, 4, 4), float(index)), index % 2


class Data(LightningDataModule):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Slow(self.seconds), batch_size=2)


class Model(LightningModule):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.layer = torch.nn.Linear(48, 2)
        self.seen: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        self.seen.append(float(batch[0][0, 0, 0, 0]))
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer() -> Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, max_epochs=1, **off)


@pytest.mark.parametrize(("loading", "training", "limit"), [(0.08, 0.005, "data"), (0.001, 0.08, "model")])
def test_speeds_and_what_limits_them(loading: float, training: float, limit: str) -> None:
    data, model = Data(loading), Model(training)
    before = data.train_dataloader
    path = bench(data, model, trainer(), out="x.json", seconds=0.5)
    result = json.loads(path.read_text())
    assert (result["batch_size"], result["num_workers"], result["device"], result["limit"]) == (2, 0, "cpu", limit)
    # they sleep at least as long as they are told; the machine may be busy
    assert 0.01 / loading < result["loader"] < 1.02 / loading
    assert 0.01 * 2 / training < result["model"] < 1.02 * 2 / training
    both = 2 / (2 * loading + training)
    assert 0.01 * both < result["together"] < 1.02 * both
    assert result["loader_per_core"] > result["loader"]  # it sleeps most of the time
    assert set(model.seen[: int(result["model"] * 0.5 / 2)]) == {0.0}
    assert len(set(model.seen)) > 3
    assert data.train_dataloader == before


def test_the_loader_alone() -> None:
    result = json.loads(bench(Data(0.001), seconds=0.05).read_text())
    assert result.keys() == {"batch_size", "num_workers", "cores", "loader", "loader_per_core"}


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_from_the_command_line(workers: int) -> None:
    words = ("--config=tricks/ema", "--config=tricks/mixup", f"--data.num_workers={workers}", "--seconds=0.3")
    outcome = done("data", "bench", *FIT[1:], *words, "--out=digits.json")
    for text in ("only loader: ", "only model: ", "both together: ", "limits the run", "written to digits.json"):
        assert text in outcome.log
    result = json.loads(Path("digits.json").read_text())
    assert result["num_workers"] == workers
    assert min(result["loader"], result["loader_per_core"], result["model"], result["together"]) > 0
    assert sorted(path.name for path in Path().iterdir()) == ["digits.json", "tiny.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seconds=0",), "--seconds=0.0 is not above 0; 10 to 60 do."),
        (("--out=nowhere/x.json",), "--out nowhere/x.json lies in a folder that does not exist: make it first."),
        (("--seconds=long",), "--seconds: 'long' is not float."),
    ],
)
def test_bench_wrong_arguments_explain_themselves(words: tuple[str, ...], message: str) -> None:
    outcome = cli("data", "bench", *FIT[1:], *words)
    assert outcome.err == f"lit-tricks: error: {message}\n"


def test_a_progress_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    bench(Data(0.001), seconds=0.05)
    assert capfd.readouterr().err == ""
    screen = io.StringIO()
    monkeypatch.setattr(_progress, "Console", lambda **_: Console(file=screen, force_terminal=True))
    bench(Data(0.001), seconds=0.05)
    assert "data bench" in screen.getvalue()
    assert "100%" in screen.getvalue()


def test_loader_without_batches_is_an_error() -> None:
    data = Data(0)
    data.train_dataloader = lambda: DataLoader(Slow(0), batch_size=20, drop_last=True)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="has no batch"):
        bench(data)
