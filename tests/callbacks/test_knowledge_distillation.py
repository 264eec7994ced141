"""The numbers of KnowledgeDistillation against the papers' formulas, its teachers, and what it leaves unchanged."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.cli import FIT, built, done, metrics, workplace
from helpers.fits import differences, log_lines, make_trainer, result, run
from helpers.losses import fit_with, loader_of
from helpers.modules import eval_loader, module_class, network, train_loader
from helpers.tricks import teacher as small_teacher
from torch import Tensor, nn

from lit_tricks import Classifier
from lit_tricks.callbacks import FocalLoss, KnowledgeDistillation, LabelSmoothing, MixUp
from lit_tricks.callbacks.knowledge_distillation import dist_divergence, distillation_divergence
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying
from lit_tricks.callbacks.soft_targets.teacher import Renormalized

N, K, T = 6, 4, 3.0
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, TAUGHT = (2 * torch.randn(2, N, K, generator=GENERATOR, dtype=torch.float64)).unbind()
LABELS = torch.tensor([0, 3, 1, 2, 2, 3])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
CE = F.cross_entropy


class Fixed(nn.Module):
    """A teacher that gives these logits, whatever it sees."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Any:
        return self.logits


def taught(
    trick: KnowledgeDistillation, labels: Tensor = LABELS, logits: Tensor = TAUGHT, target: SoftTarget | None = None
) -> SoftTarget:
    """A target after the trick acted on it."""
    trick._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext))
    trick._teacher = Fixed(logits)
    target = carrying(labels.clone(), LossSpec(("KnowledgeDistillation",))) if target is None else target
    return trick.act({(0,): torch.zeros(len(labels), 1, 8, 8)}, target)[1]


def kd(**arguments: Any) -> KnowledgeDistillation:
    return KnowledgeDistillation(nn.Identity(), **({"temperature": T} | arguments))


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


def by_hand(loss: str = "kl", t: float = T, logits: Tensor = LOGITS, teacher: Tensor = TAUGHT) -> Tensor:
    """T^2 L(softmax(r / T), softmax(z / T)) of each row."""
    p, q = softmax(teacher / t), softmax(logits / t)
    return t**2 * (p * ((p.log() if loss == "kl" else 0) - q.log())).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("t", [0.5, 1.0, 4.0, 20.0])
def test_loss_of_the_paper(t, loss):
    torch.testing.assert_close(
        distillation_divergence(LOGITS, TAUGHT, t, loss), by_hand(loss, t), rtol=1e-12, atol=1e-12
    )
    total = CE(LOGITS, taught(kd(temperature=t, loss=loss)))
    expected = -softmax(LOGITS)[range(N), LABELS].log().mean() + by_hand(loss, t).mean()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("alpha", [None, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.0, 20.0])
def test_gradient_is_the_one_by_hand(t, alpha, loss):
    logits = LOGITS.clone().requires_grad_()
    total = CE(logits, taught(kd(temperature=t, alpha=alpha, loss=loss)))
    (gradient,) = torch.autograd.grad(total, logits)
    of_labels = softmax(LOGITS) - F.one_hot(LABELS, K)
    of_teacher = t * (softmax(LOGITS / t) - softmax(TAUGHT / t))
    a, b = (1, 1) if alpha is None else (1 - alpha, alpha)
    torch.testing.assert_close(gradient, (a * of_labels + b * of_teacher) / N, rtol=1e-10, atol=1e-12)


def test_gluoncv_is_alpha_one_half():
    """Its hard_weight of 0.5: half the paper's gradient, cross entropy in both terms."""
    hard_weight = 0.5
    expected = (1 - hard_weight) * by_hand("ce", 20.0).mean() + hard_weight * CE(LOGITS, LABELS)
    torch.testing.assert_close(CE(LOGITS, taught(kd(temperature=20.0, alpha=0.5, loss="ce"))), expected)


def test_student_that_agrees_has_no_divergence():
    assert distillation_divergence(TAUGHT + 5, TAUGHT, T).abs().max() < 1e-12
    sure = torch.tensor([[0.0, -1e4]])
    assert distillation_divergence(sure, sure, 1.0).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    low, low_teacher = LOGITS.to(dtype), TAUGHT.to(dtype)
    found = distillation_divergence(low, low_teacher, 20.0)
    assert found.dtype == torch.float32
    expected = by_hand("kl", 20.0, low.double(), low_teacher.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What a module's loss may ask for


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_weights_smoothing_and_ignored_labels_are_of_the_labels_loss(reduction, weight, smoothing, ignore_index):
    how = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
    known = LABELS.ne(ignore_index)
    each = by_hand() * known
    extra = {"none": each, "sum": each.sum(), "mean": each.sum() / known.sum()}[reduction]
    target = taught(kd(alpha=0.3))
    torch.testing.assert_close(CE(LOGITS, target, **how), 0.7 * CE(LOGITS, LABELS, **how) + 0.3 * extra)
    torch.testing.assert_close(target.spec.mean_divergence, each.sum() / known.sum())
    if not smoothing:
        how.pop("label_smoothing")
        found = F.nll_loss(LOGITS.log_softmax(1), taught(kd()), **how)
        torch.testing.assert_close(found, CE(LOGITS, LABELS, **how) + extra)


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 1, 3, 3)])
def test_dense_targets_get_loss_of_each_pixel(shape):
    logits, teacher = torch.randn(2, 2, K, 3, 3, generator=GENERATOR, dtype=torch.float64).unbind()
    labels = torch.randint(K, shape, generator=GENERATOR)
    labels[0, ..., 0, :] = 255
    flat = labels.view(2, 3, 3)
    log_p, log_q = (z.div(T).log_softmax(1) for z in (teacher, logits))
    each = T**2 * (log_p.exp() * (log_p - log_q)).sum(1)
    expected = CE(logits, flat, ignore_index=255) + each[flat != 255].mean()
    target = taught(kd(), labels, teacher)
    torch.testing.assert_close(CE(logits, target.view(2, 3, 3), ignore_index=255), expected)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, K)
    torch.testing.assert_close(CE(rows, target.flatten(), ignore_index=255), expected)
    chosen = flat.view(-1) != 255
    torch.testing.assert_close(CE(rows[chosen], target.flatten()[chosen]), expected)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "long": lambda z, y: CE(z, y.long().view(-1)),
    "column": lambda z, y: CE(z, y.unsqueeze(1).squeeze(1)),
    "float": lambda z, y: CE(z, y.float().long()),
    "permuted": lambda z, y: CE(z.flip(0), y.flip(0)),
    "halves": lambda z, y: (CE(z[:2], y[:2], reduction="sum") + CE(z[2:], y[2:], reduction="sum")) / N,
    "single": lambda z, y: torch.stack([CE(z[i], y[i]) for i in range(N)]).mean(),
    "joined": lambda z, y: CE(torch.cat([z, z]), torch.cat([y, y])),
    "one-hot": lambda z, y: CE(z, F.one_hot(y, K).double()),
    "one-hot, dense": lambda z, y: CE(z.T[None], F.one_hot(y, K).view(1, N, K).permute(0, 2, 1).double()),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_keep_their_teacher_on_the_way(way):
    expected = CE(LOGITS, LABELS) + by_hand().mean()
    torch.testing.assert_close(WAYS[way](LOGITS, taught(kd())), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_on_top_of_mixing_smoothing_and_focal_loss_in_any_order(order):
    """In a fit the teacher sees the mixed images; here its logits are given."""
    other, share = LABELS.roll(1), torch.linspace(0, 1, N, dtype=torch.float64)
    soft = share[:, None] * F.one_hot(LABELS, K) + (1 - share[:, None]) * F.one_hot(other, K)
    soft = soft * 0.7 + 0.3 / K
    p = softmax(LOGITS)
    of_labels = (1 - (soft * p).sum(1)) ** 2 * -(soft * p.log()).sum(1)
    target = carrying(LABELS.clone(), LossSpec(("FocalLoss", "KnowledgeDistillation")), other, share)
    for i in order:
        if i == 0:
            target = taught(kd(), target=target)
        else:
            target = (LabelSmoothing(0.3), FocalLoss(2.0))[i - 1].act({}, target)[1]
    expected = (of_labels + by_hand()).mean()
    torch.testing.assert_close(CE(LOGITS, target), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(CE(LOGITS, F.one_hot(target, K).double()), expected, rtol=1e-6, atol=0)


def test_an_ignored_label_of_a_mixture_is_not_taught():
    other, share = torch.full_like(LABELS, 255), torch.linspace(0.6, 1, N, dtype=torch.float64)
    target = taught(kd(), target=carrying(LABELS.clone(), LossSpec(("KnowledgeDistillation",)), other, share))
    each = share * (-softmax(LOGITS)[range(N), LABELS].log() + by_hand())
    torch.testing.assert_close(CE(LOGITS, target, ignore_index=255), each.sum() / share.sum())


# ---------------------------------------------------------------------------------------------------------------------
# DIST


def correlations(q: Tensor, p: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of two matrices."""
    return torch.tensor([np.corrcoef(*pair)[0, 1] for pair in zip(q.numpy(), p.numpy(), strict=True)])


def dist_by_hand(t: float, beta: float, gamma: float, logits: Tensor = LOGITS, teacher: Tensor = TAUGHT) -> Tensor:
    q, p = softmax(logits / t), softmax(teacher / t)
    return t**2 * (beta * (1 - correlations(q, p).mean()) + gamma * (1 - correlations(q.T, p.T).mean()))


@pytest.mark.parametrize(("t", "beta", "gamma"), [(1.0, 2.0, 2.0), (4.0, 1.0, 0.5), (1.0, 0.0, 1.0), (20.0, 1.0, 0.0)])
def test_dist_of_the_paper(t, beta, gamma):
    """The published code adds 1e-8 to each divisor, and so does ours."""
    found = dist_divergence(LOGITS, TAUGHT, t, beta, gamma).mean()
    torch.testing.assert_close(found, dist_by_hand(t, beta, gamma), rtol=1e-5, atol=1e-6 * t**2)
    trick = kd(loss="dist", temperature=t, beta=beta, gamma=gamma, alpha=0.25)
    torch.testing.assert_close(CE(LOGITS, taught(trick)), 0.75 * CE(LOGITS, LABELS) + 0.25 * found)


def test_dist_equals_numbers_of_the_published_code():
    """The numbers are from DIST(beta, gamma, tau) of hunto/image_classification_sota, lib/models/losses/dist_kd.py."""
    x = torch.arange(12.0, dtype=torch.float64).view(3, 4)
    published = {(1, 1, 1): 1.9430850495775507, (2, 2, 1): 3.8861700991551014, (1, 0.5, 4): 21.424275568182725}
    for (beta, gamma, tau), expected in published.items():
        found = dist_divergence(3 * x.sin(), 3 * x.cos(), tau, beta, gamma).mean().item()
        assert found == pytest.approx(expected, rel=1e-12)


def test_defaults_of_dist_are_the_papers():
    expected = dist_divergence(LOGITS, TAUGHT, 1.0, 2.0, 2.0).mean() + CE(LOGITS, LABELS)
    assert CE(LOGITS, taught(kd(loss="dist", temperature=None))) == expected
    assert CE(LOGITS, taught(kd(temperature=None))) == CE(LOGITS, taught(kd(temperature=20.0)))


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_constant_rows_and_columns_have_no_relation_and_no_gradient(of):
    logits, teacher = LOGITS.float(), TAUGHT.float()
    changed = logits if of == "student" else teacher
    changed[1] = 3.7
    logits.requires_grad_()
    rows = dist_divergence(logits, teacher, gamma=0.0)
    (gradient,) = torch.autograd.grad(rows.sum(), logits)
    assert rows[1] == 2
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0
    changed.data[:] = changed.data[:1]  # all columns are constant
    columns = dist_divergence(logits, teacher, beta=0.0)
    (gradient,) = torch.autograd.grad(columns.sum(), logits)
    assert columns.tolist() == [2.0] * N
    assert gradient.abs().max() == 0


def test_dist_of_a_single_image_has_relations_between_classes_only():
    logits = LOGITS[:1].clone().requires_grad_()
    found, between_classes = (dist_divergence(logits, TAUGHT[:1], gamma=gamma) for gamma in (2.0, 0.0))
    torch.testing.assert_close(found, between_classes + 2)
    expected = torch.autograd.grad(between_classes.sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logits), expected)
    single = loader_of([torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)])
    with pytest.warns(UserWarning, match="the first batch has one image"):
        fit_with(CE, KnowledgeDistillation(small_teacher(), loss="dist"), loader=single, max_steps=1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dist_leaves_out_ignored_images(reduction):
    trick, known = kd(loss="dist", temperature=1.0), LABELS.ne(2)
    found = CE(LOGITS, taught(trick), ignore_index=2, reduction=reduction)
    found = found[known] if reduction == "none" else found
    torch.testing.assert_close(found, CE(LOGITS[known], taught(trick)[known], reduction=reduction))
    relations = dist_by_hand(1, 2, 2, LOGITS[known], TAUGHT[known])
    count = {"mean": 1, "sum": known.sum(), "none": known.sum()}[reduction]
    expected = CE(LOGITS[known], LABELS[known], reduction="mean") + relations
    torch.testing.assert_close(found.sum(), expected * count, rtol=1e-5, atol=0)


def test_dist_of_pixels_is_dist_of_their_rows():
    logits, teacher = torch.randn(2, 2, K, 3, 3, generator=GENERATOR, dtype=torch.float64).unbind()
    labels = torch.randint(K, (2, 3, 3), generator=GENERATOR)
    labels[0, 0] = 255
    rows, of_teacher = (z.permute(0, 2, 3, 1).reshape(-1, K)[labels.flatten() != 255] for z in (logits, teacher))
    found = CE(logits, taught(kd(loss="dist", temperature=1.0), labels, teacher), ignore_index=255)
    expected = CE(logits, labels, ignore_index=255) + dist_by_hand(1, 2, 2, rows, of_teacher)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dist_of_low_precision_is_computed_in_float32(dtype):
    low, low_teacher = LOGITS.to(dtype), TAUGHT.to(dtype)
    with torch.autocast("cpu", dtype):
        found = dist_divergence(low, low_teacher)
    assert found.dtype == torch.float32
    expected = dist_divergence(low.double(), low_teacher.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_dist_in_a_fit_with_mixing_and_accumulation():
    trick = KnowledgeDistillation(small_teacher(), loss="dist", gamma=0.5)
    found = fit_with(CE, trick, MixUp(alpha=1.0), accumulate_grad_batches=2)
    assert "1 x loss + 2 x inter-class + 0.5 x intra-class relations of DIST from Sequential" in trick.effect
    assert all(0 < row["knowledge_distillation/loss"] < 5 for row in found.logged.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 1.0}, r"beta=1.0.*loss='dist'"),
        ({"loss": "dist", "beta": 0.0, "gamma": 0.0}, r"beta=0.0, gamma=0.0.*no weight"),
        ({"loss": "dist", "gamma": -1.0}, r"gamma=-1.0"),
    ],
)
def test_weights_of_dist_that_have_no_meaning(arguments, message):
    with pytest.raises(ValueError, match=message):
        kd(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Normalization


def test_images_are_normalised_for_the_teacher():
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
    was = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    given = torch.stack([(images[:, c] - was[0][c]) / was[1][c] for c in range(3)], 1)
    plain, other = Renormalized(nn.Identity(), mean, std), Renormalized(nn.Identity(), mean, std, *was)
    for found in (plain.double()(images), other.double()(given)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    bytes_ = (images * 255).round().to(torch.uint8)
    torch.testing.assert_close(plain(bytes_), expected, rtol=0, atol=0.02)


def test_teacher_sees_them_so():
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_teacher()

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return self.net(images)

    how = {"mean": [0.5], "std": [0.25], "input_mean": [0.1], "input_std": [2.0]}
    image, label = torch.full((4, 1, 8, 8), 0.3), torch.zeros(4, dtype=torch.long)
    fit_with(CE, KnowledgeDistillation(Watching(), **how), loader=loader_of([image, label]))
    torch.testing.assert_close(seen[0], torch.full((4, 1, 8, 8), (0.3 * 2 + 0.1 - 0.5) / 0.25))
    with pytest.raises(RuntimeError, match="KnowledgeDistillation: mean has 3 numbers"):
        fit_with(CE, KnowledgeDistillation(Watching(), mean=[0.5] * 3, std=[0.5] * 3))


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


class WithTeacher(module_class("lightning")):
    """A module that distils by itself."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.tutor = [small_teacher().eval()]

    def loss(self, batch: Any) -> Tensor:
        image, label = batch
        z = self(image)
        with torch.no_grad():
            r = self.tutor[0](image)
        kl = F.kl_div((z / 4).log_softmax(1), (r / 4).log_softmax(1), log_target=True, reduction="batchmean")
        return CE(z, label) + 16 * kl


def test_trains_as_a_module_that_distils_itself():
    module = WithTeacher()
    trainer = make_trainer()
    torch.manual_seed(0)
    trainer.fit(module, train_loader(), eval_loader())
    found = run(KnowledgeDistillation(small_teacher(), temperature=4.0))
    torch.testing.assert_close(found.weights, result(trainer).weights, rtol=1e-5, atol=1e-6)
    assert differences(found.weights, run().weights)


@pytest.mark.parametrize("order", [1, -1])
def test_teacher_sees_the_mixed_images(order):
    seen, inputs = [], []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_teacher()

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.clone())
            return self.net(images)

    module = module_class("lightning")(quiet=True)
    module.net.register_forward_pre_hook(lambda net, args: inputs.append(args[0].clone()) if net.training else None)
    tricks = [MixUp(alpha=1.0), KnowledgeDistillation(Watching())][::order]
    make_trainer(*tricks, max_epochs=1).fit(module, train_loader(), eval_loader())
    assert len(seen) == len(inputs) == 4
    assert not differences(seen, inputs)


def test_teacher_stays_as_it_was_and_the_checkpoint_as_large(tmp_path):
    sizes, keys = [], []
    teacher = small_teacher().train()
    before = deepcopy(dict(teacher.state_dict()))
    for tricks in ([], [KnowledgeDistillation(teacher)]):
        done = run(*tricks, max_epochs=1)
        path = tmp_path / f"{len(tricks)}.ckpt"
        done.trainer.save_checkpoint(path, weights_only=False)
        saved = torch.load(path, weights_only=True)
        sizes.append(path.stat().st_size)
        keys.append([list(saved["state_dict"]), len(saved["optimizer_states"][0]["state"]), saved["callbacks"]])
    assert keys[0] == keys[1]
    assert abs(sizes[1] - sizes[0]) < 200
    assert not differences(dict(teacher.state_dict()), before)
    assert all(part.training for part in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert tricks[0]._teacher is None


def test_teacher_at_work_is_frozen_and_in_evaluation_mode():
    seen: list[Any] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_teacher()

        def forward(self, images: Tensor) -> Tensor:
            statistics = self.net[0][1].running_mean.clone()
            logits = self.net(images)
            seen.append((self.training, torch.is_grad_enabled(), logits.requires_grad, logits.dtype, statistics))
            return logits

    run(KnowledgeDistillation(Watched().train()), precision="bf16-mixed", max_epochs=1)
    assert {s[:4] for s in seen} == {(False, False, False, torch.bfloat16)}
    assert not differences([s[4] for s in seen], [small_teacher()[0][1].running_mean] * 4)
    seen.clear()
    run(KnowledgeDistillation(Watched()), precision="64-true", max_epochs=1)
    assert {s[3] for s in seen} == {torch.float64}


def test_teacher_by_name_leaves_the_random_state(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=3, in_chans=1))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trick = KnowledgeDistillation("test_resnet.r160_in1k")
    trick.setup(None, None, "fit")
    assert torch.equal(torch.rand(2), expected)
    assert type(trick._teacher).__name__ == "ResNet"
    assert not any(p.requires_grad for p in trick._teacher.parameters())


def test_checkpoint_of_a_classifier_teaches(tmp_path):
    args = {"depth": 18, "width": 0.03125, "small_input": True}
    trained = Classifier("resnet", 3, args, input_size=(1, 8, 8))
    trainer = make_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(trained, train_loader(), eval_loader())
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    by_file = fit_with(CE, KnowledgeDistillation(str(tmp_path / "teacher.ckpt")))
    by_module = fit_with(CE, KnowledgeDistillation(trained))
    assert not differences(by_file.weights, by_module.weights)
    assert differences(by_file.weights, fit_with(CE).weights)


def test_channels_last_and_compiled(monkeypatch):
    expected = fit_with(CE, KnowledgeDistillation(small_teacher())).weights
    compiled = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or compile_(net, backend="eager"))
    found = fit_with(CE, KnowledgeDistillation(small_teacher(), channels_last=True, compiled=True))
    torch.testing.assert_close(found.weights, expected, rtol=1e-4, atol=1e-5)
    [net] = compiled
    assert net[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_says_and_logs_what_it_does():
    with log_lines() as records:
        found = fit_with(CE, KnowledgeDistillation(small_teacher(), temperature=4.0, alpha=0.25))
    assert records[0].getMessage() == (
        "KnowledgeDistillation: 0.75 x loss + 4 x KL from Sequential, 99 parameters, at temperature 4"
    )
    assert all(row["knowledge_distillation/loss"] > 0 for row in found.logged.values())


def test_changing_batches_compile_once():
    compilations = []  # the batch of each

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        compilations.append(i)
        return graph.forward

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return CE(x, y)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counting)
    for i in range(1, 6):
        x, teacher = LOGITS.clone().requires_grad_(), TAUGHT.roll(i, 0)
        target = taught(kd(), LABELS.roll(i), teacher)
        torch.testing.assert_close(compiled(x, target), CE(x, LABELS.roll(i)) + by_hand(teacher=teacher).mean())
        torch.testing.assert_close(target.spec.mean_divergence, by_hand(teacher=teacher).mean())
    assert set(compilations) <= {1}
    assert len(compilations) == 1 or torch.__version__ < "2.15"  # there it is not compiled at all


def test_in_yaml_a_teacher_is_a_class_a_file_or_a_name(tmp_path, monkeypatch):
    with workplace(tmp_path):
        Path("kd.yaml").write_text(
            """
            trainer:
              callbacks+:
                - class_path: KnowledgeDistillation
                  init_args:
                    temperature: 4
                    teacher:
                      class_path: lit_tricks.Classifier
                      init_args:
                        model_args: {depth: 18, width: 0.0625, small_input: true}
                        num_classes: 10
                        input_size: [1, 8, 8]
            """
        )
        done(*FIT, "--config=kd.yaml")
        assert float(metrics("runs/tiny/v0")[0]["knowledge_distillation/loss"]) > 0
        for name in ("resnet152d.gluon_in1k", "runs/last.ckpt"):
            words = ("--trainer.callbacks+=KnowledgeDistillation", f"--trainer.callbacks.teacher={name}")
            [trick] = [c for c in built(monkeypatch, *FIT, *words).trainer.callbacks if hasattr(c, "teacher")]
            assert trick.teacher == name


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": None}, "teacher=None"),
        ({"teacher": ""}, "teacher=''"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha": 0.0}, r"alpha=0.0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"mean": [0.5]}, r"mean=\[0.5\], std=None"),
        ({"mean": [0.5], "std": [0.0]}, r"std=\[0.0\]"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, r"std=\[0.5, 0.5\]"),
        ({"input_mean": [0.5], "input_std": [1.0]}, r"input_mean=\[0.5\], mean=None"),
        (
            {"mean": [0.0] * 3, "std": [1.0] * 3, "input_mean": [0.5], "input_std": [1.0]},
            r"input_mean=\[0.5\], mean=\[0.0, 0.0",
        ),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillation(**({"teacher": "resnet18"} | arguments))


def fit(*tricks: Any, module: Any = None) -> None:
    make_trainer(*tricks, max_epochs=1).fit(module or module_class("lightning")(), train_loader(), eval_loader())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            lambda: nn.Sequential(small_teacher(), nn.Linear(3, 5)),
            "has 5 classes, and the loss of the student 3",
        ),
        (lambda: nn.Conv2d(3, 3, 3), r"Conv2d, fails on the images .*float32 \(4, 1, 8, 8\): .*wrap it in a module"),
        (lambda: nn.Conv2d(1, 3, 3), r"Conv2d, returns logits of shape \(4, 3, 6, 6\) for labels of shape \(4,\)"),
        (lambda: Fixed({"out": torch.zeros(4, 3)}), r"Fixed, returns dict\(out: float32 \(4, 3\)\), and no logits"),
        (lambda: Fixed(torch.zeros(4)), r"Fixed, returns float32 \(4,\), and no logits"),
    ],
    ids=["classes", "channels", "dense", "dict", "vector"],
)
def test_rejects_teachers_that_do_not_fit(teacher, message):
    with pytest.raises(RuntimeError, match=rf"^KnowledgeDistillation: the teacher.* {message}"):
        fit(KnowledgeDistillation(teacher()))


def test_takes_the_logits_of_an_output_that_has_some():
    expected = fit_with(CE, KnowledgeDistillation(small_teacher()))

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_teacher()

        def forward(self, images: Tensor) -> Any:
            return SimpleNamespace(logits=self.net(images))

    assert not differences(fit_with(CE, KnowledgeDistillation(Output())).weights, expected.weights)


def test_rejects_a_teacher_that_is_trained():
    module = module_class("lightning")()
    for teacher in (module, module.net, module.net[0], nn.Sequential(module.net, nn.Linear(3, 3))):
        with pytest.raises(RuntimeError, match=r"teacher .*'net.0.0.weight'.*deepcopy"):
            fit(KnowledgeDistillation(teacher), module=module)


def test_rejects_files_and_names_that_are_none(tmp_path, monkeypatch):
    torch.save({"state_dict": network().state_dict()}, tmp_path / "weights.pth")
    for teacher, error, message in (
        ("nowhere.ckpt", FileNotFoundError, "teacher='nowhere.ckpt'.*no such file"),
        ("runs/x/last", FileNotFoundError, "no such file"),
        ("resnet152dd", ValueError, "neither a file nor a name .* Did you mean 'resnet152d"),
        ("qqqq", ValueError, r"pretrained weights in timm\.$"),
        (str(tmp_path / "weights.pth"), RuntimeError, "weights.pth'.* no checkpoint of a Classifier .*as a module"),
    ):
        with pytest.raises(error, match=message):
            fit(KnowledgeDistillation(teacher))

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match=r"teacher='resnet18'.*no route to host"):
        fit(KnowledgeDistillation("resnet18"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float()), "the loss is binary"),
        (lambda x, y: F.binary_cross_entropy(x.sigmoid(), F.one_hot(y, 3).float()), "the loss is binary"),
        (lambda x, y: -(F.one_hot(y, 3).float() * x.log_softmax(1)).sum(), "follow .* through `mul`"),
        (lambda x, y: CE(x, y.clamp(min=0)), "follow .* through `clamp`"),
        (lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(), "has no effect"),
    ],
    ids=["BCE with logits", "BCE", "by hand", "clamp", "gather"],
)
def test_losses_that_do_not_fit_are_rejected(loss, message):
    with pytest.raises(RuntimeError, match=rf"^KnowledgeDistillation.*{message}"):
        fit_with(loss, KnowledgeDistillation(small_teacher()))


def test_rejects_batches_of_several_images():
    image, label = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    loader = loader_of({"image": image, "label": label, "depth": image})
    with pytest.raises(RuntimeError, match=r"image and depth.*collate_fn"):
        fit_with(CE, KnowledgeDistillation(small_teacher()), loader=loader)
