"""The loss that modules of others compute under the loss tricks, against the formula in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from _clients import network
from helpers.fits import make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_tricks import Classifier
from lit_tricks.callbacks import (
    BinaryCrossEntropy,
    FocalLoss,
    GeneralizedCrossEntropy,
    KnowledgeDistillation,
    LabelSmoothing,
    MixUp,
)
from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.batch import find

pytestmark = pytest.mark.clients

SMOOTHING, GAMMA, Q, THRESHOLD, CLASSES, IGNORED = 0.3, 2.0, 0.7, 0.2, 4, 0


class Images(Dataset[Any]):
    """Noise, as dicts of an image and a label or mask, or as lists of an image, a label and a file name."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.kind = kind
        self.images = torch.rand(8, 3, 32, 32, generator=generator)
        self.masks = torch.randint(CLASSES, (8, 32, 32), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], torch.tensor(index % CLASSES)
        if self.kind == "list":
            return [image, label, f"{index}.jpg"]
        if self.kind == "tuple":
            return image, label
        if self.kind == "target":
            return {"input": image, "target": label}
        return {"image": image, "mask": self.masks[index]} if self.kind == "mask" else {"image": image, "label": label}


def classifier() -> Any:
    module = Classifier(network(CLASSES), num_classes=CLASSES, input_size=(3, 32, 32))
    return module, module.model, "tuple", "lightning"


def uq_box() -> Any:
    methods = pytest.importorskip("lightning_uq_box.uq_methods")
    module = methods.DeterministicClassification(
        network(CLASSES), loss_fn=nn.CrossEntropyLoss(), optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    return module, module.model, "target", "lightning"


def lightly() -> Any:
    benchmarking = pytest.importorskip("lightly.utils.benchmarking")
    features = network(classes=0)
    module = benchmarking.LinearClassifier(features, 4, 6.4, features.num_features, num_classes=CLASSES, topk=(1,))
    return module, module.classification_head, "list", "pytorch_lightning"


def torchgeo(task: str) -> Any:
    pytest.importorskip("torchgeo")
    try:
        tasks, suffix = importlib.import_module("torchgeo.tasks"), ""
    except ModuleNotFoundError:  # in the last torchgeo for Python 3.11
        tasks, suffix = importlib.import_module("torchgeo.trainers"), "Task"
    if task == "Classification":
        module = getattr(tasks, task + suffix)(model="test_resnet", weights=None, num_classes=CLASSES)
        return module, module.model, "label", "lightning"
    module = getattr(tasks, task + suffix)(
        model="fcn", backbone=None, num_filters=4, weights=None, num_classes=CLASSES, ignore_index=IGNORED
    )
    return module, module.model, "mask", "lightning"


CLIENTS: dict[str, Callable[[], Any]] = {
    "Classifier": classifier,
    "lightning-uq-box": uq_box,
    "lightly": lightly,
    "torchgeo, classification": partial(torchgeo, "Classification"),
    "torchgeo, segmentation": partial(torchgeo, "SemanticSegmentation"),
}
STACKS: dict[str, list[Callable[[], Trick]]] = {
    "no trick": [],
    "smoothing": [lambda: LabelSmoothing(SMOOTHING)],
    "focal": [lambda: FocalLoss(GAMMA)],
    "mixup": [lambda: MixUp(alpha=1.0)],
    "generalized": [lambda: GeneralizedCrossEntropy(Q), lambda: MixUp(alpha=1.0), lambda: LabelSmoothing(SMOOTHING)],
    "binary": [lambda: BinaryCrossEntropy(THRESHOLD), lambda: MixUp(alpha=1.0), lambda: LabelSmoothing(SMOOTHING)],
    "all": [lambda: FocalLoss(GAMMA), lambda: MixUp(alpha=1.0), lambda: LabelSmoothing(SMOOTHING)],
}


class Recorder(Trick):
    """Keeps batches as they were before the tricks, and what the module made of them. To be the first callback."""

    def __init__(self, net: nn.Module) -> None:
        self.before: list[tuple[Tensor, Tensor]] = []
        self.after: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.losses: list[float] = []
        self.net = net

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.change_training_batches(trainer, self.keep)
        self.trainer = trainer
        self.net.register_forward_hook(self.computed)

    def computed(self, net: nn.Module, args: Any, output: Tensor) -> None:
        if self.trainer.training:
            self.logits.append(output.detach())

    def keep(self, batch: Any) -> Any:
        [image], _, label = self.of(batch)
        self.before.append((image, label))
        return batch

    def of(self, batch: Any) -> Any:
        inputs, where, label = find(batch, "Recorder")
        return list(inputs.values()), where, label

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(self.of(batch)[0][0])
        self.losses.append(float(outputs["loss"]))


def partner_of(mixed: Tensor, image: Tensor, share: float) -> list[int]:
    """Return the image that each image was mixed with."""
    partners = []
    for i in range(len(mixed)):
        error = (mixed[i] - share * image[i] - (1 - share) * image).abs().amax((1, 2, 3))
        assert error.min() < 1e-5
        partners.append(int(error.argmin()))
    return partners


def expected(logits: Tensor, label: Tensor, other: Tensor, share: float, tricks: set[type], ignored: int) -> float:
    log_p = logits.double().log_softmax(1)
    smoothing = SMOOTHING if LabelSmoothing in tricks else 0.0
    distribution = torch.zeros_like(log_p)
    shares = torch.zeros_like(log_p)
    known = torch.zeros(label.shape, dtype=torch.float64)
    for labels, part in ((label, share), (other, 1 - share)):
        one_hot = nn.functional.one_hot(labels, CLASSES).movedim(-1, 1).double()
        valid = part * (labels != ignored).double()
        known += valid
        shares += valid.unsqueeze(1) * one_hot
        distribution += valid.unsqueeze(1) * ((1 - smoothing) * one_hot + smoothing / CLASSES)
    if BinaryCrossEntropy in tricks:
        present = (shares / known.clamp(min=1e-12).unsqueeze(1) > THRESHOLD).double()
        target = present * (1 - smoothing) + smoothing / CLASSES
        log_odds = -(target * nn.functional.logsigmoid(logits.double()))
        log_odds -= (1 - target) * nn.functional.logsigmoid(-logits.double())
        return float((known * log_odds.sum(1)).sum() / known.sum())
    loss = -(distribution * log_p).sum(1)
    if GeneralizedCrossEntropy in tricks:
        loss = (distribution * (1 - log_p.exp() ** Q) / Q).sum(1)
    if FocalLoss in tricks:
        p = (distribution * log_p.exp()).sum(1) / known.clamp(min=1e-12)
        loss = loss * (1 - p) ** GAMMA
    return float(loss.sum() / known.sum())


@pytest.mark.filterwarnings("ignore")  # of the clients
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("client", CLIENTS)
def test_loss_is_that_of_the_formula(client, stack):
    torch.manual_seed(0)
    module, net, kind, namespace = CLIENTS[client]()
    tricks = [make() for make in STACKS[stack]]
    recorder = Recorder(net)
    trainer = make_trainer(recorder, *tricks, namespace=namespace, max_epochs=2, limit_val_batches=1)
    trainer.fit(module, DataLoader(Images(kind), batch_size=4), DataLoader(Images(kind), batch_size=4))
    shares = [1.0] * 4
    if MixUp in map(type, tricks):
        shares = [trainer.logger.metrics[step]["mixup/lambda"] for step in range(4)]
        assert len(set(shares)) == 4
    assert len(recorder.losses) == len(recorder.logits) == len(recorder.before) == 4
    for (image, label), mixed, logits, loss, share in zip(
        recorder.before, recorder.after, recorder.logits, recorder.losses, shares, strict=True
    ):
        other = label[partner_of(mixed, image, share)]
        ignored = IGNORED if kind == "mask" else -100
        assert loss == pytest.approx(
            expected(logits, label, other, share, set(map(type, tricks)), ignored), rel=1e-6, abs=1e-6
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client", CLIENTS)
def test_distilled_loss_is_that_of_the_formula(client):
    torch.manual_seed(0)
    module, net, kind, namespace = CLIENTS[client]()
    teacher = nn.Conv2d(3, CLASSES, 1) if kind == "mask" else network(CLASSES).eval()
    recorder, t = Recorder(net), 4.0
    trainer = make_trainer(
        recorder, KnowledgeDistillation(teacher, temperature=t, alpha=0.25), namespace=namespace, max_epochs=2
    )
    trainer.fit(module, DataLoader(Images(kind), batch_size=4), DataLoader(Images(kind), batch_size=4))
    assert len(recorder.losses) == len(recorder.logits) == 4
    for (_, label), image, logits, loss in zip(
        recorder.before, recorder.after, recorder.logits, recorder.losses, strict=True
    ):
        with torch.no_grad():
            log_p = teacher(image).double().div(t).log_softmax(1)
        log_q, known = logits.double().div(t).log_softmax(1), label != (IGNORED if kind == "mask" else -100)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)[known].mean()
        labels = nn.functional.cross_entropy(logits.double(), label, ignore_index=IGNORED if kind == "mask" else -100)
        assert loss == pytest.approx(float(0.75 * labels + 0.25 * t**2 * divergence), rel=1e-6, abs=1e-6)
