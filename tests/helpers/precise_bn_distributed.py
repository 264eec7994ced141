"""One of two processes that re-estimate BatchNorm.

Run by ``_two.py`` for ``test_precise_bn.py``. It leaves ``FOLDER/<rank>.pt``: per case what the runs ended with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from helpers.fits import Saver, make_trainer, weights_of
from helpers.modules import eval_loader, images, lightning, module_class, sharded_class
from lit_tricks.callbacks import EMA, PreciseBN
from lit_tricks.callbacks.batchnorm.statistics import estimate
from lit_tricks.utils.modules import batchnorms_of

RANK = int(os.environ["RANK"])
SHARES = [range(12), range(12, 16)]  # of the samples: batches of 6 and of 2


class History(lightning().Callback):  # type: ignore[misc]
    """The weights of each step, and those that are validated."""

    def __init__(self) -> None:
        self.trained: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.trained.append(weights_of(module))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append(weights_of(module))


def fit(case: str, *callbacks: Any, ckpt_path: Path | None = None) -> dict[str, Any]:
    strategies = lightning().strategies
    if case.startswith("FSDP2"):
        whole = {"save_distributed_checkpoint": "shards" in case}
        module, plan = sharded_class("lightning")(), strategies.ModelParallelStrategy(2, 1, **whole)
    else:
        module, plan = module_class("lightning")(), strategies.DDPStrategy()
    history = History()
    unequal = "unequal" in case
    loader = DataLoader(Subset(images(16), SHARES[RANK]) if unequal else images(16), (6, 2)[RANK] if unequal else 4)
    trainer = make_trainer(*callbacks, history, strategy=plan, devices=2, use_distributed_sampler=not unequal)
    torch.manual_seed(0)
    trainer.fit(module, loader, eval_loader(), ckpt_path=ckpt_path)
    return {"weights": weights_of(module), "trained": history.trained, "validated": history.validated}


def of_unequal_numbers_of_batches() -> Any:
    """Rank 0 has three batches, and rank 1 has one."""
    model = nn.Sequential(nn.BatchNorm2d(1))
    data = images(16).tensors[0]
    batches: Iterator[Any] = iter(data[:12].split(4) if RANK == 0 else [data[12:]])

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    return estimate(model, batchnorms_of(model), batches, model, reduce=reduce)


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    for case in ("DDP", "DDP, unequal", "FSDP2, whole", "FSDP2, in shards"):
        saver = Saver(folder / case, steps=(4,))
        tricks = [PreciseBN(1000)] if case == "DDP" else [PreciseBN(1000), EMA(0.8)]
        found[case] = {"full": fit(case, *tricks, saver), "plain": fit(case), "resumed": {}}
        for path in saver.paths:
            tricks = [PreciseBN(1000)] if case == "DDP" else [EMA(0.8), PreciseBN(1000)]
            found[case]["resumed"][path.name] = fit(case, *tricks, ckpt_path=path)["weights"]
    found["unequal numbers of batches"] = of_unequal_numbers_of_batches()
    torch.save(found, folder / f"{RANK}.pt")
