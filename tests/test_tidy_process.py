"""The process of the tests after a test: a group of processes leaves nothing that later processes would wait for."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.fits import make_trainer
from helpers.modules import eval_loader, module_class, train_loader

BEFORE = {name: os.environ.get(name) for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")}


@pytest.mark.parametrize("time", [1, 2])
def test_variables_of_a_group_do_not_outlast_a_test(time: int) -> None:
    assert {name: os.environ.get(name) for name in BEFORE} == BEFORE
    trainer = make_trainer(strategy="ddp", max_epochs=1, use_distributed_sampler=False)
    trainer.fit(module_class("lightning")(), train_loader(), eval_loader())
    assert os.environ["LOCAL_RANK"] == "0"
    torch.distributed.destroy_process_group()
