"""Test the numbers of LogitAdjustment against the paper's formula in float64, also together with other tricks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.counted import COUNTS, LABELS, LOGITS, WEIGHT, K, N, under
from helpers.fits import differences, make_trainer, run
from helpers.losses import fit_with
from helpers.modules import module_class
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks.callbacks import ClassBalanced, FocalLoss, KnowledgeDistillation, LabelSmoothing, LogitAdjustment, MixUp
from lit_tricks.callbacks.knowledge_distillation import distillation_divergence

CE = F.cross_entropy
PRIOR = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)


def adjusted(tau: float = 1.0, **kwargs: object) -> LogitAdjustment:
    return LogitAdjustment(tau, COUNTS, **kwargs)


def by_hand(tau: float, labels: Tensor = LABELS) -> Tensor:
    """Equation 10 of the paper: log(1 + sum over y' != y of (prior_y' / prior_y)^tau exp(z_y' - z_y))."""
    losses = []
    for z, y in zip(LOGITS, labels.tolist(), strict=True):
        others = sum((PRIOR[k] / PRIOR[y]) ** tau * torch.exp(z[k] - z[y]) for k in range(K) if k != y)
        losses.append(torch.log(1 + others))
    return torch.stack(losses)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_formula_of_the_paper(tau):
    expected = by_hand(tau)
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.mean())):
        found = {
            "functional": CE(LOGITS, under(adjusted(tau)), reduction=reduction),
            "criterion": nn.CrossEntropyLoss(reduction=reduction)(LOGITS, under(adjusted(tau))),
            "log likelihood": F.nll_loss(LOGITS.log_softmax(1), under(adjusted(tau)), reduction=reduction),
            "soft": CE(LOGITS, F.one_hot(under(adjusted(tau)), K).double(), reduction=reduction),
        }
        for name, loss in found.items():
            torch.testing.assert_close(loss, value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_tau_0_is_cross_entropy_to_the_bit():
    for reduction in ("mean", "sum", "none"):
        how = {"weight": WEIGHT, "ignore_index": 2, "reduction": reduction}
        assert torch.equal(CE(LOGITS, under(adjusted(0)), **how), CE(LOGITS, LABELS, **how))


@pytest.mark.parametrize("order", [1, -1])
def test_with_other_tricks_it_shifts_the_logits_of_their_loss(order):
    other, share = LABELS.roll(1), torch.linspace(0, 1, N, dtype=torch.float64)
    soft = share[:, None] * F.one_hot(LABELS, K) + (1 - share[:, None]) * F.one_hot(other, K)
    soft = soft * 0.7 + 0.3 / K
    p = (LOGITS + PRIOR.log()).softmax(1)
    expected = (1 - (soft * p).sum(1)) ** 2 * -(soft * p.log()).sum(1)
    tricks = [adjusted(), FocalLoss(2.0), LabelSmoothing(0.3)][::order]
    target = under(*tricks, mixed=(other, share))
    torch.testing.assert_close(CE(LOGITS, target), expected.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_ignored_labels_of_the_module_keep_their_meaning(reduction):
    how = {"weight": WEIGHT, "ignore_index": 2, "reduction": reduction}
    expected = CE(LOGITS + PRIOR.log(), LABELS, **how)
    torch.testing.assert_close(CE(LOGITS, under(adjusted()), **how), expected, rtol=1e-6, atol=1e-6)


def test_dense_targets():
    logits, labels = torch.randn(2, K, 3, 3, dtype=torch.float64), torch.randint(K, (2, 3, 3))
    labels[0, 0] = 255
    expected = CE(logits + PRIOR.log().view(K, 1, 1), labels, ignore_index=255)
    torch.testing.assert_close(
        CE(logits, under(adjusted(), labels=labels), ignore_index=255), expected, rtol=1e-6, atol=0
    )


def test_a_teacher_is_compared_with_the_logits_of_evaluation():
    teacher = nn.Linear(5, K).double()
    inputs = torch.randn(N, 5, dtype=torch.float64)
    tricks = [adjusted(), KnowledgeDistillation(teacher, temperature=3.0)]
    target = under(adjusted())
    tricks[1]._trainer, tricks[1]._teacher = make_trainer(), teacher
    _, target = tricks[1].act({(0,): inputs}, target)
    taught = distillation_divergence(LOGITS, teacher(inputs), 3.0).mean()
    torch.testing.assert_close(CE(LOGITS, target), by_hand(1.0).mean() + taught, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gets_a_loss_in_float32(dtype):
    loss = CE(LOGITS.to(dtype), under(adjusted()))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_hand(1.0).mean().float(), rtol=0.02, atol=0.02)


def test_the_balanced_optimum():
    """Two classes of 90 and 10 % whose densities are equal: the network's own logits must not prefer the frequent."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)
    for trick, expected in ((LogitAdjustment(1.0, [90, 10]), 0.0), (LogitAdjustment(0.0, [90, 10]), 2.1972)):

        def closure(trick=trick):
            optimizer.zero_grad()
            loss = CE(logits.expand(100, 2), under(trick, labels=labels))
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        assert float(logits.detach()[0] - logits.detach()[1]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float()), "the loss is binary"),
        (lambda x, y: -(F.one_hot(y, 3).float() * x.log_softmax(1)).sum(), "follow .* through `mul`"),
        (lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(), "has no effect"),
    ],
)
@pytest.mark.parametrize("trick", [LogitAdjustment, ClassBalanced])
def test_rejects_losses(trick, loss, message):
    with pytest.raises(RuntimeError, match=rf"^{trick.__name__}.*{message}"):
        fit_with(loss, trick(counts=[3, 2, 1]))


@pytest.mark.parametrize("trick", [LogitAdjustment, ClassBalanced])
def test_rejects_several_labels_per_item(trick):
    hot = torch.randint(2, (8, 3)).float()
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), hot), batch_size=4)
    with pytest.raises(RuntimeError, match=rf"^{trick.__name__} is made for a softmax .*leave it out"):
        fit_with(F.binary_cross_entropy_with_logits, trick(counts=[3, 2, 1]), loader=loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -1.0}, "tau=-1.0"),
        ({"counts": [1, 0]}, r"counts=\[1, 0\]"),
        ({"counts": []}, r"counts=\[\]"),
        ({"counts": [1.5]}, r"counts=\[1.5\]"),
    ],
)
def test_rejects_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogitAdjustment(**arguments)


def test_both_corrections_together_are_an_error():
    with pytest.raises(RuntimeError, match="ClassBalanced and LogitAdjustment both correct"):
        run(LogitAdjustment(), ClassBalanced())


def test_trains_as_a_module_with_the_shift_written_out():
    shift = torch.log(torch.tensor([5.0, 7.0, 4.0]) / 16)  # of the classes of the contract's 16 images
    found = fit_with(CE, LogitAdjustment())
    counts = found.trainer.train_dataloader.dataset.tensors[1].bincount().tolist()
    shift = torch.log(torch.tensor(counts) / 16)
    expected = fit_with(lambda x, y: CE(x + shift, y))
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-6)
    assert differences(found.weights, fit_with(CE).weights)


def test_validation_gets_no_shift():
    losses = []

    class Module(module_class("lightning")):
        def validation_step(self, batch, batch_idx):
            image, label = batch
            losses.append((float(self.loss(batch)), float(CE(self(image), label))))

    torch.manual_seed(0)
    trainer = make_trainer(LogitAdjustment(counts=[100, 10, 1]), max_epochs=1)
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3), batch_size=4)
    trainer.fit(Module(), loader, loader)
    assert losses
    assert all(found == expected for found, expected in losses)


def test_order_has_no_meaning():
    def make():
        return [MixUp(alpha=1.0), LabelSmoothing(0.3), FocalLoss(2.0), LogitAdjustment()]

    assert not differences(fit_with(CE, *make()).weights, fit_with(CE, *make()[::-1]).weights)


def test_counts_stand_in_the_line_at_the_start():
    trick = LogitAdjustment(tau=2.0, counts=[100, 10, 1])
    run(trick, max_epochs=1)
    line = trick.effect
    assert "2 x log frequency" in line
    assert "9.21" in line  # 2 log(100)
    assert "1 to 100 images per class" in line
