"""darts: forecasting in `pytorch_lightning`; batches are dataclasses with slots, most of them None."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from _clients import (
    NO_BATCHNORM,
    NO_BATCHNORM_TO_TRAIN,
    NO_CONVOLUTIONS,
    NO_IMAGES,
    NO_RESIDUAL_BRANCHES,
    check,
    each_schedule,
    each_trick,
    no_labels,
    own_schedule,
    without_trick,
)

darts = pytest.importorskip("darts")
models = pytest.importorskip("darts.models.forecasting.nbeats")

pytestmark = pytest.mark.clients


def fit(*callbacks: Any, **scheduler: Any) -> None:
    model = models.NBEATSModel(
        input_chunk_length=4,
        output_chunk_length=2,
        num_stacks=1,
        num_blocks=1,
        layer_widths=8,
        batch_size=4,
        n_epochs=3,
        optimizer_kwargs={"lr": 0.01, "weight_decay": 0.01},
        pl_trainer_kwargs={"callbacks": list(callbacks), "accelerator": "cpu"},
        **scheduler,
    )
    model.fit(darts.TimeSeries.from_values(np.sin(np.arange(21.0, dtype=np.float32))), verbose=False)


def fit_with_scheduler(*callbacks: Any) -> None:
    fit(*callbacks, lr_scheduler_cls=torch.optim.lr_scheduler.ExponentialLR, lr_scheduler_kwargs={"gamma": 0.9})


@each_trick
def test_nbeats_takes_or_rejects_trick(name):
    check(
        name,
        fit,
        rejected=no_labels("no target in the training batch: TorchTrainingBatch(")
        | NO_RESIDUAL_BRANCHES
        | NO_CONVOLUTIONS
        | NO_BATCHNORM_TO_TRAIN
        | NO_IMAGES,
        idle=NO_BATCHNORM | {"TemperatureScaling": "^UserWarning: TemperatureScaling leaves the weights as they are"},
    )


@each_schedule
def test_argument_lr_scheduler_cls_is_rejected(name):
    check(name, fit_with_scheduler, rejected=own_schedule("ExponentialLR", "_NBEATSModule"))


def test_batches_are_dataclasses_with_slots():
    [batch] = without_trick(fit).batches
    assert dataclasses.is_dataclass(batch)
    assert batch.__slots__
