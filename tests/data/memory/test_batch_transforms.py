"""Transforms of whole batches: the pixels of torchvision's transforms of single images, for the same draws."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from lit_tricks.data.cifar import rgb_pixels
from lit_tricks.data.memory.batch_transforms import CHUNK, EvalBatch, TrainBatch, boxes
from lit_tricks.data.memory.draws import Key, draw

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
SIDE, COUNT = 32, CHUNK + 9  # more than one part
IMAGES = torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
OPTIONS: list[dict[str, Any]] = [
    {"translate": 4},
    {"translate": 0},
    {"translate": 4, "flip": "none"},
    {"translate": 0, "flip": "none"},
    {"translate": 2, "padding": "reflect", "flip": "alternating"},
    {"translate": 31, "padding": "reflect"},
    {"translate": 31},
    {"translate": 4, "cutout": 12},
    {"cutout": 32},
    {"crop_scale": (0.25, 1.0)},
    {"crop_scale": (0.25, 1.0), "translate": 3, "cutout": 5},
]
CASES = [
    (options, size)
    for options in OPTIONS
    for size in (SIDE, 24, 40)
    if options.get("translate", 0) < size and options.get("cutout", 0) <= size
]


def key(epoch: int = 0, seed: int = 5, count: int = COUNT) -> Key:
    return Key(seed, torch.full((count,), epoch), torch.arange(count) * 3)


def transform(size: int = SIDE, **options: Any) -> TrainBatch:
    return TrainBatch(size, rgb_pixels, MEAN, STD, **options)


def one(image: Tensor, numbers: list[int], phase: int, size: int, options: dict[str, Any]) -> Tensor:
    """Transform an image (3, H, W) by torchvision's functions, for given draws."""
    top, left, flip, cut_y, cut_x, box, box_top, box_left = numbers
    height, width = image.shape[-2:]
    image = image.float()
    if scale := options.get("crop_scale"):
        table = boxes(height, width, *scale)
        h, w = table[box * len(table) >> 32].tolist()
        y, x = box_top * (height - h + 1) >> 32, box_left * (width - w + 1) >> 32
        image = tvf.resized_crop(image, y, x, h, w, [size, size], antialias=True)
    elif (height, width) != (size, size):
        image = tvf.resize(image, [size, size], antialias=True)
    shift = options.get("translate", 0)
    mode = {"zero": "constant", "reflect": "reflect"}[options.get("padding", "zero")]
    image = tvf.pad(image, [shift] * 4, padding_mode=mode)
    image = tvf.crop(image, top * (2 * shift + 1) >> 32, left * (2 * shift + 1) >> 32, size, size)
    kind = options.get("flip", "random")
    if kind != "none" and (flip if kind == "random" else phase) % 2:
        image = tvf.horizontal_flip(image)
    image = tvf.normalize(image, MEAN, STD)
    if cutout := options.get("cutout"):
        y, x = (number * (size - cutout + 1) >> 32 for number in (cut_y, cut_x))
        image = tvf.erase(image, y, x, cutout, cutout, torch.zeros(3, 1, 1))
    return image


@pytest.mark.parametrize(("options", "size"), CASES, ids=str)
def test_pixels_are_those_of_single_images(options: dict[str, Any], size: int) -> None:
    rows = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    for epoch in (0, 3):
        where = key(epoch)
        found = transform(size, **options).batch(IMAGES, rows, where)
        numbers = draw(where).T.tolist()
        phases = (draw(key(-1))[2] + epoch).tolist()
        expected = torch.stack(
            [one(IMAGES[row], *draws, size, options) for row, *draws in zip(rows, numbers, phases, strict=True)]
        )
        exact = size == SIDE and "crop_scale" not in options
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if exact else 1e-4)


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[4:5] + OPTIONS[-1:], ids=str)
def test_a_batch_is_its_images(options: dict[str, Any]) -> None:
    """Bit by bit, whichever images are in a batch, and wherever they are."""
    made, where = transform(**options), key(2)
    whole = made.batch(IMAGES, None, where)
    order = torch.randperm(COUNT)
    shuffled = made.batch(IMAGES, order, Key(where.seed, where.epochs[order], where.indices[order]))
    assert torch.equal(shuffled, whole[order])
    single = made.batch(IMAGES[7:8], None, Key(where.seed, where.epochs[7:8], where.indices[7:8]))
    assert torch.equal(single[0], whole[7])
    assert not torch.equal(made.batch(IMAGES, None, key(2, seed=6)), whole)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    """Tensors of the meta device have no values, so that whatever needs one on the host raises an error."""
    on_device = IMAGES.to("meta")
    where = key()
    found = transform(**options).batch(on_device, where.indices.to("meta"), Key(5, *(x.to("meta") for x in where[1:])))
    assert (found.shape, found.dtype, found.device.type) == (IMAGES.shape, torch.float32, "meta")


def test_augmentation_compiles_in_one_graph() -> None:
    made, where = transform(translate=4, cutout=8, padding="reflect", flip="alternating"), key(1)
    expected = made.batch(IMAGES, where.indices % COUNT, where)
    compiled = torch.compile(made.batch, fullgraph=True, backend="eager")
    assert torch.equal(compiled(IMAGES, where.indices % COUNT, where), expected)


def test_alternating_flips_follow_each_other() -> None:
    made = transform(flip="alternating")
    plain = transform(flip="none").batch(IMAGES, None, key())
    runs = [made.batch(IMAGES, None, key(epoch)) for epoch in range(4)]
    flipped = [(run == plain.flip(3)).flatten(1).all(1) for run in runs]
    assert all(
        (run == plain).flatten(1).all(1).logical_xor(flips).all() for run, flips in zip(runs, flipped, strict=True)
    )
    assert torch.equal(flipped[0], flipped[2])
    assert torch.equal(flipped[1], ~flipped[0])
    assert 0.25 < flipped[0].float().mean() < 0.75
    other = made.batch(IMAGES, None, key(0, seed=6))
    assert not torch.equal(other, runs[0])


def test_crops_are_distributed_as_torchvisions() -> None:
    scale = (0.08, 1.0)
    table = boxes(40, 32, *scale).double()
    crop = v2.RandomResizedCrop(8, scale)
    image = tvf.to_image(torch.zeros(1, 40, 32))
    params = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[each["height"], each["width"]] for each in params]).double()
    for mine, other in ((table, theirs), (table.prod(1, keepdim=True), theirs.prod(1, keepdim=True))):
        error = 4 * other.std(0) / len(other) ** 0.5
        assert ((mine.mean(0) - other.mean(0)).abs() < error).all()
        assert ((mine.std(0) - other.std(0)).abs() < 0.1 * other.std(0)).all()
    assert boxes(10, 100, 1.0, 1.0).tolist() == [[10, 13]]  # none of that area fits


@pytest.mark.parametrize(("size", "resize_size"), [(32, 32), (24, 32), (40, 40), (28, 30)])
def test_evaluation_is_torchvisions(size: int, resize_size: int) -> None:
    made = EvalBatch(size, resize_size, rgb_pixels, MEAN, STD)
    reference = v2.Compose([v2.Resize(resize_size), v2.CenterCrop(size), v2.Normalize(MEAN, STD)])
    found = made.batch(IMAGES, None, key())
    torch.testing.assert_close(found, reference(IMAGES.float()), rtol=0, atol=1e-5)
    wide = Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 80), dtype=np.uint8))
    expected = reference(rgb_pixels(wide).float())
    torch.testing.assert_close(made(wide), expected, rtol=0, atol=1e-5)


def test_an_image_is_transformed_by_torchs_generator() -> None:
    image, made = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()), transform(translate=4)
    torch.manual_seed(1)
    found = [made(image) for _ in range(3)]
    torch.manual_seed(1)
    assert torch.equal(made(image), found[0])
    assert not torch.equal(found[0], found[1])
    assert found[0].shape == (3, 32, 32)


def test_copies_leave_constants_of_devices_behind() -> None:
    made = transform(crop_scale=(0.25, 1.0))
    found = made.batch(IMAGES, None, key())
    assert made._constants
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert not twin._constants
        assert torch.equal(twin.batch(IMAGES, None, key()), found)
        assert repr(twin) == repr(made)
