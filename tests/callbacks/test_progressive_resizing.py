"""ProgressiveResizing: the sizes of a run, what is resized and how, and what is left unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.fits import Saver, differences, make_trainer, weights_of
from helpers.modules import lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as v2

from lit_tricks import CutMix, MixUp, PreciseBN, ProgressiveResizing
from lit_tricks.callbacks.progressive_resizing import progressive_side
from lit_tricks.utils.image_size import resize, resize_nearest

SIDE, STEPS = 16, 12  # 3 epochs of 4 batches


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 112), (0.1, 112), (0.2, 112), (0.35, 144), (0.5, 160), (0.79, 224), (0.8, 224), (1.0, 224)],
)
def test_side_is_a_closed_form_of_the_progress(progress, expected):
    scale = 0.5 + 0.5 * min(1.0, max(0.0, (progress - 0.2) / 0.6))
    side = progressive_side(progress, 224, 0.5, 0.2, 0.8, 16)
    assert side == expected
    assert abs(side - 224 * scale) <= 8


def test_side_is_never_above_the_full_one_nor_below_a_multiple():
    for full in (33, 224, 299):
        for step in range(101):
            side = progressive_side(step / 100, full, 0.1, 0.0, 1.0, 32)
            assert 32 <= side <= full
            assert side % 32 == 0 or side == full
    assert progressive_side(1.0, 299, 0.5, 0.0, 1.0, 32) == 299


class Net(lightning().LightningModule):
    """A dense classifier, or one of whole images, that keeps what it sees."""

    def __init__(self, dense: bool = False, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        self.dense, self.automatic_optimization = dense, not manual
        self.seen: list[Any] = []

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images.float())
        return logits if self.dense else logits.mean((2, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.seen.append(batch)
        loss = F.cross_entropy(self(batch[0]), batch[1].long())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self(batch[0]).isfinite().all()
        assert batch[0].shape[-2:] == (SIDE, SIDE)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def samples(dense: bool = False, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, SIDE, SIDE, generator=generator) * 255
    labels = torch.randint(3, (8, SIDE, SIDE) if dense else (8,), generator=generator)
    return DataLoader([(images[i].to(dtype), labels[i]) for i in range(8)], batch_size=2)


def fit(*callbacks: Any, dense: bool = False, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Net:
    module = Net(dense, kwargs.pop("manual", False))
    loader = samples(dense, dtype)
    how = {name: kwargs.pop(name) for name in ("ckpt_path", "weights_only") if name in kwargs}
    torch.manual_seed(0)
    make_trainer(*callbacks, **kwargs).fit(module, loader, loader, **how)
    return module


def sides(module: Net) -> list[int]:
    return [batch[0].shape[-1] for batch in module.seen]


EXPECTED = [progressive_side(step / STEPS, SIDE, 0.5, 0.25, 0.75, 4) for step in range(STEPS)]


@pytest.mark.parametrize("kwargs", [{}, {"manual": True}, {"max_epochs": -1, "max_steps": STEPS}])
def test_batches_have_the_sizes_of_their_steps(kwargs):
    assert EXPECTED == [8, 8, 8, 8, 8, 12, 12, 12, 16, 16, 16, 16]
    assert sides(fit(ProgressiveResizing(0.5, 0.25, 0.75, multiple_of=4), **kwargs)) == EXPECTED


def test_accumulated_batches_have_the_size_of_their_step():
    module = fit(ProgressiveResizing(0.5, 0.0, 1.0, multiple_of=4), accumulate_grad_batches=2)
    assert sides(module) == [progressive_side(i // 2 / 6, SIDE, 0.5, 0.0, 1.0, 4) for i in range(STEPS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_images_are_resized_as_torchvision_does(dtype):
    module = fit(ProgressiveResizing(0.5, end=0.8, multiple_of=4), dtype=dtype)
    images = next(iter(samples(dtype=dtype)))[0]
    expected = v2.resize(images.float(), [8, 8], antialias=True)
    torch.testing.assert_close(module.seen[0][0], expected.round().to(dtype) if dtype == torch.uint8 else expected)
    assert torch.equal(module.seen[-4][0], images)


@pytest.mark.parametrize("size", [(4, 4), (12, 8), (5, 7), (16, 16)])
def test_maps_take_the_nearest_value(size):
    target = torch.randint(9, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(target[:, None].float(), size, mode="nearest-exact")[:, 0].long()
    assert torch.equal(resize_nearest(target, size), expected)
    assert torch.equal(resize(target[:, None].float(), (16, 16)), target[:, None].float())


def test_dense_targets_follow_in_either_mode():
    images, labels = next(iter(samples(dense=True)))
    module = fit(ProgressiveResizing(0.5, end=0.8, multiple_of=4), dense=True)
    assert torch.equal(module.seen[0][1], resize_nearest(labels, (8, 8)))
    module = fit(ProgressiveResizing(0.5, end=0.8, multiple_of=4, mode="crop"), dense=True)
    cuts = [(top, left) for top in range(9) for left in range(9)]
    places = [
        (top, left) for top, left in cuts if torch.equal(module.seen[0][0], images[..., top : top + 8, left : left + 8])
    ]
    [(top, left)] = places
    assert torch.equal(module.seen[0][1], labels[:, top : top + 8, left : left + 8])


def test_crops_differ_from_batch_to_batch_and_resume_bitwise(tmp_path):
    def trick() -> ProgressiveResizing:
        return ProgressiveResizing(0.5, end=1.0, multiple_of=4, mode="crop")

    saver = Saver(tmp_path, steps=[3])
    full = fit(trick(), saver)
    assert not torch.equal(full.seen[0][0], full.seen[4][0])  # the same images, an epoch later
    # the loader here starts its epoch again, so it is the end of an epoch to continue from
    saver = Saver(tmp_path, steps=[4])
    full = fit(trick(), saver)
    resumed = fit(trick(), ckpt_path=saver.paths[-1], weights_only=True)
    assert not differences(weights_of(resumed), weights_of(full))


@pytest.mark.parametrize("dense", [False, True])
def test_mixed_targets_are_made_of_what_was_resized(dense):
    for callbacks in (
        [ProgressiveResizing(0.5, multiple_of=4), MixUp(1.0), CutMix(1.0)],
        [CutMix(1.0), MixUp(1.0), ProgressiveResizing(0.5, multiple_of=4)],
    ):
        module = fit(*callbacks, dense=dense)
        assert sides(module)[0] == 8
        assert module.seen[0][1].shape == ((2, 8, 8) if dense else (2,))


def test_precise_bn_sees_full_images():
    seen = []

    class Watched(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

        def forward(self, images: Tensor) -> Tensor:
            seen.append((self.net[1].training and not self.net[0].training, images.shape[-1]))
            return super().forward(images)

    make_trainer(ProgressiveResizing(0.5, end=1.0, multiple_of=4), PreciseBN(8), max_epochs=1).fit(
        Watched(), samples(), samples()
    )
    assert {side for estimating, side in seen if estimating} == {SIDE}


def test_a_loader_without_a_length_needs_the_steps():
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(samples().dataset)

    stream = DataLoader(Stream(), batch_size=2)
    with pytest.raises(RuntimeError, match=r"ProgressiveResizing\(total_steps=...\)"):
        make_trainer(ProgressiveResizing(multiple_of=4)).fit(Net(), stream, samples())
    module = Net()
    make_trainer(ProgressiveResizing(0.5, 0.25, 0.75, 4, total_steps=STEPS)).fit(module, stream, samples())
    assert sides(module) == EXPECTED


# ---------------------------------------------------------------------------------------------------------------------
# Misuse


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start_scale": 0}, r"start_scale=0"),
        ({"start_scale": 1}, r"start_scale=1"),
        ({"start": 0.8}, "start=0.8, end=0.8"),
        ({"end": 2}, "end=2"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"mode": "pad"}, "mode='pad'"),
        ({"total_steps": 0}, "total_steps=0"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveResizing(**kwargs)


def test_rejects_batches_that_it_can_not_make_smaller():
    with pytest.raises(RuntimeError, match=r"has no effect: of 16 x 16.*\(multiple_of=2\)"):
        fit(ProgressiveResizing())
    vectors = DataLoader([(torch.zeros(3), 0)] * 4, batch_size=2)
    with pytest.raises(RuntimeError, match="found no images"):
        make_trainer(ProgressiveResizing()).fit(Net(), vectors, samples())


def test_rejects_sizes_that_the_network_can_not_take():
    class Other(Net):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images).flatten(1)

    size = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **size)
    strides = nn.Sequential(*(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(4)))
    messages = {
        vit: "takes images of 16 x 16, and none of 8 x 8",
        strides: "8 x 8 pixels are too small .+ at net.3, ",
    }
    for net, message in messages.items():
        with pytest.raises(RuntimeError, match=message):
            make_trainer(ProgressiveResizing(multiple_of=8)).fit(Other(net), samples(), samples())
