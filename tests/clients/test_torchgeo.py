"""torchgeo: image classification in `lightning`; batches are dicts, which its datamodule augments on the device."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
from _clients import check, each_schedule, each_trick, network, own_schedule, without_trick
from helpers.fits import make_trainer

pytest.importorskip("torchgeo")
if importlib.util.find_spec("torchgeo.tasks"):
    Classification = pytest.importorskip("torchgeo.tasks").Classification
    Segmentation = pytest.importorskip("torchgeo.tasks").SemanticSegmentation
else:  # its older name, in the last torchgeo for Python 3.11
    Classification = pytest.importorskip("torchgeo.trainers").ClassificationTask
    Segmentation = pytest.importorskip("torchgeo.trainers").SemanticSegmentationTask
Unet = pytest.importorskip("segmentation_models_pytorch").Unet
datasets = pytest.importorskip("torchgeo.datasets")
datamodules = pytest.importorskip("torchgeo.datamodules")

pytestmark = pytest.mark.clients


class Noise(datasets.NonGeoDataset):
    def __init__(self, split: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = 255 * torch.rand(16, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % 3)}


class Masks(Noise):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index], "mask": (self.images[index, 0] // 64).long()}


class WithoutScheduler(Classification):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


def fit(*callbacks: Any, task_class: Any = Classification) -> None:
    task = task_class(model="test_resnet", weights=None, num_classes=3)
    task.model = network(classes=3)  # the same, but for weights that timm starts at 0
    datamodule = datamodules.NonGeoDataModule(Noise, batch_size=4)
    make_trainer(*callbacks, limit_val_batches=1).fit(task, datamodule=datamodule)


def fit_without_scheduler(*callbacks: Any) -> None:
    fit(*callbacks, task_class=WithoutScheduler)


@each_trick
def test_classification_takes_or_rejects_trick(name):
    check(
        name,
        fit,
        layout="dict",
        teacher=partial(network, 3),
        rejected=own_schedule("ReduceLROnPlateau", Classification.__name__),
    )


def unet() -> torch.nn.Module:
    """Return the task's network without the deeper half of its encoder, which has most of the weights."""
    return Unet("resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(32, 16, 8), classes=4)


def fit_masks(*callbacks: Any) -> None:
    task = Segmentation(model="unet", backbone="resnet18", weights=None, num_classes=4, ignore_index=0)
    task.model = unet()
    datamodule = datamodules.NonGeoDataModule(Masks, batch_size=4)
    make_trainer(*callbacks, limit_val_batches=1).fit(task, datamodule=datamodule)


@each_trick
def test_segmentation_takes_or_rejects_trick(name):
    check(
        name,
        fit_masks,
        layout="dict",
        teacher=unet,
        rejected=own_schedule("ReduceLROnPlateau", Segmentation.__name__),
    )


@each_schedule
def test_subclass_without_scheduler(name):
    check(name, fit_without_scheduler, layout="dict")


def test_batches_are_dicts():
    assert without_trick(fit).batches == {dict}
