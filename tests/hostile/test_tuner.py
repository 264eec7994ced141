"""Lightning's tuners with our modules and data, in Python and next to tricks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import make_trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lit_tricks import Classifier, Detector, Segmenter
from lit_tricks.callbacks import EMA, MixUp, NoBiasDecay
from lit_tricks.data import DigitDetection, Digits, DigitSegmentation

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = {"depth": 18, "width": 0.0625, "small_input": True}
KINDS = ["Classifier", "Segmenter", "Detector"]
SOME = ["Classifier", "Segmenter", pytest.param("Detector", marks=pytest.mark.full)]  # the slowest one


def pair(kind: str, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    if kind == "Classifier":
        return Classifier("resnet", 10, TINY, input_size=(1, 8, 8), **kwargs), Digits(num_workers=0)
    if kind == "Segmenter":
        return Segmenter("resnet", 11, TINY, input_size=(1, 64, 64), **kwargs), DigitSegmentation(num_workers=0)
    small: dict[str, Any] = {"backbone_args": TINY, "channels": 8, "head_width": 8, "min_size": 32, "max_size": 32}
    return Detector(num_classes=10, input_size=(1, 32, 32), **small, **kwargs), DigitDetection(num_workers=0, size=32)


def state_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(module: Any, before: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(state_of(module), before, rtol=0, atol=0)


def tricks(kind: str) -> list[Any]:
    return [EMA(0.5), NoBiasDecay(), *([MixUp()] if kind == "Classifier" else [])]


def quick(folder: Path, *callbacks: Any, batches: int = 2) -> Any:
    how = {"limit_train_batches": batches, "limit_val_batches": 1, "max_epochs": 1, "logger": False}
    return make_trainer(*callbacks, default_root_dir=folder, **how)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME)
def test_scale_batch_size(kind: str, tmp_path: Path) -> None:
    module, data = pair(kind)
    before, trainer = state_of(module), quick(tmp_path, *tricks(kind))
    found = Tuner(trainer).scale_batch_size(module, datamodule=data, steps_per_trial=1, max_trials=2, init_val=4)
    assert found == data.batch_size == data.hparams["batch_size"] == 8
    assert_untouched(module, before)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME)
def test_lr_find_leaves_module_as_it_was(kind: str, tmp_path: Path) -> None:
    module, data = pair(kind)
    data.batch_size = 2
    before, trainer = state_of(module), quick(tmp_path, *tricks(kind), batches=22)
    find = {"num_training": 20, "early_stop_threshold": None, "min_lr": 1e-4, "max_lr": 0.1}
    finder = Tuner(trainer).lr_find(module, datamodule=data, **find)
    assert finder is not None
    assert finder.results["lr"][0] < 2e-4  # its own learning rates, not the module's
    assert module.lr == finder.suggestion()
    assert_untouched(module, before)
    trainer.fit(module, datamodule=data)
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {module.lr}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOME)
def test_batch_size_finder_in_a_fit(kind: str, tmp_path: Path) -> None:
    module, data = pair(kind)
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=4)
    trainer = quick(tmp_path, finder, *tricks(kind))
    trainer.fit(module, datamodule=data)
    assert finder.optimal_batch_size == data.batch_size == trainer.train_dataloader.batch_size == 8
    assert trainer.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_finder_in_a_fit(kind: str, tmp_path: Path) -> None:
    module, data = pair(kind)
    data.batch_size = 2
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None, min_lr=1e-4, max_lr=0.1)
    trainer = quick(tmp_path, finder, *tricks(kind), batches=22)
    trainer.fit(module, datamodule=data)
    assert 1e-4 < module.lr < 0.1
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {module.lr}


@pytest.mark.slow
def test_the_found_rate_is_the_one_that_decays_by_layers(tmp_path: Path) -> None:
    module, data = pair("Classifier", layer_decay=0.5)
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None, min_lr=1e-4, max_lr=0.1)
    trainer = quick(tmp_path, finder, batches=22)
    trainer.fit(module, datamodule=data)
    rates = {group["lr"] for group in trainer.optimizers[0].param_groups}
    assert max(rates) == module.lr
    assert len(rates) > 3


@pytest.mark.slow
def test_a_batch_has_all_images_at_most(tmp_path: Path) -> None:
    module, data = pair("Classifier")
    find = {"steps_per_trial": 1, "init_val": 1000}
    assert Tuner(quick(tmp_path)).scale_batch_size(module, datamodule=data, **find) == data.batch_size == 1257
    assert data.hparams["batch_size"] == 1257
    with pytest.raises(ValueError, match="batch_size=2000"):
        Digits(batch_size=2000).setup("fit")
