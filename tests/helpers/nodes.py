"""One of two nodes that train from files and from shards: ``torchrun ... tests/helpers/nodes.py FOLDER``.

Started by ``test_nodes.py``. It leaves ``FOLDER/<rank>.pt``: per kind of data what a run saw and ended with,
and the same of one that was resumed in the middle of its second epoch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lit_tricks.data import ImageFolder, Streaming

RANK = int(os.environ.get("RANK", 0))
BATCH_SIZE, EPOCHS = 2, 2
STOP = 8  # of 6 steps an epoch: in the second


class Network(LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 3))
        self.trained: list[tuple[int, str]] = []
        self.validated: list[str] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.trained += [(self.current_epoch, name_of(image)) for image in batch[0]]
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_validation_epoch_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated += [name_of(image) for image in batch[0]]
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def name_of(image: Tensor) -> str:
    return hashlib.sha1(image.contiguous().numpy().tobytes()).hexdigest()[:10]


class Saver(Callback):
    """Saves a checkpoint in the middle of an epoch, and what is needed to compare."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == STOP:
            trainer.save_checkpoint(self.path, weights_only=False)


def fit(data: LightningDataModule, *callbacks: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
    torch.manual_seed(RANK if ckpt_path is None else 5)  # the seed of the data is that of rank 0, or of the checkpoint
    network = Network()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plan = {"accelerator": "cpu", "strategy": "ddp", "num_nodes": 2, "devices": 1, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=EPOCHS, callbacks=list(callbacks), **plan, **quiet)
    trainer.fit(network, data, ckpt_path=ckpt_path, weights_only=True)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return {"trained": network.trained, "validated": network.validated, "weights": state}


def main(folder: Path) -> None:
    settings: dict[str, Any] = {"image_size": 16, "batch_size": BATCH_SIZE, "num_workers": 1, "augmentation": "none"}
    cache = str(folder / "cache")  # of both nodes
    kinds: dict[str, Callable[[], LightningDataModule]] = {
        "folder": lambda: ImageFolder(str(folder / "images"), **settings),
        "shards": lambda: Streaming(str(folder / "shards"), **settings),
        "bucket": lambda: Streaming("s3://shards/of/images", **settings, cache_dir=cache),
    }
    found: dict[str, Any] = {}
    for kind, make in kinds.items():
        path = folder / f"{kind}.ckpt"
        found[kind] = {"full": fit(make(), Saver(path)), "resumed": fit(make(), ckpt_path=path)}
    torch.save(found, folder / f"{RANK}.pt")
