"""chemprop: regression on molecules in `lightning`; batches are NamedTuples with a graph in them."""

from __future__ import annotations

from typing import Any

import pytest
from _clients import (
    NO_BATCHNORM,
    NO_BATCHNORM_TO_TRAIN,
    NO_CONVOLUTIONS,
    NO_IMAGES,
    NO_RESIDUAL_BRANCHES,
    NO_WEIGHT_DECAY,
    check,
    each_schedule,
    each_trick,
    no_labels,
    own_schedule,
    without_trick,
)
from helpers.fits import make_trainer

data = pytest.importorskip("chemprop.data")
models = pytest.importorskip("chemprop.models")
nn = pytest.importorskip("chemprop.nn")

pytestmark = pytest.mark.clients

ALKANES = ["C" * carbons for carbons in range(1, 17)]


class WithoutScheduler(models.MPNN):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


def fit(*callbacks: Any, module_class: Any = models.MPNN) -> None:
    module = module_class(
        nn.BondMessagePassing(d_h=8, depth=2), nn.MeanAggregation(), nn.RegressionFFN(input_dim=8, hidden_dim=8)
    )
    points = [data.MoleculeDatapoint.from_smi(smiles, [len(smiles) / 16]) for smiles in ALKANES]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=4, shuffle=False)
    make_trainer(*callbacks).fit(module, loader)


def fit_without_scheduler(*callbacks: Any) -> None:
    fit(*callbacks, module_class=WithoutScheduler)


@each_trick
def test_mpnn_takes_or_rejects_trick(name):
    check(
        name,
        fit,
        layout="NamedTuple",
        rejected=own_schedule("LambdaLR", "MPNN")
        | no_labels("2 tensors that could be the target")
        | NO_RESIDUAL_BRANCHES
        | NO_CONVOLUTIONS
        | NO_BATCHNORM_TO_TRAIN
        | NO_IMAGES
        | NO_WEIGHT_DECAY
        | {"BinaryCrossEntropy": r"^BinaryCrossEntropy\(prior_bias=True\): .+ no trained bias of two or more"},
        idle=NO_BATCHNORM,
    )


@each_schedule
def test_subclass_without_scheduler(name):
    check(name, fit_without_scheduler, layout="NamedTuple")


def test_batches_are_named_tuples():
    [batch] = without_trick(fit).batches
    assert issubclass(batch, tuple)
    assert batch._fields
