"""The hooks around the transfer of a batch, outside of a fit."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from lit_tricks.commands.batch_transfer import transfer


class Doubling(LightningModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], *batch[1:]]


class Negating(LightningDataModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [-batch[0], *batch[1:]]


class Halving(LightningDataModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] / 2, *batch[1:]]


def transferred(module: LightningModule, data: LightningDataModule) -> Tensor:
    images, labels = transfer([torch.ones(2), torch.zeros(2)], torch.device("cpu"), module, data)
    assert torch.equal(labels, torch.zeros(2))
    return images


def test_transfer_calls_hooks_of_the_data_or_else_of_the_module() -> None:
    assert torch.equal(transferred(LightningModule(), LightningDataModule()), torch.ones(2))
    assert torch.equal(transferred(Doubling(), Negating()), torch.full((2,), -2.0))
    assert torch.equal(transferred(Doubling(), Halving()), torch.full((2,), 0.5))
