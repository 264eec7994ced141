"""Inputs and target of a batch, in every layout that loaders give."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from lit_tricks.utils.batch import describe, find, replace

IMAGE, LABEL = torch.randn(4, 3, 8, 8), torch.arange(4)
BYTES, MASK = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 8, 8, dtype=torch.int64)


class Sample(NamedTuple):
    image: Any
    label: Any
    index: Any = None


@dataclass(frozen=True)
class Frozen:
    image: Any
    label: Any


def found(batch: Any) -> tuple[set[Any], Any]:
    inputs, where, target = find(batch, "MixUp")
    at = batch
    for key in where:
        at = getattr(at, key) if isinstance(at, Sample | Frozen) else at[key]
    assert at is target
    return set(inputs), where


@pytest.mark.parametrize(
    ("batch", "inputs", "target"),
    [
        ([IMAGE, LABEL], {(0,)}, (1,)),
        ((LABEL, IMAGE), {(1,)}, (0,)),
        ({"x": IMAGE, "anything": LABEL}, {("x",)}, ("anything",)),
        (UserDict(image=IMAGE, label=LABEL), {("image",)}, ("label",)),
        (Sample(IMAGE, LABEL), {("image",)}, ("label",)),
        (Frozen(IMAGE, LABEL), {("image",)}, ("label",)),
        ([[IMAGE, IMAGE], LABEL, ["a.png"] * 4], {(0, 0), (0, 1)}, (1,)),
        ({"rgb": IMAGE, "depth": IMAGE[:, :1], "label": LABEL}, {("rgb",), ("depth",)}, ("label",)),
        ({"image": IMAGE, "mask": MASK, "crs": object(), "bounds": [1, 2]}, {("image",)}, ("mask",)),
        ({"image": IMAGE, "mask": MASK[:, None]}, {("image",)}, ("mask",)),
        ([BYTES, LABEL], {(0,)}, (1,)),
        ([BYTES, LABEL.to(torch.uint8)], {(0,)}, (1,)),
        ([IMAGE, MASK.to(torch.uint8)], {(0,)}, (1,)),
        ({"image": BYTES[:, 0], "mask": MASK.to(torch.uint8)}, {("image",)}, ("mask",)),
        ([IMAGE, LABEL[:, None]], {(0,)}, (1,)),
        ([IMAGE, LABEL, LABEL.float()], {(0,)}, (1,)),  # sample weights stay
        ([torch.randn(4, 7), LABEL], {(0,)}, (1,)),  # a table
        ([IMAGE, torch.randn(4, 7), LABEL], {(0,)}, (2,)),  # images, and something beside them
        ([torch.ones(4, 7, dtype=torch.int64), LABEL], set(), (1,)),  # tokens are no input to mix
        ({"image": IMAGE, "label": LABEL, "index": LABEL}, {("image",)}, ("label",)),
        ({"image": IMAGE, "class_label": LABEL, "index": LABEL}, {("image",)}, ("class_label",)),
        (Sample(IMAGE, LABEL, LABEL), {("image",)}, ("label",)),
        ({"labeled": (IMAGE, LABEL), "unlabeled": torch.randn(9, 3, 8, 8)}, {("labeled", 0)}, ("labeled", 1)),
        ((IMAGE, {"target": LABEL, "id": LABEL}), {(0,)}, (1, "target")),
    ],
)
def test_finds_inputs_and_target(batch, inputs, target):
    assert found(batch) == (inputs, target)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([IMAGE, LABEL.float()], r"no target in the training batch: list\(float32 \(4, 3, 8, 8\), float32 \(4,\)\)"),
        ([IMAGE, LABEL, LABEL], r"2 tensors that could be the target.*int64 \(4,\), int64 \(4,\)\).*NamedTuple"),
        ({"label": LABEL, "mask": MASK, "image": IMAGE}, "2 tensors.*label: int64 .*mask: int64"),
        ([IMAGE, IMAGE], "no target"),
        ([BYTES[:, 0]], "no target"),
        (IMAGE, "no target in the training batch: float32"),
        ([IMAGE, ("one",) * 20], r"no target.*tuple\(str, str, .*\.\.\.\)"),
        (None, "no target in the training batch: NoneType"),
    ],
)
def test_rejects_with_the_structure_that_it_saw(batch, message):
    with pytest.raises(RuntimeError, match=f"(?s)^MixUp found {message}"):
        find(batch, "MixUp")


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ([1, 2], (1,)),
        ((1, 2), (1,)),
        (Sample(1, 2), ("label",)),
        (Frozen(1, 2), ("label",)),
        (OrderedDict(image=1, label=2), ("label",)),
        (UserDict(image=1, label=2), ("label",)),
        ((1, {"a": [0, Sample(1, 2)]}), (1, "a", 1, "label")),
    ],
)
def test_replaces_in_a_copy_of_the_same_type(batch, path):
    before = describe(batch), repr(batch)
    changed = replace(batch, path, 3)
    assert type(changed) is type(batch)
    assert repr(changed) == repr(batch).replace("2", "3")
    assert (describe(batch), repr(batch)) == before
