"""Odd values for every argument of our data modules, modules and models: rejected by name, or legal by the table."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.boxes import write_coco, write_voc
from helpers.cli import write_image_folder
from helpers.masks import write_ade, write_folder
from helpers.masks import write_voc as write_voc_masks
from helpers.odd import accepted, legal

from lit_tricks import Classifier, Detector, Segmenter, commands, data
from lit_tricks.cli.parameters import parameter_names
from lit_tricks.commands import data as data_commands
from lit_tricks.data import CIFAR10, Digits, VOCSegmentation
from lit_tricks.models import (
    Backbone,
    SpatialPyramidPool2d,
    create_model,
    freeze,
    layer_scales,
    load_weights,
    resnet,
    small_vgg,
)

SMALL: dict[str, Any] = {"depth": 18, "width": 1 / 32, "small_input": True}
COMMON = {"num_workers": "0", "predict_dir": "null", "split_seed": "0", "eval_size": "null", "classes": "null"}
PAIRS = {"flip": "true"}
CIFAR = {"root": '"nan"', "download": "true", "val_size": "0", "translate": "null 0", "cutout": "0"} | {
    "crop_scale": "null"
}

LEGAL: dict[str, dict[str, str]] = {
    "ImageTable": {"root": "null", "split_column": "null"},
    "CIFAR10": CIFAR,
    "CIFAR100": CIFAR,
    "ADE20KSegmentation": PAIRS | {"root": '"nan"'},
    "CocoDetection": {"flip": "0"},
    "DigitDetection": {},
    "DigitSegmentation": {},
    "Digits": {},
    "ImageFolder": {
        "resize_size": "null", "balance": "0", "random_erasing": "0", "exif": "true", "cache": "null",
        "val_fraction": "null"
    },
    "SegmentationFolder": {"flip": "true", "ignore_index": "-1"},
    "Streaming": {"resize_size": "null", "random_erasing": "0", "exif": "true", "cache_dir": 'null "nan"'},
    "VOCDetection": {"flip": "0", "test": "null"},
    "VOCSegmentation": PAIRS | {"root": '"nan"', "train_set": '"nan"', "val_set": '"nan"', "masks": '"nan"'},
    "Classifier": {"model_args": "null {}", "weights": "null", "class_names": "null", "freeze": "null"},
    "Segmenter": {
        "model_args": "null {}", "weights": "null", "aux_weight": "0 1.5", "gamma": "0 1.5", "ignore_index": "-1",
        "class_names": "null", "freeze": "null",
    },
    "Detector": {
        "backbone_args": "null {}", "weights": "null", "levels": "null", "anchor_scale": "null 1.5",
        "beta": "null 0 1.5", "model_args": "null {}", "class_names": "null", "freeze": "null",
    },
    "resnet": {
        "small_input": "true", "width": "1.5", "separable": "true", "drop_rate": "0", "drop_path_rate": "0",
        "zero_init_last": "true", "weights": "null",
    },
    "small_vgg": {"width": "1.5", "bn_momentum": "", "logit_scale": "1.5", "weights": "null"},
    "create_model": {"weights": "null"},
    "Backbone": {"weights": "null"},
    "SpatialPyramidPool2d": {},
    "layer_scales": {},
    "freeze": {},
    "load_weights": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder for each data module that needs one."""
    folder = tmp_path_factory.mktemp("roots")
    made = {
        "ImageFolder": write_image_folder(folder / "images"),
        "ADE20KSegmentation": write_ade(folder / "ade"),
        "SegmentationFolder": write_folder(folder / "masks"),
        "VOCSegmentation": write_voc_masks(folder / "voc_masks"),
        "CocoDetection": write_coco(folder / "coco"),
        "VOCDetection": write_voc(folder / "voc", ("VOC2007/trainval", "VOC2012/trainval", "VOC2007/test")),
        "CIFAR10": folder,
        "CIFAR100": folder,
        "Streaming": folder / "shards",
    }
    files = sorted(made["ImageFolder"].glob("train/*/*.jpg"))
    (folder / "table.csv").write_text("file,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    if find_spec("litdata"):
        data_commands.shard(str(made["ImageFolder"]), str(folder / "shards"))
    return {name: str(root) for name, root in made.items()}


def legal_in(name: str, argument: str) -> set[str]:
    table = LEGAL | {each: COMMON | LEGAL[each] for each in data.__all__}
    return legal(table, name, argument)


@pytest.mark.parametrize("name", data.__all__)
def test_odd_values_of_data_modules_are_rejected_or_work(
    name: str, roots: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "Streaming":
        pytest.importorskip("litdata")
    monkeypatch.chdir(roots["ImageFolder"])
    cls = getattr(data, name)
    for argument in parameter_names(cls):
        base: dict[str, Any] = {"root": roots[name]} if name in roots else {}
        if name == "ImageTable":
            base = {"table": f"{roots['CIFAR10']}/table.csv", "val_fraction": 0.25}
        if name == "ImageTable" and argument not in inspect.signature(cls).parameters:  # of ImageFolder
            continue
        make = partial(build, cls, base, argument)
        assert accepted(make, argument) == legal_in(name, argument), argument


def build(function: Callable[..., Any], base: dict[str, Any], argument: str, value: Any) -> Any:
    return function(**{**base, argument: value})


MODULES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Classifier": (Classifier, {"num_classes": 3, "model_args": SMALL, "input_size": (3, 8, 8)}),
    "Segmenter": (Segmenter, {"num_classes": 3, "model_args": SMALL, "input_size": (3, 32, 32)}),
    "Detector": (
        Detector,
        {
            "num_classes": 3, "backbone_args": SMALL, "channels": 8, "head_width": 8, "min_size": 32, "max_size": 64,
            "input_size": (3, 32, 32),
        },
    ),
    "resnet": (resnet, {**SMALL, "num_classes": 2}),
    "small_vgg": (small_vgg, {"width": 1 / 64, "num_classes": 2}),
    "create_model": (create_model, {"name": "resnet", "num_classes": 2, **SMALL}),
    "Backbone": (Backbone, {"name": "resnet", **SMALL}),
    "SpatialPyramidPool2d": (SpatialPyramidPool2d, {}),
    "layer_scales": (partial(layer_scales, resnet(18, width=1 / 32)), {}),
    "freeze": (partial(freeze, resnet(18, width=1 / 32)), {}),
    "load_weights": (partial(load_weights, resnet(18, width=1 / 32)), {}),
}  # fmt: skip


def arguments_of(function: Callable[..., Any]) -> list[str]:
    skipped = (
        ("kwargs", "model_args")
        if function in (create_model, Backbone)
        else ("network", "model", "class_names", "classifiers")
    )
    taken = function.func if isinstance(function, partial) else function
    names = inspect.signature(taken).parameters
    return [name for name in names if name not in skipped or taken in (Classifier, Segmenter, Detector)]


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, base = MODULES[name]
    for argument in arguments_of(function):
        assert accepted(partial(build, function, base, argument), argument) == legal_in(name, argument), argument


# ---------------------------------------------------------------------------------------------------------------------
# NumPy's scalars, tensors and paths are as good as Python's, and become Python's


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_numbers_of_other_libraries_are_stored_as_pythons(kind: Any) -> None:
    module = Digits(batch_size=kind(16), image_size=kind(8), split_seed=kind(3))
    assert all(type(module.hparams[name]) in (int, str, type(None)) for name in ("image_size", "split_seed"))
    assert type(module.batch_size) is int


@pytest.mark.parametrize("cls", [CIFAR10, VOCSegmentation])
def test_a_path_is_stored_as_text(cls: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    module = cls(root=tmp_path, predict_dir=tmp_path / "photos")
    assert type(module.hparams["root"]) is str
    torch.save(dict(module.hparams), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["root"] == str(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Numeric options of commands


class Started(BaseException):
    """The command has checked its arguments, and would begin."""


COMMANDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "ablate": (
        {"config": ["quickstart"], "stack": ["tricks/ema"]},
        {"seeds": "null", "jobs": "", "mode": "", "engine": "", "cpus": "null", "gpus": "null"},
    ),
    "race": (
        {"config": ["quickstart"], "candidates": ["tricks/ema"], "budget": "9"},
        {
            "min_gain": "0 1.5", "max_seeds": "", "short": "", "score": "", "jobs": "", "engine": "", "cpus": "null",
            "gpus": "null",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_commands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*args: Any) -> None:
        raise Started

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_tricks.commands.ablation.ablate.alone_in", begin)
    monkeypatch.setattr("lit_tricks.commands.racing.race.alone_in", begin)
    base, table = COMMANDS[name]

    def make(argument: str, value: Any) -> None:
        with contextlib.suppress(Started):
            getattr(commands, name)(**{**base, argument: value})

    for argument, values in table.items():
        assert accepted(partial(make, argument), argument) == set(values.split()), argument
