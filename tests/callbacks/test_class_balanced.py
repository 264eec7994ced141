"""Test the numbers of ClassBalanced against the paper's formula in float64, also together with other tricks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.counted import COUNTS, LABELS, LOGITS, WEIGHT, K, N, under
from helpers.fits import run
from helpers.losses import fit_with

from lit_tricks.callbacks import BinaryCrossEntropy, ClassBalanced, FocalLoss, LabelSmoothing, LogitAdjustment
from lit_tricks.callbacks.class_balanced import class_balanced_weights
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import carrying

CE = F.cross_entropy
BETA = 0.9


def paper(counts: list[int], beta: float) -> torch.Tensor:
    """Weights of the authors' code, whose sum is the number of classes."""
    weights = [(1 - beta) / (1 - beta**n) for n in counts]
    return torch.tensor([w / sum(weights) * len(counts) for w in weights], dtype=torch.float64)


def balanced(beta: float = BETA) -> ClassBalanced:
    return ClassBalanced(beta, COUNTS)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_weights_of_the_paper(beta):
    weights = class_balanced_weights(torch.tensor(COUNTS, dtype=torch.float64), beta)
    torch.testing.assert_close(weights, paper(COUNTS, beta), rtol=1e-9, atol=0)
    assert float(weights.sum()) == pytest.approx(K)


def test_ends_of_the_range():
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    assert class_balanced_weights(counts, 0.0).tolist() == [1.0] * K
    inverse = K / counts / (1 / counts).sum()
    torch.testing.assert_close(class_balanced_weights(counts, 1 - 1e-12), inverse, rtol=1e-6, atol=0)


def test_loss_is_cross_entropy_times_the_weight_of_the_class():
    plain = CE(LOGITS, LABELS, reduction="none") * paper(COUNTS, BETA)[LABELS]
    for reduction, value in (("none", plain), ("sum", plain.sum()), ("mean", plain.mean())):
        for loss in (
            CE(LOGITS, under(balanced()), reduction=reduction),
            F.nll_loss(LOGITS.log_softmax(1), under(balanced()), reduction=reduction),
            CE(LOGITS, F.one_hot(under(balanced()), K).double(), reduction=reduction),
        ):
            torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-7)


def test_class_weights_of_the_module_multiply_and_ignored_labels_count_nothing():
    none = CE(LOGITS, LABELS, WEIGHT, ignore_index=2, reduction="none") * paper(COUNTS, BETA)[LABELS]
    how = {"weight": WEIGHT, "ignore_index": 2}
    torch.testing.assert_close(CE(LOGITS, under(balanced()), **how, reduction="none"), none, rtol=1e-6, atol=1e-7)
    mean = none.sum() / WEIGHT[LABELS[LABELS != 2]].sum()
    torch.testing.assert_close(CE(LOGITS, under(balanced()), **how), mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_class_balanced_focal_loss_of_mixed_and_smoothed_labels(order):
    other, share = LABELS.roll(1), torch.linspace(0, 1, N, dtype=torch.float64)
    soft = share[:, None] * F.one_hot(LABELS, K) + (1 - share[:, None]) * F.one_hot(other, K)
    soft = soft * 0.7 + 0.3 / K
    p = LOGITS.softmax(1)
    expected = (1 - (soft * p).sum(1)) ** 2 * -(paper(COUNTS, BETA) * soft * p.log()).sum(1)
    target = under(*[balanced(), FocalLoss(2.0), LabelSmoothing(0.3)][::order], mixed=(other, share))
    torch.testing.assert_close(CE(LOGITS, target), expected.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_class_balanced_sigmoid_loss(order):
    """As in the authors' code: the weight of the label's class on all K binary losses of an item."""
    sigmoids = F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(LABELS, K).double(), reduction="none").sum(1)
    expected = (paper(COUNTS, BETA)[LABELS] * sigmoids).mean()
    target = under(*[balanced(), BinaryCrossEntropy(prior_bias=False)][::order])
    torch.testing.assert_close(CE(LOGITS, target), expected, rtol=1e-6, atol=0)
    target = under(*[LogitAdjustment(counts=COUNTS), BinaryCrossEntropy(prior_bias=False)][::order])
    with pytest.raises(RuntimeError, match="LogitAdjustment shifts the logits of a softmax, which BinaryCrossEntropy"):
        CE(LOGITS, target)


def test_labels_above_the_classes_are_ignored_labels():
    """Masks have 255 for what is no class. The weights sum to the number of classes without it."""
    logits, labels = torch.randn(1, K, 4, 4, dtype=torch.float64), torch.arange(16).view(1, 4, 4) % K
    labels[0, 0] = 255
    trick = ClassBalanced(BETA)
    trick.load_state_dict({"classes": [*COUNTS, *[0] * 251, 77], "items": 1, "is_dense": True})
    _, target = trick.act({}, carrying(labels, LossSpec(("ClassBalanced",))))
    expected = (
        CE(logits, labels, ignore_index=255, reduction="none")[labels != 255]
        * paper(COUNTS, BETA)[labels[labels != 255]]
    )
    torch.testing.assert_close(CE(logits, target, ignore_index=255), expected.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_two_tricks_that_weigh_the_classes_are_an_error(order):
    tricks = [ClassBalanced(counts=[3, 2, 1]), FocalLoss(2.0, [0.2, 0.3, 0.5])][::order]
    with pytest.raises(RuntimeError, match=r"^ClassBalanced and FocalLoss.* both weigh"):
        fit_with(CE, *tricks)


@pytest.mark.parametrize("arguments", [{"beta": 1.0}, {"beta": -0.1}, {"counts": [0]}, {"counts": "3"}])
def test_rejects_arguments(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        ClassBalanced(**arguments)


def test_warns_if_beta_is_too_small_for_the_data():
    with pytest.warns(UserWarning, match=r"all classes have far more than 10 labels.*larger beta"):
        run(ClassBalanced(beta=0.9, counts=[100_000, 10_000, 1_000]), max_epochs=1)
