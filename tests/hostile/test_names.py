"""Callbacks and modules of users whose classes are called as ours, or as Lightning's: known by what they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers.averages import loaded
from helpers.fits import Saver, run
from helpers.modules import NAMESPACES, lightning
from helpers.tricks import TRICKS
from torch import nn

from lit_tricks import callbacks
from lit_tricks.callbacks import EMA, SWA, DropPath, FixRes, ZeroGamma
from lit_tricks.utils.residual import is_drop_path

pl = lightning()
FOREIGN = (
    "Averaging",
    "KeptAverage",
    "WeightAveraging",
    "StochasticWeightAveraging",
    "EMAWeightAveraging",
    "BaseFinetuning",
    "BackboneFinetuning",
    "DropPath",
    "ProgressiveResizing",
    "PreciseBN",
    "EMA",
    "SWA",
    "GradientAccumulationScheduler",
    "LearningRateMonitor",
    "FullyShardedDataParallel",
    "Estimating",
    "LossTrick",
    "Mixing",
    "Trick",
)
each_namespace = pytest.mark.parametrize("namespace", NAMESPACES)


def called(name: str, namespace: str = "lightning", **attributes: Any) -> Any:
    """A user's callback of that name, with a state and attributes of its own."""

    def state_dict(self: Any) -> dict[str, Any]:
        return {"mine": 1}

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        self.loaded = state

    methods = {"state_dict": state_dict, "load_state_dict": load_state_dict, "__module__": "users_project"}
    return type(name, (lightning(namespace).Callback,), methods | attributes)()


@each_namespace
@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.filterwarnings("ignore:SWA averages the statistics of the BatchNorm layers")
@pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network")
def test_callbacks_of_all_these_names_train_beside_a_trick(trick, namespace):
    """Except one of its own name: two with a state and one name are rejected by Lightning."""
    others = [called(name, namespace, fine_tunes=True, validate=True) for name in FOREIGN if name != trick]
    run(*others, TRICKS[trick].make(), namespace=namespace, max_epochs=1)


@each_namespace
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightnings_own_classes_are_known_in_both_packages(namespace):
    pl = lightning(namespace)
    rejected: dict[Any, list[Any]] = {
        r"WeightAveraging both decide": [EMA(0.5), pl.callbacks.WeightAveraging()],
        r"StochasticWeightAveraging both decide": [SWA(0.1), pl.callbacks.StochasticWeightAveraging(0.1)],
        r"FixRes: BackboneFinetuning": [FixRes(None), pl.callbacks.BackboneFinetuning()],
        r"half_life.*GradientAccumulationScheduler": [
            EMA(half_life=1),
            pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
        ],
        r"FixRes: DropPath": [FixRes(None), DropPath(0.5, layers=["net.0.1"])],
    }
    for message, tricks in rejected.items():
        with pytest.raises(RuntimeError, match=message):
            run(*tricks, namespace=namespace, max_epochs=2)


@each_namespace
def test_a_subclass_of_an_average_is_known_as_one(namespace):
    class Mine(EMA):
        pass

    class Theirs(lightning(namespace).callbacks.WeightAveraging):
        pass

    for other in (Mine(0.5), Theirs()):
        with pytest.raises(RuntimeError, match="both decide"):
            run(EMA(0.5), other, namespace=namespace, max_epochs=1)


@each_namespace
def test_the_monitor_of_learning_rates_sees_those_of_swa(namespace):
    class Monitor(lightning(namespace).callbacks.LearningRateMonitor):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = run(SWA(0.7, start=0.5), Monitor(), namespace=namespace).logged
    assert logged[11]["lr-SGD"] == pytest.approx(0.7)


def test_a_run_with_a_callback_of_that_name_resumes_without_an_average(tmp_path):
    saver = Saver(tmp_path, steps=(3,))
    run(called("EMA"), saver, max_epochs=1)
    assert loaded(saver.paths[0])["callbacks"]["EMA"] == {"mine": 1}
    run(EMA(0.5), ckpt_path=saver.paths[0], max_epochs=1)


def test_a_trick_for_a_run_from_scratch_goes_by_tricks_that_fine_tune():
    trick = ZeroGamma(["net.0.1"])
    run(called("Tuner", fine_tunes=True), trick, max_epochs=1)
    assert "start at scale 0" in trick.effect


class AroundDropPath(nn.Module):
    """A block that is called so, and has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x)


class CopiedDropPath(nn.Module):
    """As many projects have it."""


def test_a_module_that_is_called_as_a_drop_path_is_one_only_without_weights():
    assert not is_drop_path("block", AroundDropPath())
    assert not is_drop_path("block", type("StochasticDepth", (nn.Sequential,), {})(nn.Identity()))
    assert is_drop_path("block.drop", CopiedDropPath())
    assert is_drop_path("block.drop_path", nn.Identity())


def test_every_name_here_was_a_name_that_the_library_knows():
    ours = {*callbacks.__all__, "Averaging", "KeptAverage", "Estimating", "LossTrick", "Mixing", "Trick"}
    theirs = set(dir(pl.callbacks)) | {"FullyShardedDataParallel"}
    assert set(FOREIGN) <= ours | theirs
