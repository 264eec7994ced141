"""lightly: linear evaluation in `pytorch_lightning`; batches are lists of images, labels and filenames."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from _clients import (
    NO_RESIDUAL_BRANCHES,
    NO_WEIGHT_DECAY,
    NOTHING_TO_FREEZE,
    check,
    each_schedule,
    each_trick,
    network,
    own_schedule,
    without_trick,
)
from helpers.fits import make_trainer
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

benchmarking = pytest.importorskip("lightly.utils.benchmarking")
data = pytest.importorskip("lightly.data")

pytestmark = pytest.mark.clients


class WithoutScheduler(benchmarking.LinearClassifier):
    def configure_optimizers(self) -> Any:
        optimizers, _ = super().configure_optimizers()
        return optimizers


def fit(*callbacks: Any, module_class: Any = benchmarking.LinearClassifier) -> None:
    features = network(classes=0)
    module = module_class(
        features, batch_size_per_device=4, lr=6.4, feature_dim=features.num_features, num_classes=3, topk=(1,)
    )
    images = FakeData(16, image_size=(3, 32, 32), num_classes=3, transform=ToTensor())
    loader = DataLoader(data.LightlyDataset.from_torch_dataset(images), batch_size=4)
    make_trainer(*callbacks, namespace="pytorch_lightning", limit_val_batches=1).fit(module, loader, loader)


def fit_without_scheduler(*callbacks: Any) -> None:
    fit(*callbacks, module_class=WithoutScheduler)


@each_trick
def test_linear_classifier_takes_or_rejects_trick(name):
    only_the_head_is_trained = NO_RESIDUAL_BRANCHES | NO_WEIGHT_DECAY | NOTHING_TO_FREEZE
    only_the_head_is_trained |= {"DropPath": "^DropPath has no effect: .+ none of its layers ran in training mode"}
    only_the_head_is_trained |= {"Muon": "^Muon has no effect: "}
    own = own_schedule("CosineWarmupScheduler", "LinearClassifier")
    frozen = {"PreciseBN": "^UserWarning: PreciseBN has no effect: all BatchNorm layers of .+ are frozen"}
    check(name, fit, layout="list", rejected=own | only_the_head_is_trained, idle=frozen, teacher=partial(network, 3))


@each_schedule
def test_subclass_without_scheduler(name):
    check(name, fit_without_scheduler, layout="list")


def test_batches_are_lists():
    assert without_trick(fit).batches == {list}
