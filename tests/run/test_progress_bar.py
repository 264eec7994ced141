"""The progress bar takes one line of a terminal with 80 columns, with any number of metrics."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich
from helpers.cli import FIT, built, workplace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lit_tricks import EMA, Classifier, MixUp, PreciseBN
from lit_tricks.data import Digits
from lit_tricks.run.progress_bar import OneLineBar

UP = "\x1b[1A"  # to the line above: written where more than one line is replaced


@pytest.fixture(autouse=True)
def console() -> Iterator[None]:
    """Give later tests a console that writes to the standard output of their time."""
    yield
    rich.reconfigure()


class Talkative(Classifier):
    """Shows more in the bar than there is room for."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"train/a_long_name_{i}": 1.0 for i in range(9)}, prog_bar=True, batch_size=1)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    digits = Digits(batch_size=64)
    return {"train_dataloaders": digits.train_dataloader(), "val_dataloaders": digits.val_dataloader()}


def frames(module: LightningModule, data: dict[str, Any], width: int = 80, **kwargs: Any) -> list[str]:
    """Text of each state of the bar, from a terminal of this width."""
    terminal = io.StringIO()
    bar = OneLineBar({"file": terminal, "force_terminal": True, "width": width, "legacy_windows": False})
    tricks = [EMA(decay=0.5, validate="both"), MixUp(alpha=0.2), PreciseBN(num_samples=128)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[*tricks, bar], max_epochs=2, limit_train_batches=4, **quiet, **kwargs)
    trainer.fit(module, **data)
    text = terminal.getvalue()
    assert UP not in text, "the bar has several lines"
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text)
    return [frame for frame in re.split(r"[\r\n]+", plain) if frame.strip()]


def test_one_line_with_tricks_that_log(data: dict[str, Any]) -> None:
    args = {"depth": 18, "width": 0.03125, "small_input": True}
    shown = frames(Classifier("resnet", 10, args, input_size=(1, 8, 8)), data)
    assert max(map(len, shown)) <= 80
    last = [frame for frame in shown if frame.startswith("Epoch 1/1")][-1]
    assert re.search(r"4/4 \d+:\d\d loss [\d.]+, val loss [\d.]+, top1 [\d.]+%", last), last


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80])
def test_a_text_that_is_too_long_is_cut(data: dict[str, Any], width: int) -> None:
    args = {"depth": 18, "width": 0.03125, "small_input": True}
    shown = frames(Talkative("resnet", 10, args, input_size=(1, 8, 8)), data, width)
    assert max(map(len, shown)) <= width
    assert any("…" in frame for frame in shown)


def test_data_without_a_length_has_no_total(data: dict[str, Any]) -> None:
    loader: DataLoader[Any] = data["train_dataloaders"]
    endless = {**data, "train_dataloaders": _Endless(loader)}
    args = {"depth": 18, "width": 0.03125, "small_input": True}
    kwargs = {"max_steps": 4}
    module = Classifier("resnet", 10, args, input_size=(1, 8, 8))
    terminal = io.StringIO()
    bar = OneLineBar({"file": terminal, "force_terminal": True, "width": 80, "legacy_windows": False})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(callbacks=[bar], max_epochs=1, num_sanity_val_steps=0, **quiet, **kwargs).fit(module, **endless)
    assert re.search(r"\d/\? ", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue()))


class _Endless:
    """Batches without ``__len__``."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return iter(self.loader)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("--trainer.enable_progress_bar=true",), OneLineBar),
        (("--trainer.enable_progress_bar=null",), OneLineBar),
        (("--trainer.enable_progress_bar=true", "--trainer.callbacks+=TQDMProgressBar"), TQDMProgressBar),
        (("--trainer.enable_progress_bar=true", "--trainer.callbacks+=RichProgressBar"), RichProgressBar),
        (("--trainer.enable_progress_bar=false",), type(None)),
    ],
)
def test_a_run_has_one_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], kind: type) -> None:
    with workplace(tmp_path):
        assert type(built(monkeypatch, *FIT, *words).trainer.progress_bar_callback) is kind
