"""The numbers of FocalLoss, against the paper's formula and torchvision, and what it means next to other tricks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences
from helpers.losses import fit_with
from torch import Tensor, nn

from lit_tricks.callbacks import FocalLoss, LabelSmoothing, MixUp
from lit_tricks.callbacks.focal_loss import focal_factor
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying

N, K = 6, 4
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LABELS = torch.tensor([0, 3, 1, 2, 2, 3])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
ALPHA = [0.1, 0.2, 0.3, 0.4]
CE = F.cross_entropy


def focal(trick: FocalLoss, labels: Tensor = LABELS, recipe: LossSpec | None = None, *mixed: Tensor) -> SoftTarget:
    return trick.act({}, carrying(labels.clone(), recipe or LossSpec(("FocalLoss",)), *mixed))[1]


def by_hand(gamma: float, alpha: list[float] | None, soft: Tensor) -> Tensor:
    """-sum_c alpha_c q_c log(p_c), times (1 - sum_c q_c p_c)^gamma."""
    p = torch.exp(LOGITS) / torch.exp(LOGITS).sum(1, keepdim=True)
    of_class = torch.ones(K) if alpha is None else torch.tensor(alpha)
    return (1 - (soft * p).sum(1)) ** gamma * -(of_class.double() * soft * p.log()).sum(1)


HARD = F.one_hot(LABELS, K).double()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, ALPHA], ids=["", "alpha"])
def test_formula_of_the_paper(gamma, alpha):
    expected = by_hand(gamma, alpha, HARD)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        loss = CE(LOGITS, focal(FocalLoss(gamma, alpha)), reduction=reduction)
        torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-9)
        loss = F.nll_loss(LOGITS.log_softmax(1), focal(FocalLoss(gamma, alpha)), reduction=reduction)
        torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-9)
        loss = CE(LOGITS, F.one_hot(focal(FocalLoss(gamma, alpha)), K).double(), reduction=reduction)
        torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-9)


def test_two_classes_weighed_by_one_number():
    logits, labels = LOGITS[:, :2], LABELS % 2
    expected = by_hand_two(logits, labels, 0.3)
    torch.testing.assert_close(CE(logits, focal(FocalLoss(2.0, 0.3), labels)), expected, rtol=1e-6, atol=0)


def by_hand_two(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    p = logits.softmax(1)[torch.arange(N), labels]
    return (torch.where(labels == 1, alpha, 1 - alpha) * (1 - p) ** 2 * -p.log()).mean()


@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gamma_0_is_cross_entropy_to_the_bit(reduction, weight, ignore_index):
    how = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    assert torch.equal(CE(LOGITS, focal(FocalLoss(0.0)), **how), CE(LOGITS, LABELS, **how))


def test_weights_and_ignored_labels_keep_their_meaning():
    how = {"weight": WEIGHT, "ignore_index": 2}
    p = LOGITS.softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    none = CE(LOGITS, LABELS, **how, reduction="none") * (1 - p) ** 2
    target = focal(FocalLoss(2.0))
    torch.testing.assert_close(CE(LOGITS, target, **how, reduction="none"), none)
    torch.testing.assert_close(CE(LOGITS, target, **how), none.sum() / WEIGHT[LABELS[LABELS != 2]].sum())
    torch.testing.assert_close(target.spec.mean_factor, ((1 - p[LABELS != 2]) ** 2).mean())
    alpha = CE(LOGITS, focal(FocalLoss(2.0, ALPHA)), **how)
    torch.testing.assert_close(alpha, (none * torch.tensor(ALPHA)[LABELS]).sum() / WEIGHT[LABELS[LABELS != 2]].sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_binary_losses_are_torchvisions(gamma, alpha, reduction):
    from torchvision.ops import sigmoid_focal_loss

    trick = FocalLoss(gamma, alpha)
    expected = sigmoid_focal_loss(LOGITS, HARD, -1 if alpha is None else alpha, gamma, reduction)
    one_hot = F.one_hot(focal(trick), K).double()
    found = [F.binary_cross_entropy_with_logits(LOGITS, one_hot, reduction=reduction)]
    found += [nn.BCEWithLogitsLoss(reduction=reduction)(LOGITS, one_hot)]
    found += [F.binary_cross_entropy(LOGITS.sigmoid(), one_hot, reduction=reduction)]
    for loss in found:
        torch.testing.assert_close(loss, expected)
    column, labels = LOGITS[:, :1], LABELS % 2
    expected = sigmoid_focal_loss(column, labels[:, None].double(), -1 if alpha is None else alpha, gamma, reduction)
    binary = focal(trick, labels).unsqueeze(1).double()
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(column, binary, reduction=reduction), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_right_and_finite(gamma, dtype):
    p = torch.tensor([0.0, 1e-30, 0.5, 1 - 1e-7, 1.0], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(focal_factor(p, gamma).sum(), p)
    assert gradient.isfinite().all()
    sure = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], dtype=dtype, requires_grad=True)
    for loss in (
        CE(sure, focal(FocalLoss(gamma), torch.tensor([0, 0]))),
        F.binary_cross_entropy_with_logits(sure, F.one_hot(focal(FocalLoss(gamma), torch.tensor([0, 0])), 2).to(dtype)),
    ):
        (gradient,) = torch.autograd.grad(loss, sure)
        assert gradient.isfinite().all()
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: CE(x, focal(FocalLoss(gamma))), (logits,))


@pytest.mark.parametrize("order", [1, -1])
def test_beside_mixing_and_smoothing_it_modulates_the_loss_of_the_distribution(order):
    other, share = LABELS.roll(1), torch.linspace(0, 1, N, dtype=torch.float64)
    soft = share[:, None] * HARD + (1 - share[:, None]) * F.one_hot(other, K)
    soft = soft * 0.7 + 0.3 / K
    target = carrying(LABELS.clone(), LossSpec(("FocalLoss", "LabelSmoothing")), other, share)
    for trick in [FocalLoss(2.0, ALPHA), LabelSmoothing(0.3)][::order]:
        _, target = trick.act({}, target)
    torch.testing.assert_close(CE(LOGITS, target), by_hand(2.0, ALPHA, soft).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        CE(LOGITS, F.one_hot(target, K).double()), by_hand(2.0, ALPHA, soft).mean(), rtol=1e-6, atol=0
    )


def test_dense_targets_get_loss_of_each_pixel():
    logits = torch.randn(2, K, 3, 3, dtype=torch.float64)
    labels = torch.randint(K, (2, 3, 3))
    labels[0, 0] = 255
    flat = logits.permute(0, 2, 3, 1).reshape(-1, K)[labels.view(-1) != 255]
    known = labels[labels != 255]
    p = flat.softmax(1)[torch.arange(len(known)), known]
    loss = CE(logits, focal(FocalLoss(2.0, ALPHA), labels), ignore_index=255)
    torch.testing.assert_close(loss, (torch.tensor(ALPHA)[known] * (1 - p) ** 2 * -p.log()).mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"alpha": 1.5}, r"alpha=1.5"),
        ({"alpha": 0}, r"alpha=0"),
        ({"alpha": []}, r"alpha=\[\]"),
        ({"alpha": [0.5, 0.0]}, r"alpha=\[0.5, 0.0\]"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        FocalLoss(**arguments)


@pytest.mark.parametrize(
    ("alpha", "loss", "message"),
    [
        (0.25, CE, "alpha is 0.25, which weighs one of two classes, and the loss has 3 classes: give a list of 3"),
        ([0.1] * 4, CE, "alpha is a list of 4, and the loss has 3 classes"),
        (
            [0.1] * 3,
            lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float()),
            "alpha is a list, and the loss is binary",
        ),
        (None, lambda x, y: F.kl_div(x.log_softmax(1), F.one_hot(y, 3).float()), "follow .* through `kl_div`"),
        (None, lambda x, y: -(F.one_hot(y, 3).float() * x.log_softmax(1)).sum(), "follow .* through `mul`"),
        (None, lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(), "has no effect"),
    ],
    ids=["one number", "length", "binary", "KL", "by hand", "gather"],
)
@pytest.mark.filterwarnings("ignore:reduction")
def test_losses_that_do_not_fit_are_rejected(alpha, loss, message):
    with pytest.raises(RuntimeError, match=rf"^FocalLoss.*{message}"):
        fit_with(loss, FocalLoss(2.0, alpha))


def test_trains_as_a_module_with_the_loss_written_out():
    def own(x: Tensor, y: Tensor) -> Tensor:
        ce = CE(x, y, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()

    found, expected = fit_with(CE, FocalLoss()), fit_with(own)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert differences(found.weights, fit_with(CE).weights)
    assert 0 < found.logged[0]["focal_loss/factor"] < 1
    assert fit_with(CE, FocalLoss(gamma=0.0)).logged[0]["focal_loss/factor"] == 1


def test_order_has_no_meaning():
    def make() -> list[Any]:
        return [MixUp(alpha=1.0), LabelSmoothing(0.3), FocalLoss(2.0, [0.2, 0.3, 0.5])]

    first, second = fit_with(CE, *make()), fit_with(CE, *make()[::-1])
    assert not differences(first.weights, second.weights)


@pytest.mark.parametrize("alpha", [None, ALPHA], ids=["", "alpha"])
def test_changing_batches_compile_once(alpha):
    compilations = []  # the batch of each

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        compilations.append(i)
        return graph.forward

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return CE(x, y)

    torch._dynamo.reset()
    compiled, trick = torch.compile(loss, backend=counting), FocalLoss(2.0, alpha)
    for i in range(1, 6):
        target = focal(trick, LABELS.roll(i))
        x = LOGITS.clone().requires_grad_()
        torch.testing.assert_close(compiled(x, target), loss(x, focal(trick, LABELS.roll(i))))
        assert target.spec.used
        assert 0 < target.spec.mean_factor < 1
    assert set(compilations) <= {1}
    assert len(compilations) == 1 or torch.__version__ < "2.15"  # there it is not compiled at all
