"""One of two processes that average weights under DDP and FSDP2.

Run by ``_two.py`` for ``test_weights.py``. It leaves ``FOLDER/<rank>.pt``: per case what the runs ended with.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch

from helpers.fits import Saver, make_trainer, weights_of
from helpers.modules import eval_loader, lightning, module_class, sharded_class, train_loader
from lit_tricks.callbacks import EMA

RANK = int(os.environ["RANK"])
CASES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2, whole": {"save_distributed_checkpoint": False},
    "FSDP2, in shards": {"save_distributed_checkpoint": True},
    "FSDP2, bf16-true, whole": {"save_distributed_checkpoint": False, "precision": "bf16-true"},
    "FSDP2, bf16-true, in shards": {"save_distributed_checkpoint": True, "precision": "bf16-true"},
}


class History(lightning().Callback):  # type: ignore[misc]
    """The weights of each step, and those that are validated."""

    def __init__(self) -> None:
        self.trained: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.trained.append(weights_of(module))

    def on_validation_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.validated.append(weights_of(module))


def fit(case: str, *callbacks: Any, root: Path, ckpt_path: Path | None = None) -> dict[str, Any]:
    how = dict(CASES[case])
    precision = how.pop("precision", None)
    strategies = lightning().strategies
    if case == "DDP":
        module, plan = module_class("lightning")(), strategies.DDPStrategy()
    else:
        module, plan = sharded_class("lightning")(), strategies.ModelParallelStrategy(2, 1, **how)
    history = History()
    # no summary: it would run its example through the first process alone, and FSDP2 then waits for the others' shards
    how = {"strategy": plan, "devices": 2, "use_distributed_sampler": False, "enable_model_summary": False}
    how |= {"precision": precision, "num_sanity_val_steps": 0, "default_root_dir": root}
    trainer = make_trainer(*callbacks, history, **how)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(rank=RANK, world_size=2), eval_loader(), ckpt_path=ckpt_path)
    files = sorted((root / "ema_snapshots-power").glob("*")) if RANK == 0 else []
    aside = [c.state_dict() for c in callbacks if isinstance(c, EMA) and not c.validate and "shards" not in case]
    return {
        "weights": weights_of(module),
        "trained": history.trained,
        "validated": history.validated,
        "shadows": [
            dict(zip(c._weights.names, c._weights._average, strict=True)) for c in callbacks if isinstance(c, EMA)
        ],
        "aside": aside,
        "snapshots": {file.name: torch.load(file, weights_only=True) for file in files},
        "writes": [c._folder is not None for c in callbacks if isinstance(c, EMA)],
        "trainer": trainer,
    }


def emas() -> list[EMA]:
    return [
        EMA(0.8, validate="both"),
        EMA(0.5, validate=False, name="aside", device="cpu"),
        EMA(power=[0.05, 0.2], snapshots=4, validate=False, name="power"),
    ]


class Spectral(sharded_class("lightning")):  # type: ignore[misc]
    """Layers with a spectral norm of both kinds, and a buffer that each process changes in its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net[0][0] = torch.nn.utils.spectral_norm(self.net[0][0])
        self.net[1] = torch.nn.utils.parametrizations.spectral_norm(self.net[1])
        self.register_buffer("state", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.state += 1 + RANK
        return super().training_step(batch, batch_idx)

    def norms(self) -> list[float]:
        self.eval()
        self.net(torch.zeros(2, 1, 8, 8))
        weights = [self.net[0][0].weight, self.net[1].weight]
        whole = [getattr(weight.detach(), "full_tensor", lambda w=weight: w.detach())() for weight in weights]
        return [float(torch.linalg.matrix_norm(weight.flatten(1), 2)) for weight in whole]


def fit_spectral(case: str, folder: Path) -> dict[str, Any]:
    strategies = lightning().strategies
    plan = (
        strategies.DDPStrategy()
        if case == "DDP"
        else strategies.ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    )

    def fitted(*callbacks: Any, ckpt_path: Any = None) -> Any:
        module = Spectral()
        how = {"strategy": copy.deepcopy(plan), "devices": 2, "use_distributed_sampler": False}
        trainer = make_trainer(EMA(0.8), *callbacks, num_sanity_val_steps=0, enable_model_summary=False, **how)
        torch.manual_seed(0)
        trainer.fit(module, train_loader(rank=RANK, world_size=2), eval_loader(), ckpt_path=ckpt_path)
        return module

    saver = Saver(folder / f"spectral {case}", steps=(8,))
    full = fitted(saver)
    found = {"full": weights_of(full), "resumed": [weights_of(fitted(ckpt_path=path)) for path in saver.paths[:1]]}
    return found | {"norms": full.norms()}


def main(folder: Path) -> None:
    found: dict[str, Any] = {f"spectral {case}": fit_spectral(case, folder) for case in ("DDP", "FSDP2")}
    for case in CASES:
        saver = Saver(folder / case, steps=(3, 8))
        full = fit(case, *emas(), saver, root=folder / case / "full")
        after = folder / case / "after.ckpt"
        full.pop("trainer").save_checkpoint(after, weights_only="shards" in case)
        checkpoints = {}
        if "shards" not in case:
            for path in saver.paths:
                state = torch.load(path, weights_only=True)
                checkpoints[path.name] = {key: state[key] for key in ("state_dict", "global_step", "callbacks")}
        resumed = {}
        for path in saver.paths:
            resumed[path.name] = fit(case, *emas(), ckpt_path=path, root=folder / case / f"from {path.name}")
            del resumed[path.name]["trainer"]
        plain = fit(case, root=folder / case / "plain")
        del plain["trainer"]
        found[case] = {"full": full, "resumed": resumed, "plain": plain, "checkpoints": checkpoints}
    torch.save(found, folder / f"{RANK}.pt")
