"""What lit_tricks uses of other libraries' internals: a test fails where one of them renames or moves a name."""

from __future__ import annotations

import lightning.pytorch as lightning_pytorch
import pytest
import pytorch_lightning
from helpers.modules import NAMESPACES, lightning

from lit_tricks import _compat

PACKAGES = list(NAMESPACES)


# ---------------------------------------------------------------------------------------------------------------------
# Two packages of Lightning


def test_lightning_packages_are_both():
    assert _compat.lightning_packages() == [lightning_pytorch, pytorch_lightning]


@pytest.mark.parametrize(
    "path",
    [
        "Callback",
        "callbacks.BaseFinetuning",
        "callbacks.GradientAccumulationScheduler",
        "callbacks.StochasticWeightAveraging",
        "callbacks.WeightAveraging",
        "loggers.WandbLogger",
    ],
)
def test_lightning_classes_are_of_both_packages(path):
    classes = _compat.lightning_classes(path)
    assert [cls.__name__ for cls in classes] == [path.rpartition(".")[2]] * 2
    assert [cls.__module__.partition(".")[0] for cls in classes] == ["lightning", "pytorch_lightning"]


def test_lightning_classes_reject_an_unknown_name():
    with pytest.raises(AttributeError, match="WeightAverager"):
        _compat.lightning_classes("callbacks.WeightAverager")


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


@pytest.mark.parametrize("namespace", PACKAGES)
def test_callbacks_of_a_trainer(namespace):
    pl = lightning(namespace)
    callback = pl.Callback()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", enable_model_summary=False, **options)
    assert _compat.callbacks_of(trainer) == [callback]
