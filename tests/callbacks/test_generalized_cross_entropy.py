"""The numbers of GeneralizedCrossEntropy, against the paper's formula in float64, and together with other tricks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences
from helpers.losses import fit_with, loader_of
from torch import Tensor, nn

from lit_tricks.callbacks import (
    CutMix,
    FocalLoss,
    GeneralizedCrossEntropy,
    KnowledgeDistillation,
    LabelSmoothing,
)
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.generalized_cross_entropy import box_cox
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying

N, K = 6, 4
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LABELS = torch.tensor([0, 3, 1, 2, 2, 3])
OTHER = LABELS.roll(1)
SHARE = torch.linspace(0, 1, N, dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
HARD = F.one_hot(LABELS, K).double()
MIXED = SHARE[:, None] * HARD + (1 - SHARE[:, None]) * F.one_hot(OTHER, K)
CE = F.cross_entropy
QS = [0.01, 0.5, 0.7, 1.0]


def tricked(*tricks: Any, labels: Tensor = LABELS, mixed: tuple[Tensor, ...] = ()) -> SoftTarget:
    target = carrying(labels.clone(), LossSpec(tuple(type(trick).__name__ for trick in tricks)), *mixed)
    for trick in tricks:
        _, target = trick.act({}, target)
    return target


def by_hand(q: float, soft: Tensor, logits: Tensor = LOGITS) -> Tensor:
    """sum_c t_c (1 - p_c^q) / q."""
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return (soft * (1 - p**q) / q).sum(1)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("mixed", [(), (OTHER, SHARE)], ids=["", "mixed"])
def test_formula_of_the_paper(q, mixed):
    expected = by_hand(q, MIXED if mixed else HARD)
    reduced = {"none": expected, "sum": expected.sum(), "mean": expected.mean()}
    for reduction, value in reduced.items():
        for logits, loss, hot in (
            (LOGITS, CE, False),
            (LOGITS.log_softmax(1), F.nll_loss, False),
            (LOGITS, CE, True),  # as probabilities
        ):
            target = tricked(GeneralizedCrossEntropy(q), mixed=mixed)
            found = loss(logits, F.one_hot(target, K).double() if hot else target, reduction=reduction)
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9)


def test_ends_of_the_range():
    mae = (LOGITS.softmax(1) - HARD).abs().sum(1).mean() / 2
    torch.testing.assert_close(CE(LOGITS, tricked(GeneralizedCrossEntropy(1.0))), mae)
    torch.testing.assert_close(
        CE(LOGITS, tricked(GeneralizedCrossEntropy(1e-7))), CE(LOGITS, LABELS), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("q", QS)
def test_gradient_is_that_of_cross_entropy_times_p_to_the_q(q):
    logits = LOGITS.clone().requires_grad_()
    trick = GeneralizedCrossEntropy(q)
    target = tricked(trick)
    (found,) = torch.autograd.grad(CE(logits, target), logits)
    p = LOGITS.softmax(1)[torch.arange(N), LABELS]
    torch.testing.assert_close(found, (LOGITS.softmax(1) - HARD) * p[:, None] ** q / N)
    logged = trick.quantities(target.spec)
    torch.testing.assert_close(logged["generalized_cross_entropy/weight"], (p**q).mean())
    assert torch.autograd.gradcheck(lambda x: CE(x, tricked(trick, mixed=(OTHER, SHARE))), (logits,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("q", QS)
def test_gradients_are_finite_where_p_is_0(q, dtype):
    for width in (10.0, 200.0, 6e4):
        sure = torch.tensor([[width, -width], [-width, width]], dtype=dtype, requires_grad=True)
        for labels in (torch.tensor([0, 0]), torch.tensor([1, 0])):
            loss = CE(sure, tricked(GeneralizedCrossEntropy(q), labels=labels))
            (gradient,) = torch.autograd.grad(loss, sure)
            assert loss.isfinite()
            assert gradient.isfinite().all()
    p = torch.tensor([0.0, 1e-45, 1.0], dtype=torch.float64).log().requires_grad_()
    (gradient,) = torch.autograd.grad(box_cox(p, q).sum(), p)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    logits = LOGITS.to(dtype)
    expected = by_hand(0.7, HARD, logits.double()).mean()
    for loss, given in ((CE, logits), (F.nll_loss, logits.float().log_softmax(1))):
        found = loss(given, tricked(GeneralizedCrossEntropy(0.7)))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CE(logits, tricked(GeneralizedCrossEntropy(0.7)))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_ignored_labels_keep_their_meaning(reduction):
    how = {"weight": WEIGHT, "ignore_index": 2, "reduction": reduction}
    none = WEIGHT[LABELS] * by_hand(0.7, HARD) * (LABELS != 2)
    expected = {"none": none, "sum": none.sum(), "mean": none.sum() / WEIGHT[LABELS[LABELS != 2]].sum()}[reduction]
    torch.testing.assert_close(CE(LOGITS, tricked(GeneralizedCrossEntropy(0.7)), **how), expected)
    torch.testing.assert_close(
        F.nll_loss(LOGITS.log_softmax(1), tricked(GeneralizedCrossEntropy(0.7)), **how), expected
    )


def test_mixed_with_an_ignored_label():
    ignored = OTHER.clone()
    ignored[:3] = -100
    found = CE(LOGITS, tricked(GeneralizedCrossEntropy(0.7), mixed=(ignored, SHARE)), reduction="none")
    known = (ignored != -100)[:, None].double()
    soft = SHARE[:, None] * HARD + (1 - SHARE[:, None]) * F.one_hot(OTHER, K) * known
    torch.testing.assert_close(found, by_hand(0.7, soft))


@pytest.mark.parametrize("order", [1, -1])
def test_with_mixing_smoothing_and_focal_loss(order):
    soft = MIXED * 0.7 + 0.3 / K
    p = (soft * LOGITS.softmax(1)).sum(1)
    tricks = [GeneralizedCrossEntropy(0.6), LabelSmoothing(0.3), FocalLoss(2.0)][::order]
    expected = ((1 - p) ** 2 * by_hand(0.6, soft)).mean()
    for hot in (False, True):
        target = tricked(*tricks, mixed=(OTHER, SHARE))
        found = CE(LOGITS, F.one_hot(target, K).double() if hot else target)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    target = tricked(*tricks[::2], mixed=(OTHER, SHARE))
    found = CE(LOGITS, target, label_smoothing=0.3)  # the module's own
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    alpha = [0.1, 0.2, 0.3, 0.4]
    found = CE(LOGITS, tricked(GeneralizedCrossEntropy(0.6), FocalLoss(0.0, alpha)))
    torch.testing.assert_close(found, (torch.tensor(alpha)[LABELS] * by_hand(0.6, HARD)).mean())


def test_the_divergence_from_a_teacher_is_added():
    found = fit_with(CE, GeneralizedCrossEntropy(0.7), KnowledgeDistillation(teacher(), temperature=2.0), loader=BATCH)
    spy = Spy()
    fit_with(partial(own_distillation, spy=spy), spy, loader=BATCH)
    plain = fit_with(partial(own_distillation, spy=spy), spy, loader=BATCH)
    torch.testing.assert_close(found.weights, plain.weights, rtol=1e-4, atol=1e-6)


BATCH = loader_of(
    [torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 2, 1, 0])]
)


def teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Spy(Trick):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.image = batch[0]


def own_distillation(logits: Tensor, labels: Tensor, spy: Spy) -> Tensor:
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    with torch.no_grad():
        taught = (teacher()(spy.image) / 2).softmax(1)
    divergence = (taught * (taught.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    return ((1 - p**0.7) / 0.7).mean() + 4 * divergence


def test_dense_targets():
    logits = torch.randn(2, K, 3, 3, dtype=torch.float64)
    labels = torch.randint(K, (2, 3, 3))
    labels[0, 0] = 255
    flat = logits.permute(0, 2, 3, 1).reshape(-1, K)[labels.view(-1) != 255]
    expected = by_hand(0.7, F.one_hot(labels[labels != 255], K).double(), flat).mean()
    target = tricked(GeneralizedCrossEntropy(0.7), labels=labels)
    torch.testing.assert_close(CE(logits, target, ignore_index=255), expected)


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
def test_trains_as_a_module_with_the_loss_written_out(namespace):
    def own(x: Tensor, y: Tensor) -> Tensor:
        return ((1 - x.softmax(1)[torch.arange(len(y)), y] ** 0.7) / 0.7).mean()

    found, expected = fit_with(CE, GeneralizedCrossEntropy(), namespace=namespace), fit_with(own, namespace=namespace)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert differences(found.weights, fit_with(CE, namespace=namespace).weights)
    assert 0 < found.logged[0]["generalized_cross_entropy/weight"] < 1


def test_order_has_no_meaning():
    def make() -> list[Any]:
        return [CutMix(alpha=1.0), LabelSmoothing(0.3), GeneralizedCrossEntropy(0.5)]

    assert not differences(fit_with(CE, *make()).weights, fit_with(CE, *make()[::-1]).weights)


@pytest.mark.parametrize("q", [0, -0.1, 1.1, float("nan"), True, "0.7", None])
def test_rejects_arguments(q):
    with pytest.raises(ValueError, match=r"GeneralizedCrossEntropy\(q="):
        GeneralizedCrossEntropy(q)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float()), "loss is binary"),
        (lambda x, y: F.binary_cross_entropy(x.sigmoid(), F.one_hot(y, 3).float()), "loss is binary"),
        (lambda x, y: F.kl_div(x.log_softmax(1), F.one_hot(y, 3).float()), "follow .* through `kl_div`"),
        (lambda x, y: -(F.one_hot(y, 3).float() * x.log_softmax(1)).sum(), "follow .* through `mul`"),
        (lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(), "has no effect"),
    ],
    ids=["BCE of logits", "BCE", "KL", "by hand", "gather"],
)
@pytest.mark.filterwarnings("ignore:reduction")
def test_rejects_losses(loss, message):
    with pytest.raises(RuntimeError, match=rf"^GeneralizedCrossEntropy.*{message}"):
        fit_with(loss, GeneralizedCrossEntropy())


def test_rejects_several_labels():
    several, trick = loader_of([torch.randn(4, 1, 8, 8), torch.randint(2, (4, 3))]), GeneralizedCrossEntropy()
    with pytest.raises(RuntimeError, match=r"GeneralizedCrossEntropy.*loss is binary"):
        fit_with(lambda x, y: F.binary_cross_entropy_with_logits(x, y.float()), trick, loader=several)
    with pytest.raises(RuntimeError, match=r"GeneralizedCrossEntropy.*follow .* through `"):
        fit_with(lambda x, y: -(y.float() * F.logsigmoid(x)).mean(), trick, loader=several)
