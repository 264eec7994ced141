"""Batches with more than images and one label an item: several labels, float labels, and vectors next to images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import log_lines, make_trainer
from helpers.losses import loader_of
from helpers.modules import lightning
from torch import Tensor, nn
from torchmetrics.functional.classification import multilabel_accuracy
from torchvision.ops import sigmoid_focal_loss

from lit_tricks.callbacks import CutMix, FocalLoss, KnowledgeDistillation, LabelSmoothing, MixUp
from lit_tricks.utils.batch import find

pl = lightning()
ITEMS, LABELS = 6, 5
GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(ITEMS, 1, 8, 8, generator=GENERATOR)
AGE = torch.randn(ITEMS, 3, generator=GENERATOR)
HOT = torch.randint(2, (ITEMS, LABELS), generator=GENERATOR)
CLASS = torch.arange(ITEMS) % LABELS
Step = Callable[[Tensor, Tensor], Tensor]


class Module(pl.LightningModule):
    """Keeps what one training step gets and computes."""

    def __init__(self, loss: Step, batch: Any, at: Any = (0, -1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, LABELS))
        self.loss, self.batch, self.at = loss, batch, at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.got = batch
        self.logits = self.net(batch[self.at[0]])
        self.value = self.loss(self.logits, batch[self.at[1]])
        return self.value

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def fit(self, *tricks: Any) -> Any:
        trainer = make_trainer(*tricks, max_epochs=1)
        torch.manual_seed(1)
        trainer.fit(self, loader_of(self.batch))
        self.lam = {k: v for metrics in trainer.logger.metrics.values() for k, v in metrics.items() if "lambda" in k}
        return self


def partners(mixed: Tensor, whole: Tensor, lam: float) -> list[int]:
    """With which item each one was mixed."""
    found = []
    for i, item in enumerate(mixed):
        distances = [float((item - lam * whole[i] - (1 - lam) * other).abs().max()) for other in whole]
        found.append(min(range(len(whole)), key=distances.__getitem__))
        assert min(distances) < 1e-5
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Several labels an item


def bce_with_logits(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.float())


def bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(logits.sigmoid(), target.float())


def written_out(logits: Tensor, target: Tensor) -> Tensor:
    target = target.float()
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).mean()


def exact(logits: Tensor, soft: Tensor) -> Tensor:
    logits = logits.detach().double()
    return -(soft * F.logsigmoid(logits) + (1 - soft) * F.logsigmoid(-logits)).mean()


LOSSES = {"BCE of logits": bce_with_logits, "BCE": bce, "written out": written_out}
TYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("per_sample", [True, False])
def test_mixup_mixes_several_labels(loss, dtype, per_sample):
    module = Module(loss, [IMAGE, HOT.to(dtype)]).fit(MixUp(1.0, per_sample=per_sample))
    if per_sample:
        shares = torch.linalg.lstsq  # each item has its own: found below
        soft = []
        for item in module.got[0].flatten(1).double():
            mixture = shares(IMAGE.flatten(1).double().T, item[:, None]).solution[:, 0]
            soft.append(mixture @ HOT.double())
        soft = torch.stack(soft)
    else:
        lam = module.lam["mixup/lambda"]
        soft = lam * HOT.double() + (1 - lam) * HOT[partners(module.got[0], IMAGE, lam)].double()
    torch.testing.assert_close(module.value.double(), exact(module.logits, soft), rtol=1e-5, atol=1e-6)
    assert module.value.requires_grad


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_cutmix_mixes_several_labels_by_area(loss):
    module = Module(loss, [IMAGE, HOT.float()]).fit(CutMix(1.0))
    kept = module.lam["cutmix/lambda"]
    soft = []
    for i, item in enumerate(module.got[0]):
        changed = int((item != IMAGE[i]).sum())
        others = [j for j in range(ITEMS) if j != i and all(((item == IMAGE[i]) | (item == IMAGE[j])).flatten())]
        [j] = others if changed else [i]
        assert changed in (0, round((1 - kept) * 64))
        soft.append(kept * HOT[i].double() + (1 - kept) * HOT[j].double())
    torch.testing.assert_close(module.value.double(), exact(module.logits, torch.stack(soft)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [bce_with_logits, bce])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("convention", "spread"), [("torch", 0.1), ("paper", 0.2)])
def test_label_smoothing_smooths_each_of_several_labels(loss, dtype, convention, spread):
    module = Module(loss, [IMAGE, HOT.to(dtype)]).fit(LabelSmoothing(0.1, convention=convention))
    soft = HOT.double() * (1 - spread) + spread / 2
    torch.testing.assert_close(module.value.double(), exact(module.logits, soft), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("loss", [bce_with_logits, bce])
def test_focal_loss_of_several_labels_is_the_papers(gamma, alpha, loss):
    module = Module(loss, [IMAGE, HOT]).fit(FocalLoss(gamma, alpha))
    logits, hot = module.logits.detach().double(), HOT.double()
    expected = sigmoid_focal_loss(logits, hot, -1 if alpha is None else alpha, gamma, "mean")
    torch.testing.assert_close(module.value.double(), expected, rtol=1e-5, atol=1e-6)


def test_all_of_them_together():
    tricks = [FocalLoss(2.0, 0.25), LabelSmoothing(0.2), MixUp(1.0)]
    for order in (tricks, tricks[::-1]):
        module = Module(bce_with_logits, {"image": IMAGE, "label": HOT}, at=("image", "label")).fit(*order)
        lam = module.lam["mixup/lambda"]
        soft = lam * HOT.double() + (1 - lam) * HOT[partners(module.got["image"], IMAGE, lam)].double()
        soft = soft * 0.8 + 0.1
        p = module.logits.detach().double().sigmoid()
        cross = -(soft * p.log() + (1 - soft) * (1 - p).log())
        factor = (1 - p * soft - (1 - p) * (1 - soft)) ** 2 * (0.25 * soft + 0.75 * (1 - soft))
        torch.testing.assert_close(module.value.double(), (factor * cross).mean(), rtol=1e-5, atol=1e-6)


def test_a_loss_of_another_library_gets_the_mixed_labels():
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, target.float(), 0.25, 2.0, "mean")

    module = Module(loss, [IMAGE, HOT]).fit(MixUp(1.0))
    lam = module.lam["mixup/lambda"]
    soft = lam * HOT.double() + (1 - lam) * HOT[partners(module.got[0], IMAGE, lam)].double()
    expected = sigmoid_focal_loss(module.logits.detach().double(), soft, 0.25, 2.0, "mean")
    torch.testing.assert_close(module.value.double(), expected, rtol=1e-5, atol=1e-6)


def test_weights_and_reductions_keep_their_meaning():
    weight, pos_weight = torch.rand(LABELS, generator=GENERATOR), torch.rand(LABELS, generator=GENERATOR) * 3

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target, weight, pos_weight=pos_weight, reduction="sum")

    module = Module(loss, [IMAGE, HOT.float()]).fit(MixUp(1.0))
    lam = module.lam["mixup/lambda"]
    soft = lam * HOT.double() + (1 - lam) * HOT[partners(module.got[0], IMAGE, lam)].double()
    logits = module.logits.detach().double()
    cross = -(pos_weight * soft * F.logsigmoid(logits) + (1 - soft) * F.logsigmoid(-logits))
    torch.testing.assert_close(module.value.double(), (weight * cross).sum(), rtol=1e-5, atol=1e-5)


def test_metrics_see_the_labels_with_the_larger_share():
    seen = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(multilabel_accuracy(logits, target, LABELS))
        seen.append(target.clone() if type(target) is Tensor else target.parts["value"].clone())
        return bce_with_logits(logits, target)

    module = Module(loss, [IMAGE, HOT]).fit(MixUp(1.0))
    lam = module.lam["mixup/lambda"]
    own = HOT if lam >= 0.5 else HOT[partners(module.got[0], IMAGE, lam)]
    assert torch.equal(seen[1], own)
    assert seen[0] == multilabel_accuracy(module.logits, own, LABELS)


@pytest.mark.parametrize(
    ("loss", "tricks", "message"),
    [
        (F.cross_entropy, [MixUp()], r"MixUp: .*several labels.*\(6, 5\).*binary_cross_entropy_with_logits"),
        (F.cross_entropy, [LabelSmoothing()], r"LabelSmoothing: .*several labels"),
        (F.mse_loss, [LabelSmoothing()], "LabelSmoothing .*through `mse_loss`"),
        (F.mse_loss, [FocalLoss()], "FocalLoss .*through `mse_loss`"),
        (bce_with_logits, [KnowledgeDistillation(nn.Flatten())], "KnowledgeDistillation .*several labels"),
        (bce_with_logits, [FocalLoss(2.0, [0.5] * LABELS)], "alpha is a list, and the loss is binary"),
    ],
)
def test_what_is_no_loss_of_several_labels_is_rejected_by_name(loss, tricks, message):
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        Module(loss, [IMAGE, HOT.float()]).fit(*tricks)


@pytest.mark.parametrize(
    ("batch", "where", "inputs"),
    [
        ([IMAGE, HOT], (1,), {(0,)}),
        ([IMAGE, HOT.float()], (1,), {(0,)}),
        ({"image": IMAGE, "age": AGE, "labels": HOT.float()}, ("labels",), {("image",)}),
        ([IMAGE, AGE, HOT], (2,), {(0,)}),  # integers before floats
        ([IMAGE, AGE, CLASS], (2,), {(0,)}),  # one label an item before several
        ({"x": AGE, "target": HOT}, ("target",), {("x",)}),
        ({"image": IMAGE, "label": HOT.bool()}, ("label",), {("image",)}),
    ],
)
def test_several_labels_are_found(batch, where, inputs):
    found, at, _ = find(batch, "MixUp")
    assert (set(found), at) == (inputs, where)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([IMAGE, AGE, HOT.float()], "2 tensors that could be the target"),
        ([AGE, HOT.float()], "no target"),  # a table and a table
        ([IMAGE, CLASS.float()], r"no target.*Floats of shape \(N,\).*label\.long\(\)"),
        ({"image": IMAGE, "label": CLASS.double()}, r"no target.*Floats of shape \(N,\)"),
        ([IMAGE, CLASS.bool()], "no target"),
    ],
)
@pytest.mark.parametrize("trick", ["MixUp", "CutMix", "LabelSmoothing", "FocalLoss"])
def test_what_is_no_label_is_rejected_by_name(batch, message, trick):
    with pytest.raises(RuntimeError, match=f"(?s)^{trick} found {message}"):
        find(batch, trick)


# ---------------------------------------------------------------------------------------------------------------------
# What is mixed


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


@pytest.mark.parametrize("trick", [MixUp, CutMix])
def test_what_is_left_is_logged_once(trick):
    with log_lines() as records:
        module = Module(cross_entropy, {"image": IMAGE, "age": AGE, "id": CLASS, "label": CLASS}, at=("image", "label"))
        module.fit(trick(1.0))
    [line] = [record.getMessage() for record in records if "leaves" in record.getMessage()]
    assert line.startswith(f"{trick.__name__}: mixes image and leaves age (float32 (6, 3)), id (int64 (6,))")
    assert "inputs" in line
    assert torch.equal(module.got["age"], AGE)
    assert not torch.equal(module.got["image"], IMAGE)


def test_several_inputs_that_are_mixed_by_default_are_logged():
    points = torch.rand(len(CLASS), 5, 2)
    for inputs, expected in ((None, ["MixUp: mixes image, points; `inputs` chooses what is mixed"]), (["image"], None)):
        with log_lines() as records:
            Module(cross_entropy, {"image": IMAGE, "points": points, "label": CLASS}, at=("image", "label")).fit(
                MixUp(1.0, inputs=inputs)
            )
        lines = [record.getMessage() for record in records[1:]]
        assert lines == expected or "leaves points" in lines[0]


def test_nothing_is_logged_where_nothing_is_left():
    with log_lines() as records:
        Module(cross_entropy, [IMAGE, CLASS]).fit(MixUp(1.0))
    assert len(records) == 1


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ({"image": IMAGE, "age": AGE, "label": CLASS}, ["image", "age"]),
        ([IMAGE, AGE, CLASS], [0, 1]),
        ([IMAGE, AGE, CLASS], ["0", 1]),
        ({"image": IMAGE, "more": {"age": AGE}, "label": CLASS}, ["image", "more"]),
        ({"image": IMAGE, "more": {"age": AGE}, "label": CLASS}, ["image", "more.age"]),
        ({"image": IMAGE, "more": [AGE], "label": CLASS}, ["more.0", "image"]),
    ],
)
def test_mixup_mixes_the_inputs_that_are_named(batch, inputs):
    at = (0, -1) if isinstance(batch, list) else ("image", "label")
    module = Module(cross_entropy, batch, at).fit(MixUp(1.0, inputs=inputs))
    got = module.got
    age = got[1] if isinstance(got, list) else got["age"] if "age" in got else got["more"]
    age = age if isinstance(age, Tensor) else age["age"] if isinstance(age, dict) else age[0]
    lam = module.lam["mixup/lambda"]
    of = partners(got[at[0]], IMAGE, lam)
    torch.testing.assert_close(age, lam * AGE + (1 - lam) * AGE[of])


def test_mixup_mixes_only_what_is_named():
    module = Module(cross_entropy, {"image": IMAGE, "depth": IMAGE, "label": CLASS}, ("image", "label"))
    module.fit(MixUp(1.0, inputs=["depth"]))
    assert torch.equal(module.got["image"], IMAGE)
    assert not torch.equal(module.got["depth"], IMAGE)


def test_two_mixers_may_have_other_inputs():
    batch = {"image": IMAGE, "depth": IMAGE, "label": CLASS}
    module = Module(cross_entropy, batch, ("image", "label")).fit(MixUp(inputs=["image"]), CutMix(inputs=["depth"]))
    assert torch.equal(module.got["image"], IMAGE) != torch.equal(module.got["depth"], IMAGE)


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        (lambda: MixUp(inputs=["depth"]), r"MixUp\(inputs=\['depth'\]\).*age \(float32"),
        (lambda: MixUp(inputs=["id"]), r"MixUp\(inputs=\['id'\]\)"),
        (lambda: MixUp(inputs=[7]), r"MixUp\(inputs=\[7\]\)"),
        (lambda: CutMix(inputs=["age"]), "CutMix cuts images"),
        (lambda: MixUp(inputs=["label"]), r"MixUp\(inputs=\['label'\]\)"),
    ],
)
def test_inputs_that_can_not_be_mixed_are_rejected(trick, message):
    batch = {"image": IMAGE, "age": AGE, "id": CLASS, "label": CLASS}
    with pytest.raises(RuntimeError, match=message):
        Module(cross_entropy, batch, ("image", "label")).fit(trick())


@pytest.mark.parametrize("trick", [MixUp, CutMix])
@pytest.mark.parametrize("inputs", ["image", [], [1.5], [True], [""], [-1], [None], 3, {}])
def test_rejects_what_is_no_list_of_names(trick, inputs):
    with pytest.raises(ValueError, match=f"{trick.__name__}.inputs="):
        trick(inputs=inputs)
