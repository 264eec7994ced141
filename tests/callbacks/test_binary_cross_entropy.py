"""The numbers of BinaryCrossEntropy, against timm and the formula in float64, the prior bias, and what is rejected."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.fits import Saver, differences, make_trainer, weights_of
from helpers.losses import fit_with, loader_of
from helpers.modules import lightning
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from lit_tricks.callbacks import (
    EMA,
    BinaryCrossEntropy,
    CutMix,
    FocalLoss,
    Freeze,
    GeneralizedCrossEntropy,
    KnowledgeDistillation,
    LabelSmoothing,
    MixUp,
    XavierInit,
)
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying

N, K = 6, 4
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
LABELS = torch.tensor([0, 3, 1, 2, 2, 3])
OTHER = LABELS.roll(1)
SHARE = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.85, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
HARD = F.one_hot(LABELS, K).double()
MIXED = SHARE[:, None] * HARD + (1 - SHARE[:, None]) * F.one_hot(OTHER, K)
CE = F.cross_entropy


def tricked(*tricks: Any, labels: Tensor = LABELS, mixed: tuple[Tensor, ...] = ()) -> SoftTarget:
    target = carrying(labels.clone(), LossSpec(tuple(type(trick).__name__ for trick in tricks)), *mixed)
    for trick in tricks:
        _, target = trick.act({}, target)
    return target


def of_elements(target: Tensor, logits: Tensor = LOGITS) -> Tensor:
    p = 1 / (1 + torch.exp(-logits))
    return -(target * p.log() + (1 - target) * (1 - p).log())


@pytest.mark.parametrize("sum_classes", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.4])
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_is_timms(sum_classes, threshold, mixed):
    expected = TimmBinaryCrossEntropy(0.0, threshold, sum_classes=sum_classes)(LOGITS, MIXED if mixed else LABELS)
    trick = BinaryCrossEntropy(threshold, sum_classes)
    for hot in (False, True):
        target = tricked(trick, mixed=(OTHER, SHARE) if mixed else ())
        found = CE(LOGITS, F.one_hot(target, K).double() if hot else target)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if mixed:
        positives = (MIXED if threshold is None else threshold < MIXED).double().sum(1).mean()
        torch.testing.assert_close(trick.quantities(target.spec)["binary_cross_entropy/positives"], positives)


@pytest.mark.parametrize("sum_classes", [True, False])
def test_smoothed_loss_is_timms(sum_classes):
    expected = TimmBinaryCrossEntropy(0.1, None, sum_classes=sum_classes)(LOGITS, LABELS)
    for threshold in (None, 0.2):
        bce, smoothing = BinaryCrossEntropy(threshold, sum_classes), LabelSmoothing(0.1)
        for target in (tricked(bce, smoothing), F.one_hot(tricked(smoothing, bce), K).double()):
            torch.testing.assert_close(CE(LOGITS, target), expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(CE(LOGITS, tricked(bce), label_smoothing=0.1), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_the_threshold_is_before_the_smoothing(order):
    hot = (MIXED > 0.2).double()
    assert set(hot.sum(1).tolist()) == {1.0, 2.0}
    expected = of_elements(hot * 0.9 + 0.1 / K).sum(1)
    tricks = [BinaryCrossEntropy(0.2), LabelSmoothing(0.1)][::order]
    found = CE(LOGITS, tricked(*tricks, mixed=(OTHER, SHARE)), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_with_focal_loss_it_is_torchvisions(gamma, alpha):
    expected = sigmoid_focal_loss(LOGITS, HARD, -1 if alpha is None else alpha, gamma).sum(1).mean()
    for tricks in itertools.permutations([BinaryCrossEntropy(), FocalLoss(gamma, alpha)]):
        torch.testing.assert_close(CE(LOGITS, tricked(*tricks)), expected)
    with pytest.raises(RuntimeError, match="alpha is a list, and the loss is binary"):
        CE(LOGITS, tricked(BinaryCrossEntropy(), FocalLoss(gamma, [0.1] * K)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mixed", [False, True])
def test_weights_and_ignored_labels_keep_their_meaning(reduction, mixed):
    """An image has the weight of its labels. An ignored label adds neither to the sum nor to the divisor."""
    how = {"weight": WEIGHT, "ignore_index": 2, "reduction": reduction}
    shares = (MIXED if mixed else HARD) * (torch.arange(K) != 2)
    known = shares.sum(1, keepdim=True)
    hot = (shares / known.clamp(min=1e-9) > 0.2).double()
    weight = (shares * WEIGHT).sum(1)
    none = weight * of_elements(hot).sum(1)
    expected = {"none": none, "sum": none.sum(), "mean": none.sum() / weight.sum()}[reduction]
    found = CE(LOGITS, tricked(BinaryCrossEntropy(), mixed=(OTHER, SHARE) if mixed else ()), **how)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    how["weight"] = None
    none = known.squeeze(1) * of_elements(hot).sum(1)
    expected = {"none": none, "sum": none.sum(), "mean": none.sum() / known.sum()}[reduction]
    found = CE(LOGITS, tricked(BinaryCrossEntropy(), mixed=(OTHER, SHARE) if mixed else ()), **how)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_dense_targets():
    logits = torch.randn(2, K, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(K, (2, 3, 3), generator=torch.Generator().manual_seed(2))
    labels[0, 0] = 255
    flat, known = logits.permute(0, 2, 3, 1).reshape(-1, K), labels.view(-1) != 255
    expected = of_elements(F.one_hot(labels.view(-1)[known], K).double(), flat[known]).sum(1).mean()
    found = CE(logits, tricked(BinaryCrossEntropy(), labels=labels), ignore_index=255)
    torch.testing.assert_close(found, expected)
    share = torch.tensor([0.7, 0.9], dtype=torch.float64)
    found = CE(logits, tricked(BinaryCrossEntropy(0.2), labels=labels, mixed=(labels.flip(0), share)), ignore_index=255)
    total = parts = 0.0
    for i, y, x in itertools.product(range(2), range(3), range(3)):
        own = [(int(labels[i, y, x]), float(share[i])), (int(labels[1 - i, y, x]), 1 - float(share[i]))]
        shares = torch.zeros(K, dtype=torch.float64)
        for label, part in own:
            if label != 255:
                shares[label] += part
        if part := float(shares.sum()):
            target = (shares / part > 0.2).double()
            total += part * float(of_elements(target, logits[i, :, y, x]).sum())
            parts += part
    assert float(found) == pytest.approx(total / parts, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    logits = LOGITS.to(dtype)
    expected = of_elements(HARD, logits.double()).sum(1).mean()
    found = CE(logits, tricked(BinaryCrossEntropy()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    sure = torch.tensor([[6e4, -6e4], [-6e4, 6e4]], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(CE(sure, tricked(BinaryCrossEntropy(), labels=torch.tensor([0, 0]))), sure)
    assert gradient.isfinite().all()


def test_gradients():
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: CE(x, tricked(BinaryCrossEntropy(), LabelSmoothing(0.1), mixed=(OTHER, SHARE))), (logits,)
    )
    (found,) = torch.autograd.grad(CE(logits, tricked(BinaryCrossEntropy())), logits)
    torch.testing.assert_close(found, (LOGITS.sigmoid() - HARD) / N)


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("sum_classes", [True, False])
def test_trains_as_a_module_with_the_loss_written_out(namespace, sum_classes):
    def own(x: Tensor, y: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float(), reduction="none")
        return (loss.sum(1) if sum_classes else loss.mean(1)).mean()

    trick = BinaryCrossEntropy(sum_classes=sum_classes, prior_bias=False)
    found, expected = fit_with(CE, trick, namespace=namespace), fit_with(own, namespace=namespace)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert differences(found.weights, fit_with(CE, namespace=namespace).weights)
    assert found.logged[0]["binary_cross_entropy/positives"] == 1


def test_mixed_images_have_two_labels():
    tricks = [MixUp(alpha=1000.0), BinaryCrossEntropy(0.2), LabelSmoothing(0.1)]
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    loader = loader_of([images, torch.arange(6) % 3])
    found = fit_with(CE, *tricks, loader=loader)
    assert 1 < found.logged[0]["binary_cross_entropy/positives"] <= 2
    again = fit_with(CE, *[MixUp(alpha=1000.0), BinaryCrossEntropy(0.2), LabelSmoothing(0.1)][::-1], loader=loader)
    assert not differences(found.weights, again.weights)


def test_goes_with_cutmix():
    first = fit_with(CE, CutMix(), BinaryCrossEntropy())
    assert not differences(first.weights, fit_with(CE, BinaryCrossEntropy(), CutMix()).weights)
    assert all(1 <= step["binary_cross_entropy/positives"] <= 2 for step in first.logged.values())


# ---------------------------------------------------------------------------------------------------------------------
# The prior bias

pl = lightning()
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Module(pl.LightningModule):
    """Any network with K classes; the learning rate is 0, so weights stay as they start."""

    def __init__(self, net: nn.Module, lr: float = 0.0) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        return sum(F.cross_entropy(each, batch[1]) for each in (out if isinstance(out, tuple) else (out,)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)

    def fit(self, *tricks: Any, **trainer: Any) -> Any:
        run = make_trainer(*tricks, **({"max_epochs": 1} | trainer))
        run.fit(self, loader_of([IMAGES, torch.arange(4) % K]))
        return self


def plain(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *last)


def test_each_sigmoid_starts_at_the_prior():
    module = Module(plain(nn.Linear(5, K))).fit(BinaryCrossEntropy())
    torch.testing.assert_close(module.net[-1].bias.sigmoid(), torch.full((K,), 1 / K))
    assert module.net[-1].bias[0].item() == pytest.approx(-math.log(K - 1))
    trick = BinaryCrossEntropy(0.1, sum_classes=False)
    Module(plain(nn.Linear(5, K))).fit(trick)
    assert "net.4.bias starts at -1.10" in trick.effect
    assert "mean over classes" in trick.effect
    assert "above 0.1" in trick.effect


@pytest.mark.parametrize(
    ("name", "arguments", "biases"),
    [
        ("resnet18", {}, ["fc"]),
        ("mobilenetv3_small_050", {}, ["classifier"]),
        ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 8, "depth": 1}, ["head"]),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "patch_size": 1}, ["head.fc"]),
    ],
)
def test_classifiers_of_timm_are_found(name, arguments, biases):
    net = timm.create_model(name, num_classes=K, **arguments)
    before = {key: value.clone() for key, value in net.named_parameters()}
    module = Module(net).fit(BinaryCrossEntropy())
    changed = {key for key, value in module.net.named_parameters() if not torch.equal(value, before[key])}
    assert changed == {f"{layer}.bias" for layer in biases}


def test_named_layers():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = plain(), nn.Linear(5, K), nn.Linear(5, K)
            self.projection = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.body(x)), self.aux(self.body(x))

    module = Module(Two()).fit(BinaryCrossEntropy(layers=["*.head", "*aux"]))
    for layer in (module.net.head, module.net.aux):
        assert layer.bias.detach().tolist() == pytest.approx([-math.log(K - 1)] * K)
    with pytest.raises(RuntimeError, match=r"found net.projection.bias of size 7 .* 4 classes.*layers="):
        Module(Two()).fit(BinaryCrossEntropy())
    loaded = Two()
    nn.init.normal_(loaded.body[1].weight)
    Module(loaded).fit(BinaryCrossEntropy())  # no bias is set, so no size matters
    assert torch.equal(Module(Two()).fit(BinaryCrossEntropy(prior_bias=False)).net.head.bias < -1, torch.zeros(K) > 0)
    with pytest.raises(RuntimeError, match=r"layers=\['fc'\]\).*no linear layer.*'net.projection'"):
        Module(Two()).fit(BinaryCrossEntropy(layers=["fc"]))


def test_a_last_layer_without_bias_is_rejected():
    with pytest.raises(RuntimeError, match=r"net.4 of Module has no trained bias.*prior_bias=False"):
        Module(plain(nn.Linear(5, K, bias=False))).fit(BinaryCrossEntropy())
    Module(plain(nn.Linear(5, K, bias=False))).fit(BinaryCrossEntropy(prior_bias=False))
    with pytest.raises(RuntimeError, match=r"net.4 of Module has no trained bias of two or more classes"):
        Module(plain(nn.Linear(5, 1))).fit(BinaryCrossEntropy())
    net = plain(nn.Linear(5, K))
    net[-1].bias.requires_grad_(False)
    optimizer = [p for p in net.parameters() if p.requires_grad]

    class Frozen(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(optimizer, 0.0)

    with pytest.raises(RuntimeError, match=r"net.4 of Frozen has no trained bias"):
        Frozen(net).fit(BinaryCrossEntropy())


def test_loaded_weights_keep_their_bias():
    def loaded() -> nn.Module:
        net = plain(nn.Linear(5, K))
        nn.init.normal_(net[1].weight)
        return net

    net = loaded()
    before = net[-1].bias.detach().clone()
    trick = BinaryCrossEntropy()
    module = Module(net).fit(trick)
    assert torch.equal(module.net[-1].bias, before)
    assert "bias: as it is, since weights were loaded" in trick.effect
    module = Module(loaded()).fit(BinaryCrossEntropy(layers=["net.4"]))
    assert module.net[-1].bias.detach().tolist() == pytest.approx([-math.log(K - 1)] * K)
    net = plain(nn.Linear(5, K))
    before = net[-1].bias.detach().clone()
    module = Module(net).fit(trick, Freeze(["net.0"]))
    assert torch.equal(module.net[-1].bias, before)
    assert "bias: as it is, Freeze starts from trained weights" in trick.effect
    module = Module(plain(nn.Linear(5, K))).fit(BinaryCrossEntropy(layers=["net.4"]), Freeze(["net.0"]))
    assert module.net[-1].bias.detach().tolist() == pytest.approx([-math.log(K - 1)] * K)


def test_a_resumed_run_keeps_its_bias(tmp_path):
    saver = Saver(tmp_path)
    torch.manual_seed(0)
    Module(plain(nn.Linear(5, K)), lr=0.5).fit(BinaryCrossEntropy(), saver, max_epochs=2)
    torch.manual_seed(0)
    module, trick = Module(plain(nn.Linear(5, K)), lr=0.5), BinaryCrossEntropy()
    loader = loader_of([IMAGES, torch.arange(4) % K])
    make_trainer(trick, max_epochs=2).fit(module, loader, ckpt_path=saver.paths[0])
    assert "run resumes" in trick.effect
    torch.manual_seed(0)
    whole = Module(plain(nn.Linear(5, K)), lr=0.5).fit(BinaryCrossEntropy(), max_epochs=2)
    assert not differences(weights_of(module), weights_of(whole))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_order_beside_tricks_that_set_or_copy_weights(order):
    tricks = [BinaryCrossEntropy(), XavierInit(seed=1), EMA(decay=0.5)]
    torch.manual_seed(0)
    module = Module(plain(nn.Linear(5, K)))
    expected = [-math.log(K - 1)] * K

    class Shown(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.shown = self.net[-1].bias.detach().tolist()

    module = Shown(plain(nn.Linear(5, K)))
    loader = loader_of([IMAGES, torch.arange(4) % K])
    make_trainer(*(tricks[i] for i in order), max_epochs=1).fit(module, loader, loader)
    assert module.net[-1].bias.detach().tolist() == pytest.approx(expected)
    assert module.shown == pytest.approx(expected)  # of the average


# ---------------------------------------------------------------------------------------------------------------------
# What is rejected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_threshold": 0.5}, "target_threshold=0.5"),
        ({"target_threshold": -0.1}, "target_threshold=-0.1"),
        ({"target_threshold": True}, "target_threshold=True"),
        ({"sum_classes": 1}, "sum_classes=1"),
        ({"prior_bias": None}, "prior_bias=None"),
        ({"layers": "fc"}, "layers='fc'"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_rejects_arguments(arguments, message):
    with pytest.raises(ValueError, match=rf"BinaryCrossEntropy\({message}"):
        BinaryCrossEntropy(**arguments)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: F.nll_loss(x.log_softmax(1), y), "needs logits, and F.nll_loss gets log-probabilities"),
        (lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float()), "loss is binary already"),
        (lambda x, y: F.binary_cross_entropy(x.sigmoid(), F.one_hot(y, 3).float()), "loss is binary already"),
        (lambda x, y: -(F.one_hot(y, 3).float() * x.log_softmax(1)).sum(), "follow .* through `mul`"),
        (lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(), "has no effect"),
    ],
    ids=["NLL", "BCE of logits", "BCE", "by hand", "gather"],
)
def test_rejects_losses(loss, message):
    with pytest.raises(RuntimeError, match=rf"^BinaryCrossEntropy.*{message}"):
        fit_with(loss, BinaryCrossEntropy())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: KnowledgeDistillation(nn.Sequential(nn.Flatten(), nn.Linear(64, 3))), "compares a softmax"),
        (GeneralizedCrossEntropy, "Keep one of them"),
    ],
)
def test_rejects_tricks_that_need_a_softmax(other, message):
    with pytest.raises(RuntimeError, match=f"BinaryCrossEntropy and .*{message}"):
        fit_with(CE, BinaryCrossEntropy(), other())


def test_rejects_several_labels():
    several = loader_of([torch.randn(4, 1, 8, 8), torch.randint(2, (4, 3))])
    with pytest.raises(RuntimeError, match=r"^BinaryCrossEntropy: the module's loss is binary already"):
        fit_with(lambda x, y: F.binary_cross_entropy_with_logits(x, y.float()), BinaryCrossEntropy(), loader=several)
