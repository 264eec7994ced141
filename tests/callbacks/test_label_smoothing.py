"""The numbers of LabelSmoothing, against the paper's formula and torch, and the losses that it works with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences, make_trainer
from helpers.losses import fit_with, loader_of
from helpers.modules import LAYOUTS, NAMESPACES, eval_loader, module_class, train_loader
from torch import nn

from lit_tricks.callbacks import LabelSmoothing
from lit_tricks.callbacks.label_smoothing import label_smoothing_for_torch
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import carrying

CE = F.cross_entropy


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return CE(logits, labels, label_smoothing=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_targets_are_those_of_the_conventions(smoothing, classes):
    for convention, others in (("torch", smoothing / classes), ("paper", smoothing / (classes - 1))):
        s = label_smoothing_for_torch(classes, smoothing, convention)
        soft = F.one_hot(torch.tensor(1), classes).double() * (1 - s) + s / classes
        expected = torch.full((classes,), others, dtype=torch.float64)
        expected[1] = 1 - others * (classes - 1)
        torch.testing.assert_close(soft, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(soft.sum().item(), 1.0)
    assert expected[1] == pytest.approx(1 - smoothing)  # equation 4 of "Bag of Tricks"


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_loss_of_the_paper(smoothing):
    logits = torch.randn(7, 10, dtype=torch.float64)
    labels = torch.randint(10, (7,))
    q = torch.full((7, 10), smoothing / 9, dtype=torch.float64).scatter(1, labels[:, None], 1 - smoothing)
    trick = LabelSmoothing(smoothing, convention="paper")
    _, target = trick.act({}, carrying(labels, LossSpec(("LabelSmoothing",))))
    torch.testing.assert_close(CE(logits, target), -(q * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize(("classes", "smoothing"), [(10, 0.1), (1000, 0.1), (10, 0.5)])
def test_gap_between_logits_that_the_targets_ask_for(classes, smoothing):
    """Figure 4 of "Bag of Tricks": log((K - 1) (1 - smoothing) / smoothing), for the convention "paper"."""
    logits = torch.zeros(classes, dtype=torch.float64)
    best = torch.tensor((classes - 1) * (1 - smoothing) / smoothing, dtype=torch.float64).log()
    logits[3] = best
    logits.requires_grad_()
    _, target = LabelSmoothing(smoothing, "paper").act({}, carrying(torch.tensor([3]), LossSpec(("LabelSmoothing",))))
    (gradient,) = torch.autograd.grad(CE(logits[None], target), logits)
    assert gradient.abs().max() < 1e-12


def test_paper_convention_has_a_limit():
    with pytest.raises(RuntimeError, match=r"smoothing=0.6.* 2 classes less .* below 0.5"):
        label_smoothing_for_torch(2, 0.6, "paper")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smoothing": 1.0}, r"smoothing=1.0"),
        ({"smoothing": -0.1}, r"smoothing=-0.1"),
        ({"convention": "keras"}, "convention='keras'"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelSmoothing(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_trains_as_a_module_that_smooths_itself(namespace, layout):
    how = {"namespace": namespace, "loader": train_loader(layout)}
    expected = fit_with(smoothed, namespace=namespace)
    for loss in (CE, nn.CrossEntropyLoss()):
        assert not differences(fit_with(loss, LabelSmoothing(0.3), **how).weights, expected.weights)
    assert differences(fit_with(CE, **how).weights, expected.weights)


def test_zero_is_plain_cross_entropy():
    assert not differences(fit_with(CE, LabelSmoothing(0.0)).weights, fit_with(CE).weights)


@pytest.mark.parametrize(
    "loss",
    {
        "nll": lambda x, y: F.nll_loss(x.log_softmax(1), y),
        "soft": lambda x, y: CE(x, F.one_hot(y, 3).float()),
        "long": lambda x, y: CE(x, y.long().view(-1)),
        "halves": lambda x, y: (CE(x[:2], y[:2], reduction="sum") + CE(x[2:], y[2:], reduction="sum")) / len(y),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_ways_to_the_same_loss(loss):
    found = fit_with(loss[1], LabelSmoothing(0.3))
    torch.testing.assert_close(found.weights, fit_with(smoothed).weights, rtol=1e-4, atol=1e-5)


def test_accuracy_in_training_step():
    from torchmetrics.classification import MulticlassAccuracy

    accuracy, plain = MulticlassAccuracy(3), []

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        plain.append(accuracy(x, y))
        return CE(x, y)

    fit_with(loss, LabelSmoothing(0.3))
    assert type(accuracy.tp) is torch.Tensor
    assert 0 <= accuracy.compute() <= 1
    assert {type(value) for value in plain} == {torch.Tensor}


def test_validation_loss_is_plain():
    losses = []
    for tricks in ([], [LabelSmoothing(0.9)]):
        module = module_class("lightning")(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
        trainer = make_trainer(*tricks, max_epochs=1, num_sanity_val_steps=1)
        trainer.fit(module, train_loader(), eval_loader())
        losses.append({name: float(trainer.callback_metrics[name]) for name in ("train_loss", "val_loss")})
    assert losses[0]["val_loss"] == losses[1]["val_loss"]
    assert losses[0]["train_loss"] != losses[1]["train_loss"]


def test_rejects_to_smooth_twice():
    with pytest.raises(RuntimeError, match=r"label_smoothing=0.3.*Set it to 0"):
        fit_with(smoothed, LabelSmoothing(0.1))


def test_rejects_a_second_one():
    with pytest.raises(RuntimeError, match="LabelSmoothing was passed twice"):
        fit_with(CE, LabelSmoothing(0.1), LabelSmoothing(0.2))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(),
        lambda x, y: F.multi_margin_loss(x, y),
        lambda x, y: x.square().mean(),
        lambda x, y: CE(x, torch.eye(3)[y]),
    ],
    ids=["gather", "margin", "none", "table"],
)
def test_no_loss_that_it_knows_is_an_error_in_the_first_step(loss):
    with pytest.raises(RuntimeError, match=r"^LabelSmoothing has no effect: .*F.cross"):
        fit_with(loss, LabelSmoothing(0.1))


def test_losses_of_timm_are_smoothed():
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    soft = fit_with(lambda x, y: SoftTargetCrossEntropy()(x, F.one_hot(y, 3).float()), LabelSmoothing(0.3))
    torch.testing.assert_close(soft.weights, fit_with(smoothed).weights, rtol=1e-4, atol=1e-5)
    for loss in (BinaryCrossEntropy(), LabelSmoothingCrossEntropy()):  # they make soft targets of their own
        with pytest.raises(RuntimeError, match="LabelSmoothing has no effect"):
            fit_with(loss, LabelSmoothing(0.3))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_first_batch_that_the_module_skips_is_no_error():
    calls: list[Any] = []

    def loss(x: torch.Tensor, y: torch.Tensor) -> Any:
        calls.append(None)
        return None if len(calls) == 1 else CE(x, y)

    module = module_class("lightning")(quiet=True)
    module.loss = lambda batch: loss(module(batch[0]), batch[1])
    make_trainer(LabelSmoothing(0.1), max_epochs=1, limit_val_batches=0).fit(module, train_loader(), eval_loader())
    assert len(calls) == 4


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_rejects_a_batch_without_target_and_a_step_that_takes_an_iterator():
    module, images = module_class("lightning")(), torch.zeros(4, 1, 8, 8)
    with pytest.raises(RuntimeError, match=r"LabelSmoothing found no target.*list"):
        make_trainer(LabelSmoothing(0.1)).fit(module, loader_of([images, images]), eval_loader())

    class Iterating(module_class("lightning")):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(RuntimeError, match=r"LabelSmoothing .*dataloader_iter"):
        make_trainer(LabelSmoothing(0.1)).fit(Iterating(), train_loader(), eval_loader())


def test_segmentation_with_ignored_pixels():
    class Segmenter(module_class("lightning")):
        def __init__(self, smoothing: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Conv2d(1, 3, 3, padding=1)
            self.criterion = nn.CrossEntropyLoss(ignore_index=255, label_smoothing=smoothing)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.criterion(self.net(batch["image"]), batch["mask"].long().squeeze(1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    mask = torch.randint(3, (4, 1, 8, 8), dtype=torch.uint8)
    mask[:, :, :3] = 255
    batches = [{"image": torch.randn(4, 1, 8, 8), "mask": mask, "crs": "EPSG:4326"}] * 2
    weights = []
    for module, tricks in ((Segmenter(0.2), []), (Segmenter(0.0), [LabelSmoothing(0.2)])):
        make_trainer(*tricks, max_epochs=1, limit_val_batches=0).fit(module, loader_of(*batches), eval_loader())
        weights.append(dict(module.state_dict()))
    assert not differences(*weights)
