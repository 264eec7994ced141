"""neuralforecast: forecasting in `pytorch_lightning`; it trains a deep copy of the model, and so of the callbacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _clients import (
    NO_BATCHNORM,
    NO_BATCHNORM_TO_TRAIN,
    NO_CONVOLUTIONS,
    NO_FORWARD,
    NO_IMAGES,
    NO_RESIDUAL_BRANCHES,
    check,
    each_schedule,
    each_trick,
    no_labels,
    own_schedule,
    spy_on,
)
from helpers.tricks import TRICKS

neuralforecast = pytest.importorskip("neuralforecast")
models = pytest.importorskip("neuralforecast.models")
pandas = pytest.importorskip("pandas")

pytestmark = pytest.mark.clients


class WithoutScheduler(models.MLP):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


def fit(*callbacks: Any, model_class: Any = models.MLP) -> None:
    model = model_class(
        h=2,
        input_size=4,
        hidden_size=8,
        max_steps=12,
        batch_size=4,
        learning_rate=0.01,
        optimizer=torch.optim.AdamW,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    days = pandas.date_range("2024-01-01", periods=16)
    series = [pandas.DataFrame({"unique_id": i, "ds": days, "y": np.sin(i + np.arange(16.0))}) for i in range(16)]
    neuralforecast.NeuralForecast([model], freq="D").fit(pandas.concat(series))


def fit_without_scheduler(*callbacks: Any) -> None:
    fit(*callbacks, model_class=WithoutScheduler)


@each_trick
def test_mlp_takes_or_rejects_trick(name):
    no_class_labels = no_labels("no target in the training batch: dict(")
    rejected = own_schedule("StepLR", "MLP") | no_class_labels | NO_RESIDUAL_BRANCHES | NO_CONVOLUTIONS
    rejected |= NO_BATCHNORM_TO_TRAIN | NO_IMAGES
    rejected |= {"TemperatureScaling": "^TemperatureScaling found no target in the training batch: "}
    check(name, fit, rejected=rejected, idle=NO_BATCHNORM | NO_FORWARD)


@each_schedule
def test_subclass_without_scheduler(name):
    check(name, fit_without_scheduler)


def test_copy_of_the_trick_trains():
    trick = TRICKS["WarmupCosine"].make()
    trainer = spy_on(fit_without_scheduler, trick).trainer
    [copy] = [callback for callback in trainer.callbacks if type(callback) is type(trick)]
    assert copy is not trick
