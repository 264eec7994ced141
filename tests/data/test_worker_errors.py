"""A loading process that is killed: one error that says what to do, soon, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import cli, workplace, write_image_folder
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_tricks import Classifier
from lit_tricks.data import ImageFolder
from lit_tricks.data.io.worker_errors import explain_death

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
    "ignore:You passed in a `val_dataloader` but have no",
    "ignore:This DataLoader will create:UserWarning",
    # torch tells of the death in a signal handler, which may run inside a finalizer: Python prints that and continues,
    # and the death is noticed again when the next batch is asked for
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning",
)

MESSAGE = r"a process that loads images \(pid \d+\) was killed.*num_workers.*batch_size"


def kill_one() -> None:
    workers = multiprocessing.active_children()
    assert workers[0].pid
    os.kill(workers[0].pid, signal.SIGKILL)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 4:
            kill_one()
            time.sleep(0.5)  # it may be noticed here, or when the next batch is asked for
        return torch.nn.functional.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("settings", [{"num_workers": 1}, {"num_workers": 2}, {"num_workers": 2, "workers": "thread"}])
def test_in_a_fit(tmp_path: Path, settings: Any) -> None:
    data = ImageFolder(str(write_image_folder(tmp_path)), 16, batch_size=2, **settings)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=50,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=MESSAGE):
        trainer.fit(Model(), data)
    assert time.monotonic() - start < 30
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_without_a_trainer(tmp_path: Path) -> None:
    data = ImageFolder(str(write_image_folder(tmp_path)), 16, batch_size=1, num_workers=2)
    for make_loader in (data.train_dataloader, data.val_dataloader):
        batches = iter(make_loader())
        next(batches)
        with pytest.raises(RuntimeError, match="pid"):  # noqa: PT012  # torch may say so at any time from then on
            kill_one()
            list(batches)
        del batches


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_image_folder(tmp_path / "data")
    monkeypatch.setattr(Classifier, "on_train_batch_end", lambda *_: kill_one())
    with workplace(tmp_path):
        words = ("--data=ImageFolder", f"--data.root={root}", "--data.image_size=16", "--data.batch_size=2")
        outcome = cli("fit", "--config=tiny.yaml", *words, "--data.num_workers=2", "--trainer.max_epochs=50")
    assert outcome.code == 1
    assert outcome.err.startswith("lit-tricks: error: a process that loads images (pid ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "explanation"),
    [
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", r".*\(pid 12\) was killed \(Killed\); .*memory"),
        ("DataLoader worker (pid(s) 1, 2) exited unexpectedly", r".*\(pid 1, 2\) was killed; .*memory"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", ".*/dev/shm, is full"),
    ],
)
def test_death_of_a_worker_is_explained(message: str, explanation: str) -> None:
    text = explain_death(RuntimeError(message))
    assert re.match(explanation, text or "")
    assert explain_death(RuntimeError("another")) is None
