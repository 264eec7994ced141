"""The numbers of MixUp, against the paper's formula, torchvision and timm; its random numbers, and when it acts."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences, make_trainer
from helpers.losses import fit_with, loader_of
from helpers.modules import eval_loader, module_class, train_loader
from torch import Tensor, nn

from lit_tricks.callbacks import CutMix, LabelSmoothing, MixUp
from lit_tricks.callbacks.mixup import mixup
from lit_tricks.callbacks.soft_targets.mixing import beta
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying

N, K = 5, 4
IMAGES = torch.randn(N, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 2, 2])
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PERMUTATION = torch.tensor([3, 0, 4, 1, 2])
CE = F.cross_entropy


def mixed_by(
    trick: Any, lam: float, monkeypatch: pytest.MonkeyPatch, labels: Tensor = LABELS
) -> tuple[Tensor, SoftTarget]:
    monkeypatch.setattr("lit_tricks.callbacks.mixup.beta", lambda a, n, g: torch.full((n,), lam, dtype=torch.float64))
    inputs, target, mean = trick.mix(
        {("x",): IMAGES}, carrying(labels, LossSpec(("MixUp",))), PERMUTATION, torch.Generator()
    )
    assert mean == pytest.approx(lam)
    return inputs["x",], target


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.5, 1.0])
def test_formula_of_the_paper(lam, monkeypatch):
    images, target = mixed_by(MixUp(), lam, monkeypatch)
    torch.testing.assert_close(images, lam * IMAGES + (1 - lam) * IMAGES[PERMUTATION])
    loss = lam * CE(LOGITS, LABELS) + (1 - lam) * CE(LOGITS, LABELS[PERMUTATION])
    torch.testing.assert_close(CE(LOGITS, target), loss, rtol=1e-6, atol=0)
    dominant = LABELS if lam >= 0.5 else LABELS[PERMUTATION]
    assert target.tolist() == dominant.tolist()


def test_inputs_are_not_changed_in_place(monkeypatch):
    before = IMAGES.clone()
    mixed_by(MixUp(), 0.3, monkeypatch)
    assert torch.equal(IMAGES, before)


def test_a_lambda_for_each_sample():
    lam = torch.tensor([0.1, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    mixed = mixup(IMAGES, lam, PERMUTATION)
    for i in range(N):
        torch.testing.assert_close(mixed[i], lam[i] * IMAGES[i] + (1 - lam[i]) * IMAGES[PERMUTATION[i]])
    inputs, target, mean = MixUp(per_sample=True).mix(
        {(): IMAGES}, carrying(LABELS, LossSpec(("MixUp",))), PERMUTATION, torch.Generator().manual_seed(0)
    )
    drawn = beta(0.2, N, torch.Generator().manual_seed(0))
    torch.testing.assert_close(inputs[()], mixup(IMAGES, drawn.float(), PERMUTATION))
    loss = drawn * CE(LOGITS, LABELS, reduction="none") + (1 - drawn) * CE(
        LOGITS, LABELS[PERMUTATION], reduction="none"
    )
    torch.testing.assert_close(CE(LOGITS, target), loss.mean(), rtol=1e-6, atol=0)
    assert mean == pytest.approx(float(drawn.mean()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype_of_floats(dtype):
    images = IMAGES.to(dtype)
    mixed = mixup(images, torch.tensor([0.3]), PERMUTATION)
    assert mixed.dtype == dtype
    exact = 0.3 * images.double() + 0.7 * images[PERMUTATION].double()
    torch.testing.assert_close(mixed, exact.to(dtype))


def test_bytes_are_rounded_as_timm_does():
    from timm.data.mixup import FastCollateMixup

    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    collate = FastCollateMixup(mixup_alpha=1.0, num_classes=K)
    collate._params_per_batch = lambda: (0.3217, False)  # no sum ends in a half
    theirs = torch.zeros_like(images)
    collate._mix_batch_collate(theirs, [(image.numpy(), 0) for image in images])
    assert torch.equal(mixup(images, torch.tensor([0.3217]), torch.tensor([3, 2, 1, 0])), theirs)


def test_is_torchvisions_with_its_lambda_and_its_partner(monkeypatch):
    from torchvision.transforms import v2

    theirs = v2.MixUp(num_classes=K, alpha=1.0)
    monkeypatch.setattr(theirs, "make_params", lambda inputs: {"lam": 0.3})
    their_images, soft = theirs(IMAGES, LABELS)
    roll = torch.arange(N).roll(1)
    monkeypatch.setattr("lit_tricks.callbacks.mixup.beta", lambda a, n, g: torch.full((n,), 0.3, dtype=torch.float64))
    inputs, target, _ = MixUp().mix({(): IMAGES}, carrying(LABELS, LossSpec(("MixUp",))), roll, torch.Generator())
    torch.testing.assert_close(inputs[()], their_images)
    torch.testing.assert_close(CE(LOGITS, target), CE(LOGITS, soft.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_timms_with_its_lambda_and_its_partner(smoothing, monkeypatch):
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    images, labels, logits = IMAGES[:4], LABELS[:4], LOGITS[:4]
    soft = mixup_target(labels, K, lam=0.3, smoothing=smoothing)
    monkeypatch.setattr("lit_tricks.callbacks.mixup.beta", lambda a, n, g: torch.full((n,), 0.3, dtype=torch.float64))
    target = carrying(labels, LossSpec(("MixUp",)))
    LabelSmoothing(smoothing).act({}, target)
    inputs, target, _ = MixUp().mix({(): images}, target, torch.tensor([3, 2, 1, 0]), torch.Generator())
    torch.testing.assert_close(inputs[()], images * 0.3 + images.flip(0) * 0.7)
    torch.testing.assert_close(CE(logits, target), SoftTargetCrossEntropy()(logits, soft.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_lambda_has_the_moments_of_beta(alpha):
    drawn = beta(alpha, 40_000, torch.Generator().manual_seed(0))
    assert drawn.mean() == pytest.approx(0.5, abs=0.01)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    assert (drawn >= 0).all()
    assert (drawn <= 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, r"alpha=0.0"),
        ({"prob": 0.0}, r"prob=0.0"),
        ({"prob": 1.1}, r"prob=1.1"),
    ],
)
@pytest.mark.parametrize("trick", [MixUp, CutMix])
def test_wrong_arguments_are_rejected_by_name(trick, arguments, message):
    with pytest.raises(ValueError, match=message):
        trick(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


def lambdas(*tricks: Any, name: str = "mixup", **kwargs: Any) -> list[float]:
    logged = fit_with(CE, *tricks, **({"max_epochs": 4} | kwargs)).logged
    return [metrics[f"{name}/lambda"] for metrics in logged.values() if f"{name}/lambda" in metrics]


def test_loss_of_a_fit_is_that_of_the_mixed_batch():
    """With what the module got, and only that: image, and the labels that it was mixed of."""
    seen: list[tuple[float, float]] = []

    class Module(module_class("lightning")):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            image, target = batch
            (x, y), lam = self.batches[batch_idx], self.trick._lambda
            [partner] = [p for p in self.partners if torch.allclose(image, lam * x + (1 - lam) * x[p], atol=1e-5)][:1]
            logits = self(image)
            loss = F.cross_entropy(logits, target)
            seen.append(
                (
                    float(loss.detach()),
                    float(lam * CE(logits.detach(), y) + (1 - lam) * CE(logits.detach(), y[partner])),
                )
            )
            assert target.tolist() == (y if lam >= 0.5 else y[partner]).tolist()
            return loss

    from itertools import permutations

    module = Module()
    module.batches = list(train_loader())
    module.partners = [list(p) for p in permutations(range(4))]
    module.trick = MixUp(alpha=1.0)
    torch.manual_seed(0)
    make_trainer(module.trick, max_epochs=1, limit_val_batches=0).fit(module, loader_of(*module.batches), eval_loader())
    assert len(seen) == 4
    for loss, expected in seen:
        assert loss == pytest.approx(expected, rel=1e-6)


def test_share_of_batches():
    values = lambdas(MixUp(alpha=1.0, prob=0.3), max_epochs=30)
    mixed = sum(value < 1 for value in values) / len(values)
    assert mixed == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(("probs", "share"), [((1.0, 1.0), 0.5), ((0.2, 0.6), 0.25)])
def test_beside_cutmix_each_batch_gets_one_of_the_two(probs, share):
    for order in (1, -1):
        tricks = [MixUp(alpha=1.0, prob=probs[0]), CutMix(prob=probs[1])][::order]
        logged = fit_with(CE, *tricks, max_epochs=15).logged.values()
        pairs = [(metrics["mixup/lambda"], metrics["cutmix/lambda"]) for metrics in logged if "mixup/lambda" in metrics]
        # a box may be empty, or a lambda be 1 in the logger's 32 bits
        assert not [pair for pair in pairs if max(pair) < 1]
        assert sum(mix < 1 for mix, _ in pairs) / len(pairs) == pytest.approx(share, abs=0.15)
        if order == 1:
            first = pairs
    assert pairs == first


def test_mixup_has_its_own_probability_where_cutmix_is_off():
    values = lambdas(MixUp(alpha=1.0), CutMix(end=0.5))
    assert all(value < 1 for value in values[8:])
    assert 0 < sum(value == 1 for value in values[:8]) < 8


def test_two_of_one_class_are_rejected():
    with pytest.raises(RuntimeError, match=r"stateful callback .*`MixUp`"):
        fit_with(CE, MixUp(), MixUp(alpha=1.0))


def test_random_numbers_are_its_own():
    state = torch.get_rng_state()
    first = lambdas(MixUp(alpha=1.0))
    assert lambdas(MixUp(alpha=1.0)) == first
    torch.manual_seed(1)
    module, trainer = module_class("lightning")(), make_trainer(MixUp(alpha=1.0), max_epochs=1, limit_val_batches=0)
    torch.manual_seed(1)
    trainer.fit(module, train_loader(), eval_loader())
    assert trainer.logger.metrics[0]["mixup/lambda"] != first[0]
    torch.set_rng_state(state)


def test_ranks_draw_differently_from_one_state(monkeypatch):
    class Strategy:
        @staticmethod
        def broadcast(value: Any) -> Any:
            return 7

    class Trainer:
        global_step, training, strategy, callbacks = 0, True, Strategy(), ()
        fast_dev_run, current_epoch, max_epochs = False, 0, 1

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    def inputs_of(rank: int) -> tuple[Tensor, Any]:
        trick = MixUp(alpha=1.0)
        trick._trainer = Trainer(rank)
        trick._trainer.callbacks = [trick]
        trick.setup(trick._trainer, None, "fit")
        inputs, _ = trick.act({(): IMAGES}, carrying(LABELS, LossSpec(("MixUp",))))
        return inputs[()], trick.state_dict()["seeds"]

    (first, state), (second, other_state), (again, _) = inputs_of(0), inputs_of(1), inputs_of(1)
    assert not torch.equal(first, second)
    assert torch.equal(second, again)
    assert torch.equal(state, other_state)


def test_a_dict_of_inputs_and_odd_batches():
    x, y = torch.randn(7, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])

    class Module(module_class("lightning")):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert torch.equal(batch["depth"], 2 * batch["rgb"])
            assert not torch.equal(batch["rgb"], x)
            assert batch["weight"] is not None
            return F.cross_entropy(self(batch["rgb"]), batch["label"])

    batch = {"rgb": x, "depth": 2 * x, "label": y, "weight": torch.ones(7), "name": list("abcdefg")}
    before = deepcopy(batch)
    trainer = make_trainer(MixUp(alpha=1.0), max_epochs=1, limit_val_batches=0)
    trainer.fit(Module(), loader_of(batch, batch), eval_loader())
    assert not differences(batch, before)


def test_rejects_a_batch_without_inputs():
    batch = {"tokens": torch.ones(4, 7, dtype=torch.int64), "label": torch.arange(4) % 3}
    with pytest.raises(RuntimeError, match=r"MixUp found the target .*no input"):
        make_trainer(MixUp(), limit_val_batches=0).fit(module_class("lightning")(), loader_of(batch), eval_loader())


@pytest.mark.parametrize("other", [LabelSmoothing])
def test_order_beside_smoothing_has_no_meaning(other):
    weights = [fit_with(CE, *tricks).weights for tricks in ([MixUp(), other(0.3)], [other(0.3), MixUp()])]
    assert not differences(*weights)
    own = fit_with(nn.CrossEntropyLoss(label_smoothing=0.3), MixUp()).weights
    torch.testing.assert_close(weights[0], own)


def test_dense_targets_mix_each_pixel(monkeypatch):
    labels = torch.randint(K, (N, 6, 6))
    labels[0, 0] = 255
    _, target = mixed_by(MixUp(), 0.3, monkeypatch, labels)
    logits = torch.randn(N, K, 6, 6, dtype=torch.float64)
    how = {"ignore_index": 255}
    expected = 0.3 * CE(logits, labels, **how) + 0.7 * CE(logits, labels[PERMUTATION], **how)
    torch.testing.assert_close(CE(logits, target, **how), expected, rtol=1e-6, atol=0)
    assert torch.equal(target, labels[PERMUTATION])


def test_binary_loss_of_one_hot():
    def own(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float())

    assert differences(fit_with(own, MixUp(alpha=1.0)).weights, fit_with(own).weights)


def test_mutual_copies_do_not_share_random_numbers():
    trick = MixUp(alpha=1.0)
    fit_with(CE, trick)
    state = trick.state_dict()["seeds"].clone()
    copied = deepcopy(trick)
    fit_with(CE, copied, max_epochs=2)
    assert torch.equal(trick.state_dict()["seeds"], state)
