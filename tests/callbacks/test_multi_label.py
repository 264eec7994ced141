"""Modules with several labels per image under the loss tricks: each step of a fit against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences, make_trainer, weights_of
from helpers.modules import NAMESPACES, lightning
from timm.loss import AsymmetricLossMultiLabel
from timm.loss import BinaryCrossEntropy as TimmBinaryCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAccuracy

from lit_tricks.callbacks import CutMix, FocalLoss, GeneralizedCrossEntropy, LabelSmoothing, MixUp

N, LABELS, SIDE = 12, 5, 8
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(N, 1, SIDE, SIDE, generator=GENERATOR)
HOT = torch.randint(2, (N, LABELS), generator=GENERATOR)
WEIGHT, POS_WEIGHT = torch.rand(LABELS, generator=GENERATOR), torch.rand(LABELS, generator=GENERATOR) * 3
KNOWN = torch.rand(LABELS, generator=GENERATOR) > 0.3
Loss = Callable[[Tensor, Tensor], Tensor]


def elements(logits: Tensor, soft: Tensor, pos_weight: Tensor | float = 1.0) -> Tensor:
    p = 1 / (1 + torch.exp(-logits))
    return -(pos_weight * soft * p.log() + (1 - soft) * (1 - p).log())


# How a module computes its loss, and the formula for labels in [0, 1]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "BCEWithLogitsLoss": (
        lambda x, y: nn.BCEWithLogitsLoss(WEIGHT, pos_weight=POS_WEIGHT)(x, y.float()),
        lambda x, y: (WEIGHT * elements(x, y, POS_WEIGHT)).mean(),
    ),
    "BCE": (lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.float()), lambda x, y: elements(x, y).mean()),
    "MultiLabelSoftMarginLoss": (
        lambda x, y: nn.MultiLabelSoftMarginLoss(WEIGHT, reduction="sum")(x, y.float()),
        lambda x, y: (WEIGHT * elements(x, y)).sum() / LABELS,
    ),
    "timm": (lambda x, y: TimmBinaryCrossEntropy(0.0)(x, y.float()), lambda x, y: elements(x, y).mean()),
    "columns": (
        lambda x, y: sum(F.binary_cross_entropy_with_logits(x[:, i], y[:, i].float()) for i in range(LABELS)),
        lambda x, y: LABELS * elements(x, y).mean(),
    ),
    "known labels": (
        lambda x, y: F.binary_cross_entropy_with_logits(x[:, KNOWN], y[:, KNOWN].float()),
        lambda x, y: elements(x, y)[:, KNOWN].mean(),
    ),
    "masked": (
        lambda x, y: (F.binary_cross_entropy_with_logits(x, y.to(x), reduction="none") * KNOWN).sum(),
        lambda x, y: (elements(x, y) * KNOWN).sum(),
    ),
}
TRICKS: dict[str, Callable[[], list[Any]]] = {
    "MixUp": lambda: [MixUp(1.0)],
    "CutMix": lambda: [CutMix(1.0)],
    "LabelSmoothing": lambda: [LabelSmoothing(0.2)],
    "all": lambda: [LabelSmoothing(0.2), CutMix(1.0), FocalLoss(2.0, 0.25), MixUp(1.0)],
}


def module_class(namespace: str) -> Any:
    class Module(lightning(namespace).LightningModule):  # type: ignore[misc]
        """Keeps images, logits and loss of each step, and updates a metric with the target."""

        def __init__(self, loss: Loss) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, LABELS))
            self.loss, self.steps, self.seen = loss, [], []
            self.accuracy = MultilabelAccuracy(LABELS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch["image"])
            loss = self.loss(logits, batch["labels"])
            self.accuracy.update(logits, batch["labels"])
            self.steps.append((batch["image"], logits.detach().double(), float(loss.detach())))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(type(batch["labels"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module


class Items(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, labels = super().__getitem__(index)
        return {"image": image, "labels": labels}


def fit(loss: Loss, *tricks: Any, namespace: str = "lightning", labels: Tensor = HOT, **trainer: Any) -> Any:
    module = module_class(namespace)(loss)
    loader = DataLoader(Items(IMAGES, labels), batch_size=4)
    torch.manual_seed(1)
    run = make_trainer(*tricks, namespace=namespace, **({"max_epochs": 2} | trainer))
    run.fit(module, loader, loader)
    module.logged = [run.logger.metrics[step] for step in sorted(run.logger.metrics)]
    assert all(kind is Tensor for kind in module.seen)
    return module


def labels_of(images: Tensor, start: int, shares: tuple[float, ...]) -> Tensor:
    """Find the shares of two images in each one of a batch, which may be cut or blended."""
    batch, hot = IMAGES[start : start + 4].double(), HOT[start : start + 4].double()
    found = []
    for own, image in enumerate(images.double()):
        fits = []
        for partner in range(4):
            for share in shares:
                blend = share * batch[own] + (1 - share) * batch[partner]
                same = (image == batch[own]) | (image == batch[partner])
                area = float((image == batch[own]).double().mean())
                if torch.allclose(image, blend, atol=1e-5) or (bool(same.all()) and abs(area - share) < 1e-6):
                    fits.append(share * hot[own] + (1 - share) * hot[partner])
        assert fits
        found.append(fits[0])
    return torch.stack(found)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("tricks", TRICKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_of_a_fit_is_that_of_the_formula(loss, tricks, namespace):
    own, formula = LOSSES[loss]
    module = fit(own, *TRICKS[tricks](), namespace=namespace)
    assert len(module.steps) == 6
    assert module.accuracy.compute().isfinite()
    mixed = False
    for step, (images, logits, value) in enumerate(module.steps):
        logged = [v for k, v in module.logged[step].items() if "lambda" in k] if tricks != "LabelSmoothing" else []
        share = min(logged, default=1.0)  # the other trick has left the batch as it is
        mixed |= share < 1
        soft = labels_of(images, step % 3 * 4, (share, 1.0))
        if tricks in ("LabelSmoothing", "all"):
            soft = soft * 0.8 + 0.1
        expected = formula(logits, soft)
        if tricks == "all":
            if loss == "BCEWithLogitsLoss":
                scale = WEIGHT * elements(logits, soft, POS_WEIGHT)
            elif loss == "MultiLabelSoftMarginLoss":
                scale = WEIGHT * elements(logits, soft)
            else:
                scale = elements(logits, soft)
            p = logits.sigmoid()
            factor = (1 - p * soft - (1 - p) * (1 - soft)) ** 2 * (0.25 * soft + 0.75 * (1 - soft))
            each = factor * scale
            expected = {
                "MultiLabelSoftMarginLoss": each.sum() / LABELS,
                "columns": LABELS * each.mean(),
                "known labels": each[:, KNOWN].mean(),
                "masked": (each * KNOWN).sum(),
            }.get(loss, each.mean())
        assert value == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert mixed or tricks == "LabelSmoothing"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_order_and_accumulation(namespace):
    own = LOSSES["BCEWithLogitsLoss"][0]
    first, second = (
        fit(own, *TRICKS["all"]()[::order], namespace=namespace, accumulate_grad_batches=2) for order in (1, -1)
    )
    assert not differences(weights_of(first), weights_of(second))
    assert differences(weights_of(first), weights_of(fit(own, namespace=namespace, accumulate_grad_batches=2)))


@pytest.mark.parametrize("trick", [MixUp, CutMix])
def test_losses_of_other_libraries_get_the_mixed_labels(trick):
    asymmetric = AsymmetricLossMultiLabel()
    module = fit(lambda x, y: asymmetric(x, y.float()), trick(1.0))
    for step, (images, logits, value) in enumerate(module.steps):
        share = next(v for k, v in module.logged[step].items() if "lambda" in k)
        soft = labels_of(images, step % 3 * 4, (share, 1.0))
        assert value == pytest.approx(float(asymmetric(logits, soft)), rel=1e-4)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(
    ("loss", "tricks", "message"),
    [
        (lambda x, y: F.multilabel_margin_loss(x, y.long()), [MixUp()], "MixUp .*through `multilabel_margin_loss`"),
        (
            lambda x, y: AsymmetricLossMultiLabel()(x, y.float()),
            [LabelSmoothing()],
            "LabelSmoothing .*through `mul`",
        ),
        (
            lambda x, y: torch.where(y == 1, -F.logsigmoid(x), -F.logsigmoid(-x)).mean(),
            [MixUp()],
            "MixUp has no effect",
        ),
        (lambda x, y: -F.logsigmoid(x)[y == 1].mean(), [CutMix()], "CutMix has no effect"),
        (lambda x, y: F.cross_entropy(x, y.argmax(1)), [LabelSmoothing()], "LabelSmoothing has no effect"),
        (lambda x, y: F.cross_entropy(x, y.float()), [GeneralizedCrossEntropy()], "GeneralizedCrossEntropy.*several"),
    ],
)
def test_losses_that_are_no_binary_ones_are_rejected_by_name(loss, tricks, message, namespace):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        fit(loss, *tricks, namespace=namespace)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 3)])
@pytest.mark.parametrize("trick", [MixUp, CutMix, LabelSmoothing])
def test_labels_beyond_0_and_1_are_rejected(trick, low, high):
    """A mixture with -1 for unknown, or of class indices, would have no meaning."""
    labels = HOT.clone()
    labels[0, 0], labels[1, 1] = low, high
    with pytest.raises(RuntimeError, match=rf"^{trick.__name__}: several labels .* from {low} to {high}\. .*mask"):
        fit(LOSSES["BCE"][0], trick(), labels=labels)


def test_maps_of_several_labels_are_rejected():
    maps = torch.randint(2, (N, 3, SIDE, SIDE)).float()
    with pytest.raises(RuntimeError, match=r"MixUp found no target .*\(4, 3, 8, 8\)"):
        fit(lambda x, y: x.sum(), MixUp(), labels=maps)
