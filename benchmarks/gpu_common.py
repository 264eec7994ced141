"""Shared code of the parts of gpu.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_tricks import callbacks as tricks

Report = Callable[[str, str, str], None]  # what, predicted, measured
Batch = list[Tensor]


@dataclass(frozen=True)
class Scale:
    device: str = "cuda"
    model: str = "resnet50"
    small: str = "resnet18"
    batch_size: int = 128
    image_size: int = 224
    steps: int = 20
    rounds: int = 2

    @property
    def precision(self) -> str:
        return "16-mixed" if self.device == "cuda" else "32-true"

    def network(self) -> nn.Module:
        return timm.create_model(self.model)

    def batch(self, size: int | None = None) -> Batch:
        images = torch.randn(size or self.batch_size, 3, self.image_size, self.image_size, device=self.device)
        return [images, torch.randint(1000, (len(images),), device=self.device)]

    @property
    def little(self) -> Scale:
        return replace(self, model=self.small, image_size=64)


class Batches(Dataset[Batch]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def loader(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(Batches(batches), None)


class Net(LightningModule):
    def __init__(self, net: nn.Module, lr: float = 0.01) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr, 0.9, weight_decay=1e-4, nesterov=True)


def synchronize(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def trainer_of(s: Scale, callbacks: list[Callback], epochs: int = 1, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": epochs, "accelerator": "gpu" if s.device == "cuda" else "cpu", "devices": 1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 10**6, "callbacks": callbacks,
    }  # fmt: skip
    if "plugins" not in kwargs:
        settings["precision"] = s.precision
    return Trainer(**(settings | kwargs))


def medians(candidates: dict[str, Callable[[], float]], rounds: int, warm: int = 0) -> dict[str, float]:
    """Return the median per candidate over the rounds after the first ``warm`` ones. All candidates take turns."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + warm):
        for name, candidate in candidates.items():
            value = candidate()
            if turn >= warm:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def timed(s: Scale, function: Callable[[], object]) -> float:
    synchronize(s.device)
    start = time.perf_counter()
    function()
    synchronize(s.device)
    return time.perf_counter() - start


def paper(batch_size: int) -> list[Callback]:
    return [
        tricks.LinearScaling(base_batch_size=256, batch_size=batch_size), tricks.WarmupCosine(warmup_epochs=0.1),
        tricks.ZeroGamma(), tricks.XavierInit(), tricks.NoBiasDecay(), tricks.LabelSmoothing(), tricks.MixUp(),
    ]  # fmt: skip
