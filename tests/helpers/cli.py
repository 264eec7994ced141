"""Runs of the command line inside this process, on a net so small that one takes a second: importing takes longer."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from lit_tricks import Classifier
from lit_tricks.cli import TricksCLI, main

CURVES = "lit_tricks.run.report.fit.draw_curves"
LOGGERS = ("lit_tricks", "lightning.pytorch", "lightning.fabric", "pytorch_lightning")

# Two training batches of 64 digits, one of each other split. Lightning's advice on settings would be warnings, which
# are errors here; it says nothing on these.
TINY = """
trainer:
  max_epochs: 1
  accelerator: cpu
  limit_train_batches: 2
  limit_val_batches: 1
  limit_test_batches: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: Classifier
  init_args:
    model_args: {depth: 18, width: 0.03125, small_input: true}
data:
  class_path: Digits
"""
FIT = ("fit", "--config", "tiny.yaml")
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
COSINE = ("--trainer.callbacks+=WarmupCosine", "--trainer.callbacks.warmup_epochs=1")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: exit code, printed text, and log lines of Lightning and the library."""

    code: Any
    out: str
    err: str
    log: str


def cli(*words: str) -> Outcome:
    """Run ``lit-tricks`` with these words."""
    out, err, log = io.StringIO(), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(words))
    except SystemExit as stop:
        code = stop.code
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
    return Outcome(code, out.getvalue(), err.getvalue(), log.getvalue())


def done(*words: str) -> Outcome:
    """Run a command that must work, and say nothing on stderr."""
    outcome = cli(*words)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return outcome


class _Process:
    """Stands in for a process of an ablation or a race."""

    def __init__(self, command: list[str], stdout: Any, env: dict[str, str], **kwargs: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "lit_tricks"]
        with mock.patch.dict(os.environ, env):
            outcome = cli(*command[3:])
        self.returncode = outcome.code
        stdout.write(f"{outcome.out}{outcome.log}{outcome.err}".encode())

    def wait(self) -> int:
        """Return the exit code: the process has ended."""
        return int(self.returncode)


class _Pool(ThreadPoolExecutor):
    """Runs what is submitted at once, in this thread: a run changes what threads share, such as ``sys.stderr``."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def cells_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Make the runs of ablations and races in this process, one after another: importing takes longer than a run."""
    patch.setattr("lit_tricks.commands.ablation.cells.subprocess", SimpleNamespace(Popen=_Process))
    patch.setattr("lit_tricks.commands.ablation.cells.ThreadPoolExecutor", _Pool)


def built(monkeypatch: pytest.MonkeyPatch, *words: str) -> TricksCLI:
    """Return a command with all of its objects, before it runs."""
    made: list[TricksCLI] = []
    with monkeypatch.context() as patch:
        patch.setattr(TricksCLI, "_run_subcommand", lambda self, subcommand: made.append(self))
        done(*words)
    return made[0]


@contextlib.contextmanager
def workplace(folder: Path, curves: bool = False) -> Iterator[Path]:
    """Work in this folder, with ``tiny.yaml`` in it and without traces in the environment afterwards.

    Without curves, because drawing them takes as long as all the rest of a run.
    """
    before, environment = Path.cwd(), dict(os.environ)
    (folder / "tiny.yaml").write_text(TINY)
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning calls what jsonargparse has deprecated since
    os.chdir(folder)
    try:
        with (
            contextlib.nullcontext()
            if curves
            else mock.patch("lit_tricks.run.report.fit.draw_curves", return_value=None)
        ):
            yield folder
    finally:
        os.chdir(before)
        for name in os.environ.keys() - environment.keys():  # Lightning leaves the seed here
            del os.environ[name]
        os.environ.update(environment)


def checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint, read safely."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def metrics(run: str | Path) -> list[dict[str, float]]:
    """Rows of a run's ``metrics.csv`` without their empty cells."""
    with Path(run, "metrics.csv").open(newline="") as stream:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(stream)]


def results(run: str | Path) -> dict[str, Any]:
    """Content of a run's ``results.json``."""
    content: dict[str, Any] = json.loads(Path(run, "results.json").read_text())
    return content


def logits_of(path: str | Path, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of a checkpoint's model, without a Trainer."""
    model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(images)
    return logits


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """Noise as JPEG files, 0.jpg, 1.jpg, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def write_image_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee", "cow")) -> Path:
    """A folder for ``ImageFolder``: four training and two validation images a class."""
    for label, name in enumerate(classes):
        write_images(root / "train" / name, 4, seed=label)
        write_images(root / "val" / name, 2, seed=100 + label)
    return root
