"""Evaluation mode for a while, also of modules whose ``train()`` does more than set a flag."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_tricks.utils.image_size import require_fit
from lit_tricks.utils.modes import eval_mode


class Cached(nn.Module):
    """Caches in evaluation what it computes from its weight, as LeViT does, until ``train(True)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> Cached:
        if mode:
            self.cache = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.weight
        if self.cache is None:
            self.cache = self.weight.detach().clone()
        return x * self.cache


class Merged(nn.Linear):
    """Merges an adapter into its weight for evaluation, as LoRA does."""

    def train(self, mode: bool = True) -> Merged:
        with torch.no_grad():
            if mode != self.training:
                self.weight.add_(torch.full_like(self.weight, 0.1), alpha=-1 if mode else 1)
        return super().train(mode)


def test_eval_mode_restores_flags_and_weights() -> None:
    net = nn.Sequential(Merged(3, 3), nn.BatchNorm1d(3).eval(), nn.Dropout())
    before = net[0].weight.detach().clone()
    with eval_mode(net):
        assert not any(part.training for part in net.modules())
        assert torch.equal(net[0].weight, before + 0.1)
    assert [part.training for part in net.modules()] == [True, True, False, True]
    assert torch.equal(net[0].weight, before)


def test_eval_mode_after_error_restores_flags() -> None:
    net = nn.Sequential(nn.Dropout())
    with pytest.raises(ZeroDivisionError), eval_mode(net):
        _ = 1 / 0
    assert net.training
    assert net[0].training


def test_require_fit_leaves_no_cache_of_the_weights() -> None:
    module: Any = LightningModule()
    module.net = Cached()
    module.forward = module.net.forward
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    require_fit(module, (8, 8), torch.zeros(1, 3, 8, 8), "FixRes")
    with torch.no_grad():
        module.net.weight.fill_(2)
    module.eval()
    assert module(torch.ones(1)) == 2
