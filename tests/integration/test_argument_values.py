"""Odd values for every argument: rejected by name, in Python and in YAML, or legal by the table here and working."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fits import Result, run
from helpers.odd import ODD, accepted, legal, message_of
from helpers.schedule_free import ScheduleFreeSGD
from helpers.tricks import teacher
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lit_tricks import callbacks

# What is legal in spite of its looks, by trick and argument; nothing else is.
LEGAL_IN_TRICKS: dict[str, dict[str, str]] = {
    "BinaryCrossEntropy": {
        "target_threshold": "null 0",
        "sum_classes": "true",
        "prior_bias": "true",
        "layers": "null",
    },
    "ChannelsLast": {"weights": "true"},
    "ClassBalanced": {"beta": "0", "counts": "null"},
    "Compile": {"layers": "null", "backend": '"nan"', "dynamic": "null true", "fullgraph": "true"},
    "CutMix": {"alpha": "1.5", "inputs": "null", "start": "0"},
    "DropPath": {"rate": "0", "layers": "null", "start": "0"},
    "EMA": {
        "decay": "null 0",
        "warmup": "true",
        "start_step": "0",
        "half_life": "null 1.5",
        "validate": "true",
        "name": 'null "nan"',
        "device": "null",
        "power": "null",
    },
    "FixRes": {
        "test_size": "null",
        "lr": "null 1.5",
        "train_affine": "true",
        "classifier": 'null "nan"',
        "batch_norm": 'null "nan"',
    },
    "FocalLoss": {"gamma": "0 1.5", "alpha": "null"},
    "Freeze": {"until": "null 1.5", "train_bn": "true"},
    "GeneralizedCrossEntropy": {},
    "KnowledgeDistillation": {
        "teacher": '"nan"',
        "temperature": "null 1.5",
        "alpha": "null",
        "mean": "null",
        "std": "null",
        "input_mean": "null",
        "input_std": "null",
        "channels_last": "true",
        "compiled": "true",
    },
    "L1Penalty": {"strength": "0 1.5", "threshold": "1.5"},
    "LabelSmoothing": {"smoothing": "0", "start": "0"},
    "LayerDecay": {},
    "LinearScaling": {"batch_size": "null"},
    "LogitAdjustment": {"tau": "0 1.5", "counts": "null"},
    "Lookahead": {},
    "MixUp": {"alpha": "1.5", "per_sample": "true", "inputs": "null", "start": "0"},
    "Muon": {"lr": "1.5", "momentum": "0", "weight_decay": "0 1.5"},
    "NoBiasDecay": {},
    "PreciseBN": {"restore": "true"},
    "ProgressiveResizing": {"start": "0", "total_steps": "null"},
    "ScheduleFree": {"num_samples": "0"},
    "SWA": {
        "lr": "1.5",
        "start": "0",
        "anneal_epochs": "0 1.5",
        "every_n_steps": "null",
        "validate": "true",
        "name": 'null "nan"',
    },
    "TemperatureScaling": {"classifier": 'null "nan"'},
    "TestTimeAugment": {"flip": "true", "layer": 'null "nan"'},
    "Unfreeze": {"lr_factors": "null", "train_bn": "true"},
    "WarmupCosine": {"warmup_epochs": "0 1.5", "min_lr": "0 1.5", "total_steps": "null"},
    "WarmupExponential": {"every_n_epochs": "1.5", "warmup_epochs": "0 1.5", "total_steps": "null"},
    "WarmupLinear": {"warmup_epochs": "0 1.5", "min_lr": "0 1.5", "total_steps": "null"},
    "WarmupPoly": {"power": "1.5", "warmup_epochs": "0 1.5", "min_lr": "0 1.5", "total_steps": "null"},
    "WarmupStableDecay": {"warmup_epochs": "0 1.5", "min_lr": "0 1.5", "total_steps": "null"},
    "WarmupStep": {"milestones": "[]", "warmup_epochs": "0 1.5", "total_steps": "null"},
    "WhitenedStem": {"layer": 'null "nan"'},
    "XavierInit": {"seed": "null 0"},
    "ZeroGamma": {"layers": "null"},
}

# What a trick needs besides the argument that is tried
NEEDED: dict[str, Callable[[], dict[str, Any]]] = {
    "Compile": lambda: {"backend": "eager"},
    "DropPath": lambda: {"layers": ["net.0.1"]},
    "FixRes": lambda: {"test_size": None},
    "Freeze": lambda: {"modules": ["net.0"]},
    "KnowledgeDistillation": lambda: {"teacher": teacher()},
    "LinearScaling": lambda: {"batch_size": 4},
    "ProgressiveResizing": lambda: {"multiple_of": 1},
    "SWA": lambda: {"lr": 0.1},
    "Unfreeze": lambda: {"schedule": {"net.0": 0.1}},
    "WarmupStep": lambda: {"milestones": [5]},
    "ZeroGamma": lambda: {"layers": ["net.0.1"]},
}


def arguments_of(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


@functools.cache
def parser(base: type) -> LightningArgumentParser:
    built = LightningArgumentParser(exit_on_error=False)
    built.add_lightning_class_args(base, "it", subclass_mode=True)
    return built


def accepted_in_yaml(base: type, name: str, needed: str, argument: str) -> set[str]:
    """The odd values that are taken from a configuration."""

    def build(written: str) -> None:
        text = f"it: {{class_path: {name}, init_args: {{{needed}{argument}: {written}}}}}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning calls it by this name, too
            parser(base).instantiate_classes(parser(base).parse_string(text))

    messages = {written: message_of(lambda w=written: build(w), Exception) for written in ODD}
    rejected = {written: message for written, message in messages.items() if message is not None}
    assert not [message for message in rejected.values() if argument not in message]
    return set(ODD) - set(rejected)


each_trick = pytest.mark.parametrize("name", callbacks.__all__)


def needs(name: str, argument: str) -> dict[str, Any]:
    needed = NEEDED.get(name, dict)()
    needed.pop(argument, None)
    return needed


@each_trick
def test_tricks_reject_by_name_what_is_not_legal(name):
    trick = getattr(callbacks, name)
    assert set(LEGAL_IN_TRICKS[name]) <= set(arguments_of(trick))
    for argument in arguments_of(trick):
        needed = needs(name, argument)
        taken = accepted(lambda value, argument=argument, needed=needed: trick(**needed, **{argument: value}), argument)
        assert taken == legal(LEGAL_IN_TRICKS, name, argument), argument


@each_trick
def test_tricks_reject_the_same_in_yaml(name):
    trick = getattr(callbacks, name)
    for argument in arguments_of(trick):
        required = {
            "SWA": "lr: 0.1, ",
            "FixRes": "test_size: 24, ",
            "KnowledgeDistillation": "teacher: resnet18, ",
            "Unfreeze": "schedule: {fc: 1}, ",
        }
        needed = required.get(name, "")
        needed = "" if needed.startswith(f"{argument}:") else needed
        if (name, argument) == ("FixRes", "transform") and sys.version_info < (3, 11):
            continue  # jsonargparse takes typing.Any for a class there, and its message does not name the argument
        taken = accepted_in_yaml(Callback, name, needed, argument)
        assert taken == legal(LEGAL_IN_TRICKS, name, argument), argument


LEGAL = [
    (name, argument, written)
    for name, table in LEGAL_IN_TRICKS.items()
    for argument in table
    for written in table[argument].split()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "argument", "written"), LEGAL)
def test_legal_values_train_or_stop_the_fit_with_a_reason(name, argument, written):
    trick = getattr(callbacks, name)(**needs(name, argument), **{argument: ODD[written]})
    options = {"optimizers": lambda module: ScheduleFreeSGD(module.parameters())} if name == "ScheduleFree" else {}
    ends: list[Result] = []
    with torch.compiler.set_stance("force_eager"):  # inductor takes 20 seconds for `compiled`
        message = message_of(lambda: ends.append(run(trick, max_steps=2, **options)), Exception)
    if message is None:
        assert all(weight.isfinite().all() for weight in ends[0].weights.values())
        assert ends[0].trainer.global_step == 2
    else:
        assert name in message
        assert argument in message or repr(ODD[written]) in message
