"""The contract table: one row per trick. Tests, and the tables in the README, go by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from helpers import schedule_free
from helpers.modules import network
from lit_tricks import callbacks
from lit_tricks.callbacks.base import Trick

# What a trick may be asked to work with. A row can reject a case; the README shows them as the columns of its table.
CASES = (
    "list",
    "tuple",
    "dict",
    "NamedTuple",
    "functional loss",
    "criterion",
    "manual optimization",
    "accumulation",
    "bf16-mixed",
    "16-mixed",
    "torch.compile",
    "DDP",
    "FSDP2",
    "resume",
)


@dataclass(frozen=True)
class Row:
    """Setup of the contract's tests for a trick.

    Args:
        make: a new one, set up so that it acts within ten steps (three epochs of four batches).
        tests: the file that tests its numbers.
        logs: names of the metrics that it logs in a run with one SGD.
        rejected: cases that it rejects, each with a regex of the RuntimeError's message.
        flags: what the command line needs besides its name.
        same_numbers: it changes how fast a run is, or acts in evaluation only: weights change by rounding at most.
        plain: callbacks of a run without it, to compare what it leaves behind.
        validates: it needs a validation.
    """

    make: Callable[[], Trick]
    tests: str
    logs: tuple[str, ...]
    rejected: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    same_numbers: bool = False
    plain: Callable[[], list[Trick]] = list
    validates: bool = False


def teacher() -> nn.Module:
    """A network with other random weights than any student's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return network()


TRICKS = {
    "BinaryCrossEntropy": Row(
        make=callbacks.BinaryCrossEntropy,
        tests="test_binary_cross_entropy.py",
        logs=("binary_cross_entropy/positives",),
    ),
    "ChannelsLast": Row(
        make=callbacks.ChannelsLast,
        tests="test_channels_last.py",
        logs=("channels_last/filters",),
        same_numbers=True,
    ),
    "ClassBalanced": Row(
        make=lambda: callbacks.ClassBalanced(beta=0.99, counts=[900, 90, 9]),  # the classes of the data are balanced
        tests="test_class_balanced.py",
        logs=("class_balanced/largest_weight",),
    ),
    "Compile": Row(
        make=lambda: callbacks.Compile(backend="eager"),  # traces and guards as any, and needs no compiler
        tests="test_compile.py",
        logs=("compile/layers",),
        rejected={"torch.compile": "^Compile: Classifier, or a part of it, is compiled already"},
        same_numbers=True,
    ),
    "CutMix": Row(
        make=lambda: callbacks.CutMix(alpha=1.0),
        tests="test_cutmix.py",
        logs=("cutmix/lambda",),
    ),
    "DropPath": Row(
        make=lambda: callbacks.DropPath(rate=0.5, layers=["net.0.1"]),  # the network has no residual block
        tests="test_drop_path.py",
        logs=("drop_path/kept",),
    ),
    "EMA": Row(
        make=lambda: callbacks.EMA(decay=0.5),
        tests="test_ema.py",
        logs=("ema/decay",),
    ),
    "FixRes": Row(
        make=lambda: callbacks.FixRes(test_size=None, lr=0.05),
        tests="test_fixres.py",
        logs=("fixres/parameters",),
        flags=("--trainer.callbacks.test_size=40",),
    ),
    "FocalLoss": Row(
        make=lambda: callbacks.FocalLoss(gamma=2.0),
        tests="test_focal_loss.py",
        logs=("focal_loss/factor",),
    ),
    "Freeze": Row(
        make=lambda: callbacks.Freeze(modules=["net.0.0"], until=0.25),
        tests="test_freeze.py",
        logs=("freeze/trained",),
    ),
    "GeneralizedCrossEntropy": Row(
        make=callbacks.GeneralizedCrossEntropy,
        tests="test_generalized_cross_entropy.py",
        logs=("generalized_cross_entropy/weight",),
    ),
    "KnowledgeDistillation": Row(
        make=lambda: callbacks.KnowledgeDistillation(teacher(), temperature=4.0),
        tests="test_knowledge_distillation.py",
        logs=("knowledge_distillation/loss",),
        flags=("--trainer.callbacks.teacher=resnet18",),
    ),
    "L1Penalty": Row(
        make=lambda: callbacks.L1Penalty(strength=0.01, threshold=0.1),
        tests="test_l1_penalty.py",
        logs=("l1_penalty/sparsity",),
    ),
    "LabelSmoothing": Row(
        make=lambda: callbacks.LabelSmoothing(smoothing=0.3),
        tests="test_label_smoothing.py",
        logs=("label_smoothing/smoothing",),
    ),
    "LayerDecay": Row(
        make=lambda: callbacks.LayerDecay(decay=0.5),
        tests="test_layer_decay.py",
        logs=("layer_decay/lowest",),
    ),
    "LinearScaling": Row(
        make=lambda: callbacks.LinearScaling(base_batch_size=32, batch_size=4),
        tests="test_linear_scaling.py",
        logs=("linear_scaling/factor",),
    ),
    "LogitAdjustment": Row(
        make=lambda: callbacks.LogitAdjustment(tau=1.5),
        tests="test_logit_adjustment.py",
        logs=("logit_adjustment/tau",),
    ),
    "Lookahead": Row(
        make=lambda: callbacks.Lookahead(k=2),
        tests="test_lookahead.py",
        logs=("lookahead/alpha",),
    ),
    "MixUp": Row(
        make=lambda: callbacks.MixUp(alpha=1.0),
        tests="test_mixup.py",
        logs=("mixup/lambda",),
    ),
    "Muon": Row(
        make=lambda: callbacks.Muon(lr=0.05),
        tests="test_muon.py",
        logs=("muon/lr",),
    ),
    "NoBiasDecay": Row(
        make=callbacks.NoBiasDecay,
        tests="test_no_bias_decay.py",
        logs=("no_bias_decay/share",),
    ),
    "PreciseBN": Row(
        make=lambda: callbacks.PreciseBN(num_samples=8),
        tests="test_precise_bn.py",
        logs=("precise_bn/shift",),
    ),
    "ProgressiveResizing": Row(
        make=lambda: callbacks.ProgressiveResizing(start_scale=0.5, end=0.1, multiple_of=4),
        tests="test_progressive_resizing.py",
        logs=("progressive_resizing/size",),
    ),
    "ScheduleFree": Row(
        make=schedule_free.ReplacedScheduleFree,
        tests="test_schedule_free.py",
        logs=("schedule_free/distance",),
        plain=lambda: [schedule_free.Replacing()],
    ),
    "SWA": Row(
        make=lambda: callbacks.SWA(lr=0.2, start=0.25),
        tests="test_swa.py",
        logs=("swa/averaged", "lr-SGD"),
    ),
    "TemperatureScaling": Row(
        make=callbacks.TemperatureScaling,
        tests="test_temperature_scaling.py",
        logs=("temperature_scaling/temperature", "temperature_scaling/ece"),
        validates=True,
    ),
    "TestTimeAugment": Row(
        make=callbacks.TestTimeAugment,
        tests="test_test_time_augment.py",
        logs=("test_time_augment/views",),
        same_numbers=True,
    ),
    "Unfreeze": Row(
        make=lambda: callbacks.Unfreeze({"net.0.0": 0.25}, lr_factors={"net.0.0": 0.5}),
        tests="test_unfreeze.py",
        logs=("unfreeze/trained",),
        flags=("--trainer.callbacks.schedule={fc: 1}",),
    ),
    "WarmupCosine": Row(
        make=lambda: callbacks.WarmupCosine(warmup_epochs=1),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupExponential": Row(
        make=lambda: callbacks.WarmupExponential(gamma=0.5, every_n_epochs=0.5, warmup_epochs=1),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupLinear": Row(
        make=lambda: callbacks.WarmupLinear(warmup_epochs=1),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupPoly": Row(
        make=callbacks.WarmupPoly,
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupStableDecay": Row(
        make=lambda: callbacks.WarmupStableDecay(decay=0.5, warmup_epochs=1),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupStep": Row(
        make=lambda: callbacks.WarmupStep(milestones=[1, 2], gamma=0.5, warmup_epochs=0.5),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WhitenedStem": Row(
        make=lambda: callbacks.WhitenedStem(images=8),
        tests="test_whitened_stem.py",
        logs=("whitened_stem/condition",),
    ),
    "XavierInit": Row(
        make=callbacks.XavierInit,
        tests="test_xavier_init.py",
        logs=("xavier_init/growth",),
    ),
    "ZeroGamma": Row(
        make=lambda: callbacks.ZeroGamma(layers=["net.0.1"]),  # the network has no residual block
        tests="test_zero_gamma.py",
        logs=("zero_gamma/scale",),
    ),
}
