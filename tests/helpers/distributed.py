"""One of two processes that run every trick under DDP and under FSDP2.

Run by ``_two.py``. It leaves ``FOLDER/<rank>.pt``: per strategy and trick what the run ended with,
and what it ended with when it was resumed, or the message with which the trick rejected it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.fits import Saver, log_lines, make_trainer, weights_of
from helpers.modules import eval_loader, lightning, module_class, sgd, sharded_class, train_loader
from helpers.tricks import TRICKS
from lit_tricks.callbacks import Unfreeze

RANK = int(os.environ["RANK"])
WITH_ADAMW = ("Freeze", "LayerDecay", "Lookahead", "Muon", "NoBiasDecay", "Unfreeze")  # what acts on optimizers


def adamw(module: Any) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def fit(strategy: str, *callbacks: Any, ckpt_path: Path | None = None, optimizers: Any = sgd) -> dict[str, Any]:
    if strategy == "FSDP2":
        module = sharded_class("lightning")(optimizers=optimizers)
        plan = lightning().strategies.ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    else:
        module = module_class("lightning")(optimizers=optimizers)
        plan = lightning().strategies.DDPStrategy()
    trainer = make_trainer(*callbacks, strategy=plan, devices=2, use_distributed_sampler=False)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(rank=RANK, world_size=2), eval_loader(), ckpt_path=ckpt_path)
    assert trainer.world_size == 2
    return {"weights": weights_of(module), "logged": trainer.logger.metrics}


def fit_and_resume(
    strategy: str, make: Callable[[], Any], folder: Path, chosen: slice = slice(None), **kwargs: Any
) -> dict[str, Any]:
    saver = Saver(folder, steps=(3, 8))  # within the first epoch, and at the end of the second
    try:
        with log_lines() as records:
            full = fit(strategy, make(), saver, **kwargs)
    except RuntimeError as error:
        return {"rejected": str(error)}
    resumed = {path.name: fit(strategy, make(), ckpt_path=path, **kwargs)["weights"] for path in saver.paths[chosen]}
    return full | {"resumed": resumed, "lines": [record.getMessage() for record in records]}


def late_unfreeze() -> Unfreeze:
    """One moment at the start of an epoch, one within it."""
    return Unfreeze({"net.0.0": 1, "net.0.1": 2.25}, {"net.0.0": 0.5})


def main(folder: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for number, strategy in enumerate(("DDP", "FSDP2")):
        found[strategy] = {"no trick": fit(strategy)}
        for index, (name, row) in enumerate(TRICKS.items()):
            half = slice((index + number) % 2, None, 2)  # of its four checkpoints; the others under the other strategy
            found[strategy][name] = fit_and_resume(strategy, row.make, folder / strategy / name, half)
        for name in WITH_ADAMW:
            place = folder / strategy / f"{name} AdamW"
            first = slice(1)  # of its four checkpoints: within an epoch
            found[strategy][f"{name} AdamW"] = fit_and_resume(
                strategy, TRICKS[name].make, place, first, optimizers=adamw
            )
        # At the end of an epoch, FSDP2 shows other parameters than in it.
        found[strategy]["late"] = fit_and_resume(strategy, late_unfreeze, folder / strategy / "late")
    torch.save(found, folder / f"{RANK}.pt")
