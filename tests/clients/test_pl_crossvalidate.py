"""pl_crossvalidate: a Trainer of its own in `lightning`, which fits once per fold with the same callbacks."""

from __future__ import annotations

from typing import Any

import pytest
from _clients import NO_FORWARD, NO_RESIDUAL_BRANCHES, check, each_trick, without_trick
from helpers.modules import eval_loader, images, lightning, module_class
from torch.utils.data import DataLoader

pl_crossvalidate = pytest.importorskip("pl_crossvalidate")

pytestmark = pytest.mark.clients


def fit(*callbacks: Any) -> None:
    trainer = pl_crossvalidate.KFoldTrainer(
        num_folds=2,
        max_epochs=3,
        accelerator="cpu",
        logger=lightning().loggers.CSVLogger("."),
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.cross_validate(module_class("lightning")(), DataLoader(images(32), batch_size=4), eval_loader())


REJECTED = NO_RESIDUAL_BRANCHES | {
    "LinearScaling": r"^LinearScaling found no batch size.+LinearScaling\(batch_size=...\)"
}


@each_trick
def test_every_fold_starts_anew(name):
    check(name, fit, layout="list", rejected=REJECTED, idle=NO_FORWARD)  # its test_step does nothing


def test_there_are_two_folds():
    assert without_trick(fit).fits == 2
