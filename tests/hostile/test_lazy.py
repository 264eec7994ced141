"""Modules with lazy layers that no batch has gone through: trained as without a trick, or rejected in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fits import differences, make_trainer, weights_of
from helpers.modules import CLASSES, eval_loader, module_class, train_loader
from helpers.tricks import TRICKS
from torch import nn

from lit_tricks.callbacks import KnowledgeDistillation

# What reads or sets weights when the fit starts.
REJECTED = {
    "BinaryCrossEntropy",
    "ChannelsLast",
    "EMA",
    "FixRes",
    "Freeze",
    "KnowledgeDistillation",
    "L1Penalty",
    "LayerDecay",
    "Lookahead",
    "Muon",
    "NoBiasDecay",
    "SWA",
    "Unfreeze",
    "WhitenedStem",
    "XavierInit",
    "ZeroGamma",
}


def network() -> nn.Sequential:
    body = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(body, nn.LazyLinear(CLASSES))


def module(dry: bool = False) -> Any:
    made = module_class("lightning")()
    made.net = network()
    made.example_input_array = None
    if dry:
        made.eval()(torch.zeros(2, 1, 8, 8))
        made.train()
    return made


def fit(made: Any, *callbacks: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    make_trainer(*callbacks, max_epochs=1).fit(made, train_loader(), eval_loader())
    return weights_of(made)


@pytest.mark.parametrize("trick", sorted(set(TRICKS) - {"KnowledgeDistillation"}))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trick_trains_lazy_layers_or_rejects_them_by_name(trick):
    if trick in REJECTED:
        with pytest.raises(RuntimeError, match=rf"^{trick}.* Classifier has lazy layers \(net\.0\.0\.weight"):
            fit(module(), TRICKS[trick].make())
    else:
        fit(module(), TRICKS[trick].make())


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trick_trains_layers_that_a_batch_has_gone_through(trick):
    fit(module(dry=True), TRICKS[trick].make())


def test_a_lazy_teacher_is_rejected_by_name():
    teacher = network()
    with pytest.raises(RuntimeError, match=r"^KnowledgeDistillation.* lazy layers .* before the fit"):
        fit(module(dry=True), KnowledgeDistillation(teacher))
    teacher.eval()(torch.zeros(2, 1, 8, 8))
    fit(module(), KnowledgeDistillation(teacher))  # the student may be lazy


def test_lazy_layers_train_as_others_beside_a_trick_that_does_not_touch_weights():
    make = TRICKS["LabelSmoothing"].make
    assert not differences(fit(module(), make()), fit(module(), make()))
