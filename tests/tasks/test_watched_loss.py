"""A warning of a loss that is far above that of guessing."""

from __future__ import annotations

import logging

import pytest
import torch

from lit_tricks import Classifier


def test_a_loss_far_above_guessing_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Classifier(model_args={"depth": 18, "width": 0.03125}, num_classes=4)
    monkeypatch.setattr(logging.getLogger("lit_tricks"), "propagate", True)
    with caplog.at_level("WARNING", "lit_tricks"):
        model._watch_loss(torch.tensor(13.0), 0)  # 9.4 times ln(4)
        model._watch_loss(torch.tensor(1e5), 1)
        assert not caplog.records
        model._watch_loss(torch.tensor(14.0), 50)
        model._watch_loss(torch.tensor(1e5), 100)
    [record] = caplog.records
    assert "LinearScaling" in record.getMessage()
