"""Every trick on a Segmenter: it acts, and is right, or raises an error. Numbers against formulas in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import log_lines, make_trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_tricks import Segmenter, callbacks
from lit_tricks.data import DigitSegmentation

K, IGNORED, SIDE, BATCH = 4, 255, 16, 4


class Plain(Segmenter):
    """Without dropout, and with what its network and its loss were given in the last training step."""

    def __init__(self, **args: Any) -> None:
        torch.manual_seed(0)
        small = {"depth": 18, "width": 0.0625, "small_input": True}
        defaults: dict[str, Any] = {"num_classes": K, "model_args": small, "input_size": (1, SIDE, SIDE)}
        super().__init__(**(defaults | {"optimizer": sgd} | args))
        for part in self.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        self.model.register_forward_hook(self.look)

    def look(self, net: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if net.training and torch.is_grad_enabled():
            self.images, self.logits = args[0].detach(), output[0].detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.masks = batch[1]
        loss = super().training_step(batch, batch_idx)
        self.step_loss = loss.item()
        return loss


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def samples(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    masks = torch.randint(K, (count, SIDE, SIDE), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = IGNORED
    return list(zip(images, masks, strict=True))


def loader(count: int = BATCH, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(samples(count, seed), batch_size=BATCH)


def fit(*tricks: Any, steps: int = 1, module: Plain | None = None, **trainer: Any) -> Plain:
    """A fit of so many steps in one epoch, with a validation; ``module.trainer`` is that of the fit."""
    module = Plain() if module is None else module
    settings: dict[str, Any] = {"max_epochs": 1}
    run = make_trainer(*tricks, **(settings | trainer))
    torch.manual_seed(0)
    run.fit(module, loader(steps * BATCH), loader(BATCH, seed=7))
    return module


def log_p(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (pixels, K) in float64."""
    return logits.double().log_softmax(1).movedim(1, -1).flatten(0, -2)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def cross_entropy(logits: Tensor, masks: Tensor, smoothing: float = 0.0, gamma: float = 0.0) -> float:
    p, labels = log_p(logits), masks.flatten()
    p, labels = p[labels != IGNORED], labels[labels != IGNORED]
    target = F.one_hot(labels, K).double() * (1 - smoothing) + smoothing / K
    chosen = (p.exp() * target).sum(1)
    return float(((1 - chosen) ** gamma * -(p * target).sum(1)).mean())


def batch() -> tuple[Tensor, Tensor]:
    images, masks = zip(*samples(BATCH), strict=True)
    return torch.stack(images), torch.stack(masks)


def test_loss_without_tricks_is_cross_entropy() -> None:
    module = fit()
    assert torch.equal(module.images, batch()[0])
    assert module.step_loss == pytest.approx(cross_entropy(module.logits, batch()[1]), rel=1e-5)


def test_label_smoothing_and_focal_loss() -> None:
    masks = batch()[1]
    module = fit(callbacks.LabelSmoothing(0.2, convention="torch"))
    assert module.step_loss == pytest.approx(cross_entropy(module.logits, masks, smoothing=0.2), rel=1e-5)
    module = fit(callbacks.FocalLoss(gamma=2.0))
    assert module.step_loss == pytest.approx(cross_entropy(module.logits, masks, gamma=2.0), rel=1e-5)
    own = fit(module=Plain(loss="focal", gamma=2.0))
    assert own.step_loss == pytest.approx(module.step_loss, rel=1e-6)
    with pytest.raises(RuntimeError, match="loss is focal"):
        fit(callbacks.FocalLoss(), module=Plain(loss="focal"))


def test_a_loss_that_is_focal_by_itself_goes_with_smoothing() -> None:
    """As the two tricks go together."""
    together = fit(callbacks.FocalLoss(gamma=1.5), callbacks.LabelSmoothing(0.1))
    own = fit(callbacks.LabelSmoothing(0.1), module=Plain(loss="focal", gamma=1.5))
    assert own.step_loss == pytest.approx(together.step_loss, rel=1e-6)


def test_generalized_cross_entropy() -> None:
    module = fit(callbacks.GeneralizedCrossEntropy(0.7), callbacks.LabelSmoothing(0.2))
    p, labels = log_p(module.logits).exp(), batch()[1].flatten()
    target = F.one_hot(labels.clamp(max=K - 1), K).double() * 0.8 + 0.2 / K
    expected = (target * (1 - p**0.7) / 0.7).sum(1)[labels != IGNORED].mean()
    assert module.step_loss == pytest.approx(float(expected), rel=1e-5)


def test_binary_cross_entropy() -> None:
    module = fit(callbacks.BinaryCrossEntropy(), module=Plain(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)))
    logits, labels = module.logits.double().movedim(1, -1).flatten(0, -2), batch()[1].flatten()
    target = F.one_hot(labels.clamp(max=K - 1), K).double()
    expected = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)[labels != IGNORED].mean()
    assert module.step_loss == pytest.approx(float(expected), rel=1e-5)
    bias = module.get_parameter("model.decoder.body.layers.4.bias")
    assert bias.tolist() == pytest.approx([-math.log(K - 1)] * K)


def test_the_auxiliary_loss_is_smoothed_as_well() -> None:
    heads: list[Tensor] = []
    module = Plain(aux_weight=0.5)
    module.criterion.register_forward_hook(lambda layer, args, loss: heads.append(args[0].detach()))
    fit(callbacks.LabelSmoothing(0.2, convention="torch"), module=module)
    main, aux = (cross_entropy(logits, batch()[1], smoothing=0.2) for logits in heads[:2])
    assert module.step_loss == pytest.approx(main + 0.5 * aux, rel=1e-5)


def partners(images: Tensor, mixed: Tensor, lam: float) -> list[int]:
    """Whom each image was mixed with."""
    return [
        next(j for j in range(BATCH) if torch.allclose(lam * images[i] + (1 - lam) * images[j], mixed[i], atol=1e-4))
        for i in range(BATCH)
    ]


def test_mixup_mixes_masks_pixel_by_pixel() -> None:
    """An ignored label counts for nothing, and the other one of the pixel for its share."""
    images, masks = batch()
    module = fit(callbacks.MixUp(alpha=1.0))
    lam = float(module.trainer.logged_metrics["mixup/lambda"])  # type: ignore[attr-defined]
    order = partners(images, module.images, lam)
    assert order != list(range(BATCH))
    total = weight = 0.0
    p = log_p(module.logits)
    for labels, share in ((masks.flatten(), lam), (masks[order].flatten(), 1 - lam)):
        known = labels != IGNORED
        total += share * float(-p[known].gather(1, labels[known, None]).sum())
        weight += share * int(known.sum())
    assert module.step_loss == pytest.approx(total / weight, rel=1e-5)


def test_cutmix_cuts_masks_as_images() -> None:
    images, masks = batch()
    module = fit(callbacks.CutMix(alpha=1.0))
    seen = torch.as_tensor(module.masks).as_subclass(Tensor)
    cut = 0
    for i, row, column in itertools.product(range(BATCH), range(SIDE), range(SIDE)):
        pixel = module.images[i, 0, row, column]
        source = next(j for j in range(BATCH) if images[j, 0, row, column] == pixel)
        assert seen[i, row, column] == masks[source, row, column]
        cut += source != i
    assert cut
    assert module.step_loss == pytest.approx(cross_entropy(module.logits, seen), rel=1e-5)


def distilled(module: Plain, teacher: Segmenter, temperature: float) -> float:
    """Cross entropy, and T^2 times the divergence, over the pixels that are not ignored."""
    images, masks = batch()
    with torch.no_grad():
        taught = log_p(teacher.eval()(images) / temperature)
    student, known = log_p(module.logits / temperature), masks.flatten() != IGNORED
    divergence = (taught.exp() * (taught - student)).sum(1)[known].mean()
    return cross_entropy(module.logits, masks) + temperature**2 * float(divergence)


def test_a_segmenter_teaches_one(tmp_path: Path) -> None:
    torch.manual_seed(5)
    teacher = Segmenter(num_classes=K, model_args={"depth": 18, "width": 0.125}, input_size=(1, SIDE, SIDE))
    module = fit(callbacks.KnowledgeDistillation(teacher, temperature=3.0))
    assert module.step_loss == pytest.approx(distilled(module, teacher, 3.0), rel=1e-4)
    trainer = make_trainer(max_epochs=0)
    trainer.fit(teacher, loader(), loader())
    trainer.save_checkpoint(tmp_path / "teacher.ckpt", weights_only=False)
    again = fit(callbacks.KnowledgeDistillation(str(tmp_path / "teacher.ckpt"), temperature=3.0))
    assert again.step_loss == pytest.approx(module.step_loss, rel=1e-6)
    other = Segmenter(num_classes=K + 1, model_args={"depth": 18, "width": 0.125}, input_size=(1, SIDE, SIDE))
    with pytest.raises(RuntimeError, match=r"teacher .*5 classes.*student 4"):
        fit(callbacks.KnowledgeDistillation(other))


# ---------------------------------------------------------------------------------------------------------------------
# Weights and averages


class Follow(Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


def test_ema_and_swa() -> None:
    follow = Follow()
    module = fit(callbacks.EMA(decay=0.7, warmup=False), follow, steps=5)
    average = follow.weights[0]
    for weights in follow.weights[1:]:
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in average}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.double(), average[name], rtol=1e-4, atol=1e-6)

    follow = Follow()
    module = fit(callbacks.SWA(lr=0.05, start=0.5), callbacks.PreciseBN(num_samples=8), follow, steps=2, max_epochs=4)
    mean = {name: (follow.weights[5][name] + follow.weights[7][name]) / 2 for name in average}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.double(), mean[name], rtol=1e-4, atol=1e-6)


def test_validation_uses_the_average() -> None:
    module = fit(callbacks.EMA(decay=0.7), steps=4)
    images, masks = (torch.stack(each) for each in zip(*samples(BATCH, seed=7), strict=True))
    with torch.no_grad():
        expected = cross_entropy(module.eval()(images), masks)
    assert float(module.trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def test_precise_bn_estimates_statistics_of_all_images() -> None:
    """The first layer has the mean and variance of its inputs over all training images."""
    module = fit(callbacks.PreciseBN(num_samples=12), steps=3)
    net: Any = module.model.backbone.net
    images = torch.stack([image for image, _ in samples(12)])
    with torch.no_grad():
        inputs = net.conv1[0](images).double()
    torch.testing.assert_close(net.conv1[1].running_mean.double(), inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    norms = [part for part in module.model.decoder.modules() if isinstance(part, nn.BatchNorm2d)]
    plain = fit(steps=3)
    others = [part for part in plain.model.decoder.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) == 1
    assert not torch.allclose(norms[0].running_mean, others[0].running_mean)


def test_l1_penalty_pulls_at_the_weights() -> None:
    strength = 0.01
    tricks = ([callbacks.L1Penalty(strength=strength)], [])
    moved, plain = (fit(*each, module=Plain(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))) for each in tricks)
    before = dict(Plain().named_parameters())
    found = 0
    for (name, one), other in zip(moved.named_parameters(), plain.parameters(), strict=True):
        expected = other - 0.1 * strength * before[name].sign() if one.dim() > 1 else other
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)
        found += one.dim() > 1
    assert found > 20


# ---------------------------------------------------------------------------------------------------------------------
# Starts and optimizers


def groups(module: Plain) -> list[dict[str, Any]]:
    [optimizer] = module.trainer.optimizers
    return optimizer.param_groups  # type: ignore[no-any-return]


def test_no_bias_decay_and_linear_scaling() -> None:
    module = fit(callbacks.NoBiasDecay(), callbacks.LinearScaling(base_batch_size=16, batch_size=4))
    decays = {id(p): group["weight_decay"] for group in groups(module) for p in group["params"]}
    assert {decays[id(p)] for p in module.parameters() if p.dim() > 1} == {0.01}
    assert {decays[id(p)] for p in module.parameters() if p.dim() == 1} == {0}
    assert {group["lr"] for group in groups(module)} == {0.1 * 4 / 16}


def test_zero_gamma_and_xavier() -> None:
    still = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}
    module = fit(callbacks.ZeroGamma(), callbacks.XavierInit(), module=Plain(**still))
    net: Any = module.model.backbone.net
    last = [block.bn2 for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
    assert all((norm.weight == 0).all() for norm in last)
    head: Any = module.model.decoder.body
    others = [m for m in (*net.modules(), *head.modules()) if isinstance(m, nn.BatchNorm2d) and m not in last]
    assert all((norm.weight == 1).all() for norm in others)
    for conv in (part for part in module.modules() if isinstance(part, nn.Conv2d)):
        out, inputs, height, width = conv.weight.shape
        bound = math.sqrt(6 / ((inputs + out) * height * width))
        assert 0.8 * bound < conv.weight.abs().max() <= bound
    assert (head.layers[4].bias == 0).all()


RATES: dict[str, tuple[Callable[[], Any], Callable[[int], float]]] = {
    "WarmupCosine": (
        lambda: callbacks.WarmupCosine(warmup_epochs=1),
        lambda step: 0.1 * (step + 1) / 2 if step < 2 else 0.05 * (1 + math.cos(math.pi * (step - 2) / 6)),
    ),
    "WarmupStep": (
        lambda: callbacks.WarmupStep(milestones=[2, 3], gamma=0.5, warmup_epochs=1),
        lambda step: 0.1 * (step + 1) / 2 if step < 2 else 0.1 * 0.5 ** ((step >= 4) + (step >= 6)),
    ),
    "WarmupLinear": (
        lambda: callbacks.WarmupLinear(warmup_epochs=1),
        lambda step: 0.1 * (step + 1) / 2 if step < 2 else 0.1 * (1 - (step - 2) / 6),
    ),
    "WarmupPoly": (callbacks.WarmupPoly, lambda step: 0.1 * (1 - step / 8) ** 0.9),
    "WarmupStableDecay": (
        lambda: callbacks.WarmupStableDecay(decay=0.5, shape="linear", warmup_epochs=1),
        lambda step: 0.1 * min((step + 1) / 2, 1.0, (8 - step) / 4),
    ),
    "WarmupExponential": (
        lambda: callbacks.WarmupExponential(gamma=0.5, every_n_epochs=1, warmup_epochs=1),
        lambda step: 0.1 * (step + 1) / 2 if step < 2 else 0.1 * 0.5 ** ((step - 2) // 2),
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_schedules_set_learning_rates(name: str) -> None:
    make, rate = RATES[name]
    rates: list[float] = []

    class Look(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    fit(make(), steps=2, max_epochs=4, module=Look())
    assert rates == pytest.approx([rate(step) for step in range(8)], abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# How it runs


def test_channels_last_changes_nothing_but_the_layout() -> None:
    formats: list[bool] = []

    class Look(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            weight = self.model.decoder.body.layers[0].weight  # type: ignore[index]
            formats.append(weight.is_contiguous(memory_format=torch.channels_last))

    module, plain = fit(callbacks.ChannelsLast(), module=Look()), fit()
    assert formats == [True]
    assert module.step_loss == pytest.approx(plain.step_loss, rel=1e-4)


@pytest.mark.parametrize("aux_weight", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_compiled_segmenter_trains_as_plain_one(aux_weight: float) -> None:
    tricks = [callbacks.LabelSmoothing(0.1), callbacks.EMA(decay=0.9)]
    compiled = fit(callbacks.Compile(backend="eager"), *tricks, steps=2, module=Plain(aux_weight=aux_weight))
    plain = fit(*tricks, steps=2, module=Plain(aux_weight=aux_weight))
    assert compiled.step_loss == pytest.approx(plain.step_loss, rel=1e-5)
    assert float(compiled.trainer.callback_metrics["val/miou"]) == float(plain.trainer.callback_metrics["val/miou"])


def test_progressive_resizing_takes_the_masks_along() -> None:
    sizes: list[Any] = []

    class Look(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            sizes.append((*self.images.shape[-2:], *self.masks.shape[-2:]))

    trick = callbacks.ProgressiveResizing(start_scale=0.5, end=0.9, multiple_of=8)
    module = fit(trick, steps=4, module=Look())
    assert sizes[0] == (8, 8, 8, 8)
    assert sizes[-1] == (SIDE, SIDE, SIDE, SIDE)
    assert all(len(set(size)) == 1 for size in sizes)
    assert torch.isfinite(torch.tensor(module.step_loss))


def test_drop_path_drops_branches_of_the_encoder() -> None:
    module, plain = fit(callbacks.DropPath(rate=0.9, mode="constant")), fit()
    assert not torch.allclose(module.logits, plain.logits)
    images = batch()[0]
    assert module.step_loss == pytest.approx(cross_entropy(module.logits, batch()[1]), rel=1e-5)
    with torch.no_grad():  # nothing is left of it
        assert torch.equal(module.eval()(images), module(images))


def test_test_time_augment_flips_back() -> None:
    """Validated are the mean probabilities of the image and of its mirror image, flipped back; scales are resized."""
    module = Plain()
    images, masks = (torch.stack(each) for each in zip(*samples(BATCH, seed=7), strict=True))
    trainer = make_trainer(callbacks.TestTimeAugment(flip=True, scales=[1.0, 2.0]))
    found = trainer.validate(module, loader(BATCH, seed=7), verbose=False)[0]
    twin = module.eval()
    with torch.no_grad():
        views = []
        for scale in (1, 2):
            view = images if scale == 1 else F.interpolate(images, scale_factor=2, mode="bilinear", antialias=True)
            for flip in (False, True):
                logits = twin(view.flip(-1) if flip else view)
                logits = logits.flip(-1) if flip else logits
                views.append(F.interpolate(logits, (SIDE, SIDE), mode="bilinear").double().softmax(1))
    mean = torch.stack(views).mean(0)
    known = masks != IGNORED
    p = mean.movedim(1, -1)[known]
    assert found["val/loss"] == pytest.approx(float(-p.gather(1, masks[known][:, None]).log().mean()), rel=1e-5)
    right = (p.argmax(1) == masks[known]).double().mean()
    assert found["val/pixel_accuracy"] == pytest.approx(float(right), abs=1e-6)
    with pytest.raises(RuntimeError, match=r"TestTimeAugment\(crops=5\)"):
        make_trainer(callbacks.TestTimeAugment(crops=5)).validate(module, loader(), verbose=False)


def test_fixres_trains_the_end_of_the_decoder_at_another_size() -> None:
    module = Plain(num_classes=11, input_size=(1, 64, 64))
    make_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(
        module, datamodule=DigitSegmentation(batch_size=4)
    )
    before = copy.deepcopy(module.state_dict())
    sizes: set[Any] = set()
    module.model.register_forward_hook(lambda net, args, out: sizes.add(tuple(args[0].shape[-2:])))
    trainer = make_trainer(callbacks.FixRes(test_size=80), max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, datamodule=DigitSegmentation(batch_size=2))
    assert (80, 80) in sizes
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"1.{name}" for name in norm} | {"4.weight", "4.bias"}
    assert {name for name in moved if name.startswith("model.")} == {f"model.decoder.body.layers.{e}" for e in expected}


# ---------------------------------------------------------------------------------------------------------------------
# All of them

TRICKS: dict[str, Callable[[], Any]] = {
    "CutMix": lambda: callbacks.CutMix(),
    "MixUp": lambda: callbacks.MixUp(),
    "LabelSmoothing": lambda: callbacks.LabelSmoothing(0.1),
    "FocalLoss": lambda: callbacks.FocalLoss(),
    "GeneralizedCrossEntropy": lambda: callbacks.GeneralizedCrossEntropy(),
    "LogitAdjustment": lambda: callbacks.LogitAdjustment(),
    "KnowledgeDistillation": lambda: callbacks.KnowledgeDistillation(Plain()),
    "EMA": lambda: callbacks.EMA(decay=0.9),
    "PreciseBN": lambda: callbacks.PreciseBN(num_samples=4),
    "WarmupCosine": lambda: callbacks.WarmupCosine(warmup_epochs=0.5),
    "NoBiasDecay": lambda: callbacks.NoBiasDecay(),
    "LinearScaling": lambda: callbacks.LinearScaling(base_batch_size=8, batch_size=4),
    "ZeroGamma": lambda: callbacks.ZeroGamma(),
    "XavierInit": lambda: callbacks.XavierInit(),
    "ChannelsLast": lambda: callbacks.ChannelsLast(),
    "ProgressiveResizing": lambda: callbacks.ProgressiveResizing(start_scale=0.5, multiple_of=8),
    "TemperatureScaling": lambda: callbacks.TemperatureScaling(),
    "DropPath": lambda: callbacks.DropPath(rate=0.2),
    "L1Penalty": lambda: callbacks.L1Penalty(),
    "LayerDecay": lambda: callbacks.LayerDecay(),
    "Muon": lambda: callbacks.Muon(),
    "Freeze": lambda: callbacks.Freeze(["layer1"]),
    "WhitenedStem": lambda: callbacks.WhitenedStem(images=4),
    "Unfreeze": lambda: callbacks.Unfreeze({"layer2": 0.5}, unit="run"),
}
# that set the rate, the weights or the data as another one does, or take minutes; each has its own test above
SEPARATE = {
    "BinaryCrossEntropy",  # not with the teacher
    "ClassBalanced",
    "SWA",
    "ScheduleFree",
    "Lookahead",
    "WarmupStep",
    "WarmupExponential",
    "WarmupLinear",
    "WarmupPoly",
    "WarmupStableDecay",
    "FixRes",
    "Compile",
    "TestTimeAugment",
}


@pytest.mark.parametrize("decoder", ["fcn", "aspp", "ppm", "fpn", "pan"])
def test_all_together_on_each_decoder(decoder: Any) -> None:
    """They go together, say what they do, and the run ends with finite numbers."""
    small = {"depth": 18, "width": 0.0625, "small_input": True}
    with log_lines() as records:
        module = Plain(decoder=decoder, model_args=small, aux_weight=0.4)
        fit(*(make() for make in TRICKS.values()), steps=3, module=module)
    lines = " ".join(record.getMessage() for record in records)
    assert [name for name in TRICKS if f"{name}: " not in lines] == []
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())
    assert 0 <= float(module.trainer.callback_metrics["val/miou"]) <= 1


def test_every_trick_is_here() -> None:
    assert set(callbacks.__all__) == TRICKS.keys() | SEPARATE
