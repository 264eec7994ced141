"""One figure per trick, drawn from the trick's own functions. ``FIGURES`` maps the trick to (function, caption)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import nn

from lit_tricks.callbacks.averaging.power_law import power_ema_decay
from lit_tricks.callbacks.binary_cross_entropy import multi_hot
from lit_tricks.callbacks.class_balanced import class_balanced_weights
from lit_tricks.callbacks.cutmix import cutmix, cutmix_box, kept_area
from lit_tricks.callbacks.drop_path import drop_path, drop_path_rates
from lit_tricks.callbacks.ema import ema_decay
from lit_tricks.callbacks.focal_loss import focal_factor
from lit_tricks.callbacks.generalized_cross_entropy import box_cox
from lit_tricks.callbacks.l1_penalty import add_l1_gradient
from lit_tricks.callbacks.label_smoothing import label_smoothing_for_torch
from lit_tricks.callbacks.layer_decay import layer_decay_factor
from lit_tricks.callbacks.linear_scaling import lr_scaling_factor
from lit_tricks.callbacks.logit_adjustment import logit_adjustment
from lit_tricks.callbacks.lookahead import lookahead_alpha
from lit_tricks.callbacks.mixup import mixup
from lit_tricks.callbacks.muon import orthogonalize
from lit_tricks.callbacks.progressive_resizing import progressive_side
from lit_tricks.callbacks.swa import swa_ends_cycle, swa_lr_share
from lit_tricks.callbacks.test_time_augment import mean_logits, tta_views
from lit_tricks.callbacks.warmup_cosine import warmup_cosine
from lit_tricks.callbacks.warmup_exponential import warmup_exponential
from lit_tricks.callbacks.warmup_linear import warmup_linear
from lit_tricks.callbacks.warmup_poly import warmup_poly
from lit_tricks.callbacks.warmup_stable_decay import warmup_stable_decay
from lit_tricks.callbacks.warmup_step import warmup_step
from lit_tricks.callbacks.whitened_stem import whitening_filters
from lit_tricks.callbacks.xavier_init import xavier_uniform
from lit_tricks.models import resnet
from lit_tricks.run.report.style import Theme, new_figure, tidy
from lit_tricks.utils.image_size import resize
from lit_tricks.utils.strength import strength_at

Draw = Callable[[Theme], Figure]
FIGURES: dict[str, tuple[Draw, str]] = {}
STEPS, EPOCH = 1200, 12  # of the schedules that are drawn: 100 epochs
WIDE = 7.2


def figure_of(trick: str, caption: str) -> Callable[[Draw], Draw]:
    """Register the figure of a trick."""

    def register(draw: Draw) -> Draw:
        FIGURES[trick] = draw, caption
        return draw

    return register


@functools.cache
def photos() -> torch.Tensor:
    """Return two photos of scikit-learn, (2, 3, 160, 160) in [0, 1]."""
    cut = [image[60:380, 160:480] for image in load_sample_images().images]
    images = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255
    return resize(images, (160, 160))


def show(axes: Axes, image: torch.Tensor, title: str) -> None:
    """Draw an image (3, H, W) in [0, 1]."""
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontweight="normal", fontsize=9)
    axes.axis("off")


def row(count: int, height: float = 2.1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    figure = new_figure(WIDE, height)
    return figure, list(np.atleast_1d(figure.subplots(1, count, **options)))


def schedule(theme: Theme, title: str, *curves: tuple[str, Callable[[int], float]]) -> Figure:
    """Draw learning rates over the epochs."""
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    epochs = [step / EPOCH for step in range(STEPS)]
    for number, (name, rate) in enumerate(curves):
        axes.plot(epochs, [rate(step) for step in range(STEPS)], color=theme.cycle[number], label=name)
    tidy(axes, title, "epoch", "learning rate")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("MixUp", "Two photos mixed with lambda 1, 0.7, 0.5 and 0. The labels are mixed with the same lambda.")
def draw_mixup(theme: Theme) -> Figure:
    figure, panels = row(4)
    for axes, lam in zip(panels, (1.0, 0.7, 0.5, 0.0), strict=True):
        mixed = mixup(photos(), torch.tensor([lam, lam]), torch.tensor([1, 0]))[0]
        show(axes, mixed, f"{lam:.0%} temple, {1 - lam:.0%} flower")
    return figure


@figure_of(
    "CutMix", "A rectangle of the partner replaces a part of the image. The labels are mixed by the visible area."
)
def draw_cutmix(theme: Theme) -> Figure:
    figure, panels = row(4)
    for axes, lam, center in zip(
        panels, (0.9, 0.7, 0.5, 0.3), ((50, 110), (90, 60), (80, 80), (120, 150)), strict=True
    ):
        box = cutmix_box(160, 160, lam, center)
        area = kept_area(160, 160, box)
        show(axes, cutmix(photos(), torch.tensor([1, 0]), box)[0], f"{area:.0%} temple, {1 - area:.0%} flower")
    return figure


@figure_of("TemperatureScaling", "Probabilities of five classes from the same logits, for three temperatures.")
def draw_temperature(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    logits = torch.tensor([0.0, 1.0, 4.0, 2.5, -1.0])
    for number, temperature in enumerate((0.5, 1.0, 3.0)):
        probabilities = (logits / temperature).softmax(0).numpy()
        axes.bar(
            np.arange(5) + (number - 1) * 0.27, probabilities, 0.25, color=theme.cycle[number], label=f"{temperature}"
        )
    axes.set_xticks(range(5))
    tidy(axes, "", "class", "probability")
    axes.legend(title="temperature", frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("LabelSmoothing", "The target of one image among ten classes, without and with smoothing of 0.1.")
def draw_label_smoothing(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    classes, true = 10, 3
    for number, value in enumerate((0.0, 0.1, 0.3)):
        rest = label_smoothing_for_torch(classes, value) / classes
        target = [rest + (1 - rest * classes) * (label == true) for label in range(classes)]
        axes.bar(np.arange(classes) + (number - 1) * 0.27, target, 0.25, color=theme.cycle[number], label=f"{value}")
    axes.set_xticks(range(classes))
    tidy(axes, "", "class", "target probability")
    axes.legend(title="smoothing", frameon=False, labelcolor=theme.ink)
    return figure


LONG_TAIL = torch.tensor([round(5000 * 100 ** (-k / 9)) for k in range(10)])


@figure_of("ClassBalanced", "Weights of ten classes with 5000 to 50 images. Near 1, weights are inverse to the counts.")
def draw_class_balanced(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    for number, beta in enumerate((0.0, 0.99, 0.999, 0.9999)):
        weights = class_balanced_weights(LONG_TAIL.double(), beta)
        axes.plot(LONG_TAIL, weights, "o-", markersize=3, color=theme.cycle[number], label=f"beta {beta:g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    tidy(axes, "", "training images of the class", "weight")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("LogitAdjustment", "What is added to the logits in training, for ten classes with 5000 to 50 images.")
def draw_logit_adjustment(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    for number, tau in enumerate((0.5, 1.0, 2.0)):
        shift = logit_adjustment(LONG_TAIL.double(), tau)
        axes.plot(LONG_TAIL, shift, "o-", markersize=3, color=theme.cycle[number], label=f"tau {tau:g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    tidy(axes, "", "training images of the class", "shift of the logit")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("FocalLoss", "Loss of one image over the probability of its true class. A larger gamma ignores easy images.")
def draw_focal(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    p = torch.linspace(0.02, 1, 200)
    for number, gamma in enumerate((0.0, 1.0, 2.0, 5.0)):
        axes.plot(
            p.numpy(), (focal_factor(p, gamma) * -p.log()).numpy(), color=theme.cycle[number], label=f"gamma {gamma:g}"
        )
    tidy(axes, "", "probability of the true class", "loss")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of(
    "GeneralizedCrossEntropy",
    "Loss of one image, and its gradient, over the probability of its label. A larger q ignores unlikely labels.",
)
def draw_generalized(theme: Theme) -> Figure:
    figure, panels = row(2, 2.8)
    p = torch.linspace(0.02, 1, 200)
    for number, q in enumerate((0.0, 0.3, 0.7, 1.0)):
        loss, label = (-box_cox(p.log(), q), f"q {q:g}") if q else (-p.log(), "cross entropy")
        for axes, values in zip(panels, (loss, p**q * (1 - p)), strict=True):
            axes.plot(p.numpy(), values.numpy(), color=theme.cycle[number], label=label)
    tidy(panels[0], "", "probability of the label", "loss")
    tidy(panels[1], "", "probability of the label", "gradient of the logit")
    panels[0].legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of(
    "BinaryCrossEntropy",
    "Targets of an image that is mixed of two classes: shares of a softmax, and both labels of binary losses.",
)
def draw_binary(theme: Theme) -> Figure:
    figure, panels = row(3, 2.4, sharey=True)
    shares = torch.tensor([0.0, 0.7, 0.0, 0.0, 0.3, 0.0])
    smoothed = multi_hot(shares, 0.2) * 0.9 + 0.1 / 6
    titles = ("softmax", "target_threshold 0.2", "with LabelSmoothing")
    for number, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.bar(range(6), (shares, multi_hot(shares, 0.2), smoothed)[number].numpy(), color=theme.cycle[number])
        tidy(axes, title, "class", "target" if number == 0 else "")
    return figure


@figure_of(
    "KnowledgeDistillation",
    "A teacher's probabilities for one image at several temperatures. Higher temperatures show similar classes.",
)
def draw_distillation(theme: Theme) -> Figure:
    figure, panels = row(3, 2.6, sharey=True)
    logits = torch.tensor([9.0, 6.5, 5.0, 1.0, 0.0, -1.0])
    for number, (axes, temperature) in enumerate(zip(panels, (1, 4, 20), strict=True)):
        axes.bar(range(6), (logits / temperature).softmax(0).numpy(), color=theme.cycle[number])
        tidy(axes, f"T = {temperature}", "class", "probability" if number == 0 else "")
    return figure


@figure_of(
    "EMA",
    "A noisy weight and its averages. With warm-up the average forgets the first weights sooner. A power-law average grows longer with the run.",
)
def draw_ema(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    noise = torch.Generator().manual_seed(0)
    steps = range(600)
    weight = [1 - math.exp(-step / 60) + 0.12 * torch.randn((), generator=noise).item() for step in steps]
    axes.plot(steps, weight, color=theme.faint, linewidth=0.6, label="trained weight")
    for number, (name, decay) in enumerate(
        {
            "decay 0.99, warm-up": lambda update: ema_decay(0.99, update),
            "decay 0.99, no warm-up": lambda update: 0.99,
            "power-law, length 0.2": lambda update: power_ema_decay(0.2, update),
        }.items()
    ):
        average, line = weight[0], []
        for update, value in enumerate(weight):
            average += (1 - decay(update)) * (value - average) if update else 0
            line.append(average)
        axes.plot(steps, line, color=theme.cycle[number], label=name)
    tidy(axes, "", "step", "weight")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("Lookahead", "A noisy weight, which starts again from the slow weight every 5 steps.")
def draw_lookahead(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    for number, (name, alpha) in enumerate(
        {
            "alpha 0.5": lambda step: 0.5,
            "alpha 0.23, cubic": lambda step: lookahead_alpha(0.23, step / 100),
        }.items()
    ):
        noise = torch.Generator().manual_seed(0)
        fast, slow, paths = 0.0, 0.0, [[0.0, 0.0]]
        for step in range(1, 101):
            fast += 0.08 * (1 - fast) + 0.08 * torch.randn((), generator=noise).item()
            if step % 5 == 0:
                slow += alpha(step) * (fast - slow)
                fast = slow
            paths.append([fast, slow])
        axes.plot([path[0] for path in paths], color=theme.cycle[number], linewidth=0.6, alpha=0.6)
        axes.plot([path[1] for path in paths], color=theme.cycle[number], drawstyle="steps-post", label=f"slow, {name}")
    tidy(axes, "", "step", "weight")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("ScheduleFree", "A weight of a schedule-free optimizer: where it trains, and the average that is validated.")
def draw_schedule_free(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.8)
    axes = figure.subplots()
    noise = torch.Generator().manual_seed(0)
    z = x = 0.0
    trained, averaged = [], []
    for step in range(1, 201):
        y = 0.1 * z + 0.9 * x
        z -= 0.15 * (y - 1 + torch.randn((), generator=noise).item())
        x += (z - x) / step
        trained.append(0.1 * z + 0.9 * x)
        averaged.append(x)
    axes.plot(trained, color=theme.faint, linewidth=0.8, label="training, train()")
    axes.plot(averaged, color=theme.cycle[0], label="validation and checkpoints, eval()")
    tidy(axes, "", "step", "weight")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("SWA", "The learning rate of a run with SWA, and the steps whose weights are averaged.")
def draw_swa(theme: Theme) -> Figure:
    start, length, lr = int(0.75 * STEPS), 10 * EPOCH, 0.04

    def rate(step: int) -> float:
        own = warmup_cosine(step, 0.1, STEPS, 5 * EPOCH)
        if step >= start:
            return lr
        share = swa_lr_share(step, start, length)
        return own + share * (lr - own)

    figure = schedule(theme, "", ("scheduled rate, then a constant one", rate))
    axes = figure.axes[0]
    ends = [step for step in range(start, STEPS) if swa_ends_cycle(step + 1, start, STEPS, EPOCH)]
    axes.plot([s / EPOCH for s in ends], [lr] * len(ends), ".", color=theme.cycle[1], label="weights are averaged")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("WarmupCosine", "Linear warm-up, then half a cosine.")
def draw_cosine(theme: Theme) -> Figure:
    return schedule(
        theme,
        "",
        ("warmup_epochs 5", lambda step: warmup_cosine(step, 0.1, STEPS, 5 * EPOCH)),
        ("warmup_epochs 20, min_lr 0.02", lambda step: warmup_cosine(step, 0.1, STEPS, 20 * EPOCH, 0.02)),
    )


@figure_of("WarmupStep", "Linear warm-up, then a division by ten at each milestone.")
def draw_step(theme: Theme) -> Figure:
    marks = [30 * EPOCH, 60 * EPOCH, 90 * EPOCH]
    return schedule(theme, "", ("30, 60, 90", lambda step: warmup_step(step, 0.1, marks, 0.1, 5 * EPOCH)))


@figure_of("WarmupLinear", "Linear warm-up, then a line.")
def draw_linear(theme: Theme) -> Figure:
    return schedule(
        theme,
        "",
        ("warmup_epochs 5", lambda step: warmup_linear(step, 0.1, STEPS, 5 * EPOCH)),
        ("warmup_epochs 20, min_lr 0.02", lambda step: warmup_linear(step, 0.1, STEPS, 20 * EPOCH, 0.02)),
    )


@figure_of("WarmupPoly", "A power of the share of the run that is left.")
def draw_poly(theme: Theme) -> Figure:
    return schedule(
        theme,
        "",
        ("power 0.9", lambda step: warmup_poly(step, 0.1, STEPS, 0.9)),
        ("power 2, warmup_epochs 5", lambda step: warmup_poly(step, 0.1, STEPS, 2, 5 * EPOCH)),
    )


@figure_of("WarmupStableDecay", "Linear warm-up, a constant rate, and a decay at the end.")
def draw_stable_decay(theme: Theme) -> Figure:
    fifth, warm = STEPS // 5, 5 * EPOCH
    return schedule(
        theme,
        "",
        ("decay 0.2", lambda step: warmup_stable_decay(step, 0.1, STEPS, fifth, warm)),
        ('decay 0.2, shape "linear"', lambda step: warmup_stable_decay(step, 0.1, STEPS, fifth, warm, 0, "linear")),
    )


@figure_of("WarmupExponential", "Linear warm-up, then a factor of 0.94 every two epochs.")
def draw_exponential(theme: Theme) -> Figure:
    return schedule(theme, "", ("gamma 0.94", lambda step: warmup_exponential(step, 0.1, 2 * EPOCH, 0.94, 5 * EPOCH)))


@figure_of(
    "LayerDecay",
    "The factor on the learning rate in the 18 layers of a ResNet-50, from the first convolution to the end.",
)
def draw_layer_decay(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    for number, decay in enumerate((0.9, 0.75, 0.65)):
        factors = [layer_decay_factor(17 - layer, decay) for layer in range(18)]
        axes.plot(range(1, 19), factors, ".-", color=theme.cycle[number], label=f"decay {decay}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks([1, 6, 12, 18])
    tidy(axes, "", "layer", "factor")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


def parts_over_time(theme: Theme, moments: dict[str, float | None]) -> Figure:
    """Draw which parts of a ResNet are trained in which epochs."""
    figure = new_figure(WIDE, 2.2)
    axes = figure.subplots()
    for place, moment in enumerate(moments.values()):
        start = 10 if moment is None else moment
        axes.barh(place, start, color=theme.faint, label="frozen" if place == 0 else None)
        axes.barh(
            place, 10 - start, left=start, color=theme.cycle[0], label="trained" if place == len(moments) - 1 else None
        )
    axes.set_yticks(range(len(moments)), list(moments))
    axes.grid(False)
    tidy(axes, "", "epoch", "")
    axes.legend(frameon=False, labelcolor=theme.ink, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@figure_of("Freeze", "The backbone of a ResNet is frozen for two of ten epochs, and its first layers to the end.")
def draw_freeze(theme: Theme) -> Figure:
    backbone = dict.fromkeys(("layer1", "layer2", "layer3", "layer4"), 2.0)
    return parts_over_time(theme, {"conv1, bn1": None, **backbone, "fc": 0.0})


@figure_of(
    "Unfreeze", "Parts of a ResNet are trained from the head down: layer4 from epoch 1, layer3 from 2, all from 4."
)
def draw_unfreeze(theme: Theme) -> Figure:
    parts: dict[str, float | None] = {"conv1, bn1": 4, "layer1": 4, "layer2": 4, "layer3": 2, "layer4": 1, "fc": 0}
    return parts_over_time(theme, parts)


@figure_of("LinearScaling", "The factor on the learning rate, over the images in an optimizer step.")
def draw_scaling(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    sizes = [2**power for power in range(5, 13)]
    for number, rule in enumerate(("linear", "sqrt")):
        factors = [lr_scaling_factor(size, 256, rule) for size in sizes]
        axes.plot(sizes, factors, "o-", color=theme.cycle[number], label=f'rule="{rule}"')
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    tidy(axes, "", "images per optimizer step", "factor")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of(
    "DropPath",
    "Left: the rate of each of the 16 blocks of a ResNet-50. Middle: the rate of the last block over the run, with start "
    "0.2 and end 0.8. Right: a branch, dropped for two of eight images.",
)
def draw_drop_path(theme: Theme) -> Figure:
    figure, (left, middle, right) = row(3, 2.6)
    for number, mode in enumerate(("linear", "constant")):
        left.plot(range(1, 17), drop_path_rates(0.2, 16, mode), ".-", color=theme.cycle[number], label=f'mode="{mode}"')
    tidy(left, "", "block", "probability to skip")
    left.set_ylim(-0.01, 0.34)  # room for the legend, as in the middle
    left.legend(frameon=False, labelcolor=theme.ink, loc="upper left")
    done = np.linspace(0, 0.999, 500)
    for number, name in enumerate(("constant", "rise", "fall")):
        rates = [0.2 * strength_at(progress, 0.2, 0.8, name) for progress in done]
        middle.plot(done, rates, color=theme.cycle[number], label=name)
    tidy(middle, "", "share of the run", "")
    middle.set_ylim(-0.01, 0.34)
    middle.legend(frameon=False, labelcolor=theme.ink, loc="upper left")
    branch = torch.linspace(0.5, 1.5, 24).repeat(8, 1)
    kept = torch.tensor([True, True, False, True, True, True, False, True])
    right.imshow(drop_path(branch, kept, 0.25).numpy(), aspect="auto", cmap="viridis")
    tidy(right, "", "feature of the branch", "image")
    right.grid(False)
    return figure


@figure_of("Muon", "Singular values of a momentum of 64 filters, before and after 1, 3 and 5 iterations.")
def draw_muon(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    generator = torch.Generator().manual_seed(0)
    momentum = torch.randn(64, 64, generator=generator) @ torch.randn(64, 576, generator=generator)
    momentum /= momentum.norm()
    for number, steps in enumerate((0, 1, 3, 5)):
        values = torch.linalg.svdvals(orthogonalize(momentum[None], steps)[0])
        label = "momentum" if steps == 0 else f"{steps} iteration{'s' if steps > 1 else ''}"
        axes.plot(range(1, 65), values, color=theme.cycle[number], label=label)
    tidy(axes, "", "singular value, by size", "")
    axes.legend(frameon=False, labelcolor=theme.ink, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@figure_of(
    "ProgressiveResizing",
    "Left: the side of the images over the run. Right: a photo at the first and at the last size.",
)
def draw_progressive(theme: Theme) -> Figure:
    figure, (left, small, full) = row(3, 2.6, width_ratios=(2, 1, 1))
    parts = [step / 400 for step in range(401)]
    left.plot(parts, [progressive_side(part, 224, 0.5, 0.2, 0.8, 32) for part in parts], color=theme.cycle[0])
    tidy(left, "", "part of the run", "side in pixels")
    show(small, resize(photos()[:1], (80, 80))[0], "start_scale 0.5")
    show(full, photos()[0], "full size")
    return figure


@figure_of("FixRes", "The same photo as a random crop of training shows it, and as a center crop of the test shows it.")
def draw_fixres(theme: Theme) -> Figure:
    figure, (whole, train, test, larger) = row(4)
    photo = photos()[:1]
    show(whole, photo[0], "photo")
    show(train, resize(photo[..., 40:130, 30:120], (112, 112))[0], "training crop, 112 px")
    show(test, resize(photo, (128, 128))[0, :, 8:120, 8:120], "test crop, 112 px")
    show(larger, resize(photo, (160, 160))[0, :, 8:152, 8:152], "test crop, 144 px")
    return figure


@figure_of("TestTimeAugment", "The views of one photo, and the mean of their probabilities for three classes.")
def draw_tta(theme: Theme) -> Figure:
    figure, panels = row(4, gridspec_kw={"width_ratios": [1, 1, 1, 1.5]})
    chosen = [next(tta_views(photos()[:1], True, 1, [1.0])), *list(tta_views(photos()[:1], True, 5, [1.0]))[1:5:3]]
    for axes, view, title in zip(panels[:3], chosen, ("image", "crop, flipped", "another crop"), strict=True):
        show(axes, view[0], title)
    views = [torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.5, 1.5, 0.0]])]
    axes = panels[3]
    for number, (name, logits) in enumerate(
        {"one view": views[0], "other view": views[1], "mean": mean_logits(views)}.items()
    ):
        axes.bar(
            np.arange(3) + (number - 1) * 0.27,
            logits.softmax(1)[0].numpy(),
            0.25,
            color=theme.cycle[number],
            label=name,
        )
    tidy(axes, "", "class", "probability")
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, handlelength=1)
    return figure


@figure_of("NoBiasDecay", "The parameters of a ResNet-50: those that keep their weight decay, and those without.")
def draw_no_bias_decay(theme: Theme) -> Figure:
    network = resnet(depth=50, num_classes=1000)
    decayed = [p.numel() for p in network.parameters() if p.ndim > 1]
    vectors = [p.numel() for p in network.parameters() if p.ndim < 2]
    figure, panels = row(2, 2.0)
    for axes, title, values in zip(
        panels,
        ("tensors", "values in millions"),
        ((len(decayed), len(vectors)), (sum(decayed) / 1e6, sum(vectors) / 1e6)),
        strict=True,
    ):
        axes.barh(["convolutions, classifier", "biases, norm layers"], values, color=theme.cycle[:2])
        tidy(axes, "", title, "")
    panels[1].set_yticklabels([])
    return figure


@figure_of("L1Penalty", "A thousand weights before and after 300 steps of only the penalty: small weights end near 0.")
def draw_l1(theme: Theme) -> Figure:
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.1
    before = weights.clone()
    for _ in range(300):
        gradient = torch.zeros_like(weights)
        add_l1_gradient([weights], [gradient], 0.002)
        weights -= 0.1 * gradient
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    bins = np.linspace(-0.4, 0.4, 81)
    for number, (name, values) in enumerate({"before": before, "after": weights}.items()):
        axes.hist(values.numpy(), bins, color=theme.cycle[number], alpha=0.7, label=name)
    tidy(axes, "", "weight", "number of weights")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("WhitenedStem", "Filters of 2 by 2 pixels from photos, and the variance of patches in their directions.")
def draw_whitened_stem(theme: Theme) -> Figure:
    patches = F.unfold(photos().double(), 2).transpose(1, 2).reshape(-1, 12)
    covariance = torch.cov(patches.T, correction=0)
    filters = whitening_filters(covariance, 12)
    figure = new_figure(WIDE, 2.6)
    left, right = figure.subfigures(1, 2)
    for axes, values in zip(left.subplots(3, 4).flat, filters, strict=True):
        image = values.view(3, 2, 2).permute(1, 2, 0)
        axes.imshow((0.5 + 0.5 * image / image.abs().max()).numpy())
        axes.axis("off")
    axes = right.subplots()
    before = torch.linalg.eigvalsh(covariance).flip(0)
    after = (filters @ covariance @ filters.T).diagonal()
    for number, (name, variances) in enumerate({"images": before, "outputs": after}.items()):
        axes.plot(range(1, 13), variances.numpy(), "o-", color=theme.cycle[number], label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(2, 13, 2))
    tidy(axes, "", "direction", "variance")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of(
    "XavierInit",
    "Weights of a convolution with 64 inputs, 64 outputs and a kernel of 3 by 3, against a normal Kaiming start.",
)
def draw_xavier(theme: Theme) -> Figure:
    generator = torch.Generator().manual_seed(0)
    xavier = xavier_uniform((64, 64, 3, 3), generator).flatten()
    kaiming = torch.randn(64 * 64 * 9, generator=generator) * math.sqrt(2 / (64 * 9))
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    bins = np.linspace(-0.2, 0.2, 81)
    for number, (name, values) in enumerate({"Xavier": xavier, "Kaiming": kaiming}.items()):
        axes.hist(values.numpy(), bins, color=theme.cycle[number], alpha=0.7, label=name)
    tidy(axes, "", "weight", "number of weights")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("ZeroGamma", "The spread of activations through the blocks of a ResNet-34 at its start, with and without.")
def draw_zero_gamma(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    for number, zero in enumerate((False, True)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: Any = resnet(depth=34, num_classes=10, small_input=True, width=0.25)
            images = torch.randn(8, 3, 32, 32)
        blocks = [block for name in ("layer1", "layer2", "layer3", "layer4") for block in getattr(network, name)]
        spread: list[float] = []
        for block in blocks:
            nn.init.constant_(block.bn2.weight, 0.0 if zero else 1.0)
            block.register_forward_hook(lambda _m, _i, out, spread=spread: spread.append(out.std().item()))
        with torch.no_grad():
            network(images)
        axes.plot(
            range(1, len(spread) + 1), spread, "o-", color=theme.cycle[number], label="with" if zero else "without"
        )
    tidy(axes, "", "residual block", "standard deviation")
    axes.legend(title="ZeroGamma", frameon=False, labelcolor=theme.ink)
    return figure


@figure_of(
    "PreciseBN",
    "The variance of a layer's input, while the layers before it learn: running statistics, and the current weights.",
)
def draw_precise_bn(theme: Theme) -> Figure:
    figure = new_figure(WIDE, 2.6)
    axes = figure.subplots()
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm1d(1)
    true, running = [], []
    for step in range(120):
        scale = 1 + 2 * math.exp(-step / 30)  # the layers before it learn
        layer(torch.randn(16, 1, generator=generator) * scale)
        true.append(scale**2)
        running.append(layer.running_var.item())  # type: ignore[union-attr,operator]
    axes.plot(true, color=theme.cycle[1], label="current weights (PreciseBN)")
    axes.plot(running, color=theme.cycle[0], label="running average of past steps")
    tidy(axes, "", "step", "variance")
    axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


@figure_of("ChannelsLast", "The order of the values of an image in memory. Color shows the channel.")
def draw_channels_last(theme: Theme) -> Figure:
    figure, panels = row(2, 1.3)
    image = torch.arange(3).view(1, 3, 1, 1).expand(1, 3, 2, 4).contiguous()
    for axes, title, order in zip(
        panels,
        ("contiguous: channel after channel", "channels last: pixel after pixel"),
        (image.flatten(), image.permute(0, 2, 3, 1).flatten()),
        strict=True,
    ):
        axes.imshow(order[None].numpy(), aspect="auto", cmap="viridis")
        axes.set_title(title, fontweight="normal", fontsize=9)
        axes.axis("off")
    return figure


@figure_of(
    "Compile", "A residual block as torch.compile traces it: one graph without a break, which holds all operations."
)
def draw_compile(theme: Theme) -> Figure:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    block: Any = resnet(depth=18, num_classes=10, small_input=True, width=0.25).layer1[0].eval()
    torch.compile(block, backend=count)(torch.randn(1, 16, 8, 8))
    figure = new_figure(WIDE, 1.8)
    axes = figure.subplots()
    axes.barh(["graphs that replace Python", "operations in them"], [len(graphs), sum(graphs)], color=theme.cycle[:2])
    tidy(axes, "", "one residual block", "")
    return figure
