"""Processes that start as a new interpreter, the way of macOS and Windows: all they are given is pickled."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import write_image_folder
from helpers.fits import differences, run
from helpers.tricks import TRICKS

from lit_tricks.data import ImageFolder

pytestmark = [pytest.mark.slow, pytest.mark.smoke]  # each process imports torch


@pytest.fixture
def spawn() -> Iterator[None]:
    """Start workers of loaders as new interpreters."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def batches_of(folder: Path, workers: int) -> list[Any]:
    data = ImageFolder(str(folder), 16, 4, workers)
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_spawned_workers_load_the_same_batches(tmp_path: Path, spawn: None) -> None:
    folder = write_image_folder(tmp_path / "images")
    torch.manual_seed(0)
    here = batches_of(folder, 0)
    torch.manual_seed(0)
    assert not differences(batches_of(folder, 1), here)


def fit_all(pickled: bytes, path: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.save({name: run(trick).weights for name, trick in pickle.loads(pickled).items()}, path)


@pytest.mark.full  # on Linux; the jobs of macOS and Windows run it as a smoke test
@pytest.mark.filterwarnings("ignore:SWA averages the statistics", "ignore:FixRes fine-tunes a trained network")
@pytest.mark.filterwarnings(
    "ignore:The statistics of the BatchNorm layers in .* do not fit", "ignore:FixRes fine-tunes a trained network"
)
@pytest.mark.filterwarnings("ignore:TestTimeAugment has no effect")
def test_tricks_in_a_spawned_process_train_the_same_weights(tmp_path: Path) -> None:
    tricks = pickle.dumps({name: row.make() for name, row in TRICKS.items()})
    path = tmp_path / "weights.pt"
    child = multiprocessing.get_context("spawn").Process(target=fit_all, args=(tricks, path))
    child.start()
    child.join()
    assert child.exitcode == 0
    there = torch.load(path, weights_only=True)
    for name, row in TRICKS.items():
        assert not differences(there[name], run(row.make()).weights), name
