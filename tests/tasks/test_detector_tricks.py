"""The tricks on a Detector: those that work on weights, rates and layers act; the others say why they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import schedule_free
from helpers.detectors import detector, trainer
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lit_tricks import Detector, callbacks
from lit_tricks.callbacks.base import Trick
from lit_tricks.data import DigitDetection


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def fitted(*tricks: Callback, **kwargs: Any) -> tuple[Detector, Trainer]:
    module, run = detector(**kwargs), trainer(*tricks)
    run.fit(module, DigitDetection(batch_size=4))
    return module, run


class Rates(Callback):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.fixture(scope="module")
def plain() -> tuple[Tensor, list[float]]:
    """Weights and rates without a trick."""
    rates = Rates()
    module, _ = fitted(rates)
    assert rates.seen == [0.02] * 3
    return weights(module), rates.seen


# What each does in the three steps of a fit: a trick, what it logs, and whether training itself comes out differently.
ACT: dict[str, tuple[Callable[[], Trick], str, bool]] = {
    "ChannelsLast": (callbacks.ChannelsLast, "channels_last/filters", False),
    "Compile": (lambda: callbacks.Compile(layers=["model.backbone"], backend="eager"), "compile/layers", False),
    "DropPath": (lambda: callbacks.DropPath(rate=0.5), "drop_path/kept", True),
    "EMA": (lambda: callbacks.EMA(decay=0.5), "ema/decay", True),
    "Freeze": (callbacks.Freeze, "freeze/trained", True),
    "L1Penalty": (lambda: callbacks.L1Penalty(strength=0.01, threshold=0.1), "l1_penalty/sparsity", True),
    "LayerDecay": (callbacks.LayerDecay, "layer_decay/lowest", True),
    "LinearScaling": (lambda: callbacks.LinearScaling(base_batch_size=2, batch_size=4), "linear_scaling/factor", True),
    "Lookahead": (lambda: callbacks.Lookahead(k=2), "lookahead/alpha", True),
    "Muon": (callbacks.Muon, "muon/lr", True),
    "NoBiasDecay": (callbacks.NoBiasDecay, "no_bias_decay/share", True),
    "PreciseBN": (lambda: callbacks.PreciseBN(num_samples=8), "precise_bn/shift", False),
    "ScheduleFree": (schedule_free.ReplacedScheduleFree, "schedule_free/distance", True),
    "SWA": (lambda: callbacks.SWA(lr=0.01, start=0.25), "swa/averaged", True),
    "Unfreeze": (lambda: callbacks.Unfreeze({"backbone": 0.4}, unit="run"), "unfreeze/trained", True),
    "WarmupCosine": (lambda: callbacks.WarmupCosine(warmup_epochs=0.5), "lr-SGD", True),
    "WarmupExponential": (lambda: callbacks.WarmupExponential(every_n_epochs=0.5, warmup_epochs=0.5), "lr-SGD", True),
    "WarmupLinear": (lambda: callbacks.WarmupLinear(warmup_epochs=0.5), "lr-SGD", True),
    "WarmupPoly": (callbacks.WarmupPoly, "lr-SGD", True),
    "WarmupStableDecay": (lambda: callbacks.WarmupStableDecay(decay=0.3, warmup_epochs=0.5), "lr-SGD", True),
    "WarmupStep": (lambda: callbacks.WarmupStep(milestones=[1], warmup_epochs=0.5), "lr-SGD", True),
    "WhitenedStem": (lambda: callbacks.WhitenedStem(images=4), "whitened_stem/condition", True),
    "XavierInit": (callbacks.XavierInit, "xavier_init/growth", True),
    "ZeroGamma": (callbacks.ZeroGamma, "zero_gamma/scale", True),
}
REJECTED: dict[str, tuple[Callable[[], Trick], str]] = {
    "BinaryCrossEntropy": (
        lambda: callbacks.BinaryCrossEntropy(prior_bias=False),
        "BinaryCrossEntropy works on a label .* are boxes.*leave BinaryCrossEntropy out",
    ),
    "ClassBalanced": (callbacks.ClassBalanced, "ClassBalanced works on a label of each image, .* are boxes"),
    "CutMix": (callbacks.CutMix, "CutMix works on a label of each image, .* are boxes.*leave CutMix out"),
    "FixRes": (lambda: callbacks.FixRes(test_size=None), "FixRes works on the classifier .* are boxes"),
    "FocalLoss": (callbacks.FocalLoss, "FocalLoss works on a label of each image, .* are boxes.*leave FocalLoss out"),
    "GeneralizedCrossEntropy": (
        callbacks.GeneralizedCrossEntropy,
        "GeneralizedCrossEntropy works on a label .* are boxes.*leave GeneralizedCrossEntropy out",
    ),
    "KnowledgeDistillation": (
        lambda: callbacks.KnowledgeDistillation(nn.Linear(1, 1)),
        "KnowledgeDistillation works on a label .* are boxes.*leave KnowledgeDistillation out",
    ),
    "LabelSmoothing": (callbacks.LabelSmoothing, "LabelSmoothing works on a label .* are boxes.*leave LabelSmoothing"),
    "LogitAdjustment": (callbacks.LogitAdjustment, "LogitAdjustment works on a label of each image, .* are boxes"),
    "MixUp": (callbacks.MixUp, "MixUp works on a label of each image, .* are boxes.*leave MixUp out"),
    "ProgressiveResizing": (callbacks.ProgressiveResizing, "ProgressiveResizing works on images .* are boxes"),
    "TemperatureScaling": (
        callbacks.TemperatureScaling,
        "TemperatureScaling works on a label .* are boxes.*leave Temp",
    ),
    "TestTimeAugment": (callbacks.TestTimeAugment, "TestTimeAugment averages .* boxes have no mean over views"),
}


def test_every_trick_is_here() -> None:
    assert {*ACT, *REJECTED} == set(callbacks.__all__)


@pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network")
@pytest.mark.parametrize("name", REJECTED)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_trick_without_boxes_is_rejected_before_a_step(name: str, batch_size: int) -> None:
    """Also for one image, whose labels could be taken for those of as many images."""
    make, message = REJECTED[name]
    module = detector()
    before = weights(module)
    with pytest.raises(RuntimeError, match=f"(?s)^{message}"):
        trainer(make(), limit_train_batches=1).fit(module, DigitDetection(batch_size=batch_size))
    if name not in ("TemperatureScaling", "TestTimeAugment"):  # which act in the validation
        assert torch.equal(weights(module), before)


@pytest.mark.filterwarnings("ignore:SWA averages the statistics")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "Compile")) for name in ACT])
def test_trick_on_weights_rates_and_layers_acts(name: str, plain: tuple[Tensor, list[float]]) -> None:
    make, logged, differs = ACT[name]
    rates = Rates()
    module, run = fitted(make(), rates)
    assert logged in run.callback_metrics
    found, (expected, rates_before) = weights(module), plain
    assert torch.isfinite(found).all()
    if differs:
        assert not torch.allclose(found, expected, atol=1e-6)
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    if logged == "lr-SGD" or name == "LinearScaling":
        assert rates.seen != rates_before
    assert 0 <= float(run.callback_metrics["val/map"]) <= 1


@pytest.mark.parametrize("model", ["faster_rcnn", "retinanet"])
def test_tricks_work_together(model: str) -> None:
    stack = [callbacks.EMA(decay=0.5), callbacks.PreciseBN(num_samples=8), callbacks.WarmupCosine(warmup_epochs=0.5)]
    _, run = fitted(*stack, callbacks.NoBiasDecay(), callbacks.ZeroGamma(), model=model)
    assert {"ema/decay", "precise_bn/shift", "val/map"} <= run.callback_metrics.keys()


def test_precise_bn_has_the_statistics_of_the_images() -> None:
    """The first layer has the mean and variance of its convolution's output for the training images."""
    torch.manual_seed(0)
    module = detector(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    data = DigitDetection(batch_size=4, scale=(1.0, 1.0))
    run = trainer(callbacks.PreciseBN(num_samples=1000, when="end"))
    run.fit(module, data)
    net: Any = module.model.get_submodule("backbone.body.net")
    layers = list(net.conv1)  # of the deep stem
    images = torch.stack([image for image, _ in (data.train_dataloader().dataset[i] for i in range(1000))])
    with torch.no_grad():
        values = layers[0](images)
    torch.testing.assert_close(layers[1].running_mean, values.mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layers[1].running_var, values.var((0, 2, 3)), atol=1e-3, rtol=1e-3)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint` is deprecated")  # torchvision's non-maximum suppression
def test_compile_takes_the_whole_detector_too() -> None:
    module, run = fitted(callbacks.Compile(backend="eager"))
    assert float(run.callback_metrics["compile/layers"]) == 1
    assert torch.isfinite(weights(module)).all()
