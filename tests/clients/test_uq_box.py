"""lightning-uq-box: image classification in `lightning`; batches are dicts that hold a text, too."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from _clients import check, each_schedule, each_trick, network, own_schedule, without_trick
from helpers.fits import make_trainer

methods = pytest.importorskip("lightning_uq_box.uq_methods")
data = pytest.importorskip("lightning_uq_box.datamodules")

pytestmark = pytest.mark.clients


def fit(*callbacks: Any, scheduler: Any = None) -> None:
    module = methods.DeterministicClassification(
        network(classes=4),
        loss_fn=torch.nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.01),
        lr_scheduler=scheduler,
    )
    datamodule = data.ToyImageClassificationDatamodule(batch_size=4, num_samples=16, img_size=32)
    make_trainer(*callbacks, limit_val_batches=1).fit(module, datamodule=datamodule)


def fit_with_scheduler(*callbacks: Any) -> None:
    fit(*callbacks, scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1))


@each_trick
def test_deterministic_classification_takes_trick(name):
    check(name, fit, layout="dict", teacher=partial(network, 4))


@each_schedule
def test_argument_lr_scheduler_is_rejected(name):
    check(name, fit_with_scheduler, rejected=own_schedule("StepLR", "DeterministicClassification"))


def test_batches_are_dicts():
    assert without_trick(fit).batches == {dict}
