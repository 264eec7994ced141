"""Requirements on a trick in every client: its effect, and no other effect.

The test file of a client has a function that takes callbacks and fits with them on the CPU, in the client's own way:
3 epochs of 4 batches. Where a trick cannot work in a client, the file states which error rejects it, and why.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers.fits import differences, weights_of
from helpers.traces import class_attributes, traces
from helpers.tricks import TRICKS
from torch import Tensor, nn

from lit_tricks import callbacks
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.optim.schedule import Schedule
from lit_tricks.callbacks.soft_targets.callback import LossTrick

Fit = Callable[..., None]

# The learning rates of the 12 steps under the tricks of `tricks.py`, as parts of those without a trick: the formulas of
# the papers. The other tricks do not change the learning rate.
WARM_UP = [1 / 4, 2 / 4, 3 / 4, 1]
RATES = {
    "LinearScaling": 12 * [4 / 32],  # samples in a batch, of those that the rate is meant for
    "WarmupCosine": WARM_UP + [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)],
    "WarmupExponential": [*WARM_UP, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8],
    "WarmupLinear": WARM_UP + [1 - t / 8 for t in range(8)],
    "WarmupPoly": [(1 - t / 12) ** 0.9 for t in range(12)],
    "WarmupStableDecay": [*WARM_UP, 1, 1, *(1 - math.sqrt(t / 6) for t in range(6))],
    "WarmupStep": [1 / 2, 1, 1, 1, *4 * [1 / 2], *4 * [1 / 4]],
}

OWN_RATES = ("LayerDecay", "Muon", "SWA")  # one per layer or kind of weight; at its start SWA goes to its own

SCHEDULES = [name for name, row in TRICKS.items() if isinstance(row.make(), Schedule)]
NEED_LABELS = [name for name, row in TRICKS.items() if isinstance(row.make(), LossTrick)]

# Those that the contract's module has to be named something for, which they find by themselves in most clients; that
# set a rate of their own; or that would leave nothing of the clients' images.
MAKE: dict[str, Callable[[], Trick]] = {
    "ClassBalanced": lambda: callbacks.ClassBalanced(beta=0.99999),  # with the counts of the client's data, also pixels
    "DropPath": lambda: callbacks.DropPath(rate=0.5),
    "FixRes": lambda: callbacks.FixRes(test_size=None, lr=None),
    "Freeze": lambda: callbacks.Freeze(until=1),
    "LinearScaling": lambda: callbacks.LinearScaling(base_batch_size=32),
    "ProgressiveResizing": lambda: callbacks.ProgressiveResizing(start_scale=0.75, end=0.1, multiple_of=2),
    "ScheduleFree": callbacks.ScheduleFree,  # for the client's own optimizer, which is no such one
    "Unfreeze": lambda: callbacks.Unfreeze({"backbone": 1}),
    "ZeroGamma": callbacks.ZeroGamma,
}

each_trick = pytest.mark.parametrize("name", TRICKS)
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


class Spy(Trick):
    """Keeps what a fit did. To be the last callback."""

    def __init__(self) -> None:
        self.fits = 0
        self.rates: list[list[float]] = []  # of each step: those of the parameter groups, once each
        self.losses: list[float] = []
        self.batches: set[type] = set()
        # once all is over
        self.weights: dict[str, Tensor] = {}
        self.left: dict[str, Any] = {}
        self.warnings: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        return self  # some clients train with copies of their callbacks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.fits += 1
        self.trainer, self.loader = trainer, trainer.train_dataloader

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(sorted({float(group["lr"]) for group in optimizer.param_groups}))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.batches.add(type(batch))


def spy_on(fit: Fit, *tricks: Any) -> Spy:
    """Fit with the tricks, from seed 0."""
    spy = Spy()
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # they come whenever garbage is collected
        warnings.filterwarnings("ignore", "SWA averages the statistics of the BatchNorm layers")
        warnings.filterwarnings("ignore", "FixRes fine-tunes a trained network")  # clients start from random weights
        fit(*tricks, spy)
    spy.warnings = {f"{warning.category.__name__}: {warning.message}" for warning in caught}
    spy.weights = weights_of(spy.trainer.lightning_module)
    spy.left = left_by(spy.trainer, spy.loader)
    return spy


def left_by(trainer: Any, loader: Any) -> dict[str, Any]:
    """Return what a fit left on its objects and their classes, except for what clients count and measure."""
    module, datamodule = trainer.lightning_module, trainer.datamodule
    found = traces(trainer, module, SimpleNamespace(**(vars(datamodule) if datamodule else {}), loader=loader))
    found = {path: what for path, what in found.items() if not what.isdigit() and not path.endswith(".metrics")}
    classes = class_attributes(trainer, module, datamodule, loader)
    return found | {name: what for name, what in classes.items() if not name.endswith(".__slotnames__")}  # of copyreg


@functools.cache
def without_trick(fit: Fit) -> Spy:
    spy_on(fit)  # torch, Lightning and clients patch classes when they are first used
    torch.compile(nn.Identity(), backend="eager")(torch.zeros(1))
    return spy_on(fit)


def check(
    name: str,
    fit: Fit,
    layout: str = "",
    rejected: dict[str, str] | None = None,
    idle: dict[str, str] | None = None,
    teacher: Callable[[], nn.Module] | None = None,
) -> None:
    """See that the trick works in the client, or raises the error that is declared.

    Args:
        name: the trick.
        fit: fits with the callbacks that it is given.
        layout: that of the client's batches, which the trick's row may reject.
        rejected: tricks that cannot work in this client, each with a regex of the RuntimeError's message.
        idle: tricks that have nothing to do in it, each with a regex of the warning with the reason.
        teacher: makes one for the client, if its images differ from the contract.
    """
    plain, trick = without_trick(fit), MAKE.get(name, TRICKS[name].make)()
    if teacher and isinstance(trick, callbacks.KnowledgeDistillation):
        trick.teacher = teacher()
    assert len(plain.losses) == 12 * plain.fits
    message = (NO_SCHEDULE_FREE_OPTIMIZER | (rejected or {})).get(name) or TRICKS[name].rejected.get(layout)
    if TRICKS[name].validates and not plain.trainer.enable_validation:
        message = message or f"^{name} needs logits of images that are not trained on"
    if message:
        with pytest.raises(RuntimeError, match=message):
            spy_on(fit, trick)
        return
    tricked = spy_on(fit, trick)
    assert len(tricked.losses) == len(plain.losses)
    assert all(math.isfinite(loss) for loss in plain.losses + tricked.losses)
    if idle and name in idle:
        [warning] = tricked.warnings - plain.warnings
        assert re.match(idle[name], warning)
        return
    if not TRICKS[name].same_numbers:
        assert differences(tricked.weights, plain.weights), "the fit ended with the weights of one without the trick"
    parts = RATES.get(name, [1] * 12) * plain.fits
    expected = [[part * rate for rate in step] for part, step in zip(parts, plain.rates, strict=True)]
    assert name in OWN_RATES or tricked.rates == [pytest.approx(step) for step in expected]
    assert not differences(tricked.left, plain.left)
    assert tricked.warnings <= plain.warnings


NO_SCHEDULE_FREE_OPTIMIZER = {"ScheduleFree": r"^ScheduleFree found no optimizer with `train\(\)` and `eval\(\)` in "}

# What else a client can lack, and the errors and warnings that say so.
NO_BATCHNORM = {"PreciseBN": "^UserWarning: PreciseBN has no effect: .+ has no BatchNorm with running statistics"}
NO_BATCHNORM_TO_TRAIN = {"FixRes": "^FixRes found no BatchNorm with running statistics in "}
NO_IMAGES = {"ProgressiveResizing": "^ProgressiveResizing found no images in the training batch: "}
NO_FORWARD = {"TestTimeAugment": "^UserWarning: TestTimeAugment has no effect: forward of .+ was not called"}
NO_RESIDUAL_BRANCHES = {
    "DropPath": "^DropPath found no drop-path layers, nor branches that end with a norm, in ",
    "ZeroGamma": "^ZeroGamma found no residual branches that end with a norm layer in ",
}
NO_CONVOLUTIONS = {
    "ChannelsLast": "^ChannelsLast has no effect: there is no two-dimensional convolution in ",
    "WhitenedStem": "^WhitenedStem found no two-dimensional convolution in ",
}
NOTHING_TO_FREEZE = {
    name: rf"^{name}\(.+\) (has no effect: |.+ no optimizer of )" for name in ("Freeze", "LayerDecay", "Unfreeze")
}
NO_WEIGHT_DECAY = {"NoBiasDecay": r"^NoBiasDecay\(.+\) took no weight decay away: "}


def own_schedule(scheduler: str, module: str) -> dict[str, str]:
    """The errors of our schedules in a module that has its own scheduler."""
    message = (
        "{0} sets the learning rate, and so does the {1} that configure_optimizers of {2} returns: "
        "return only the optimizers, or remove {0}."
    )
    return {name: f"^{re.escape(message.format(name, scheduler, module))}$" for name in SCHEDULES}


def no_labels(found: str) -> dict[str, str]:
    """The errors of the tricks that work on class labels, in a client that has none.

    Args:
        found: what they find in the batch instead.
    """
    return {name: f"^{name} found {re.escape(found)}" for name in NEED_LABELS}


def network(classes: int) -> nn.Module:
    """A small ResNet with random weights, none of them 0; with 0 classes it ends with its features."""
    return timm.create_model("test_resnet", num_classes=classes, zero_init_last=False)
