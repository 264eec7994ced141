"""The numbers of CutMix, against the paper's formula, torchvision and timm, and its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences, make_trainer
from helpers.losses import fit_with, loader_of
from helpers.modules import eval_loader, module_class
from torch import Tensor, nn

from lit_tricks.callbacks import CutMix, LabelSmoothing
from lit_tricks.callbacks.cutmix import cutmix, cutmix_box, kept_area
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying

N, K = 5, 4
IMAGES = torch.randn(N, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 2, 2])
LOGITS = torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PERMUTATION = torch.tensor([3, 0, 4, 1, 2])
CE = F.cross_entropy


def test_box_is_clipped_to_the_image():
    assert cutmix_box(8, 12, lam=0.75, center=(4, 6)) == (2, 6, 3, 9)  # a quarter of the area
    assert cutmix_box(8, 12, lam=0.75, center=(0, 11)) == (0, 2, 8, 12)
    assert cutmix_box(8, 12, lam=1.0, center=(3, 3)) == (3, 3, 3, 3)
    assert cutmix_box(8, 12, lam=0.0, center=(4, 6)) == (0, 8, 0, 12)
    assert kept_area(8, 12, (2, 6, 3, 9)) == 0.75
    assert kept_area(8, 12, (0, 2, 8, 12)) == 1 - 8 / 96
    assert kept_area(8, 12, (3, 3, 3, 3)) == 1
    assert kept_area(8, 12, (0, 8, 0, 12)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8, torch.int64])
def test_pixels_come_from_the_partner_within_the_box(dtype):
    images = (IMAGES * 50 + 100).to(dtype)
    before = images.clone()
    mixed = cutmix(images, PERMUTATION, (1, 4, 5, 12))
    assert mixed.dtype == dtype
    for i in range(N):
        for row in range(8):
            for column in range(12):
                inside = 1 <= row < 4 and 5 <= column < 12
                source = PERMUTATION[i] if inside else i
                assert torch.equal(mixed[i, :, row, column], images[source, :, row, column])
    assert torch.equal(images, before)


@pytest.mark.parametrize("seed", range(8))
def test_is_torchvisions_with_its_box_and_its_partner(seed, monkeypatch):
    from torchvision.transforms import v2

    theirs = v2.CutMix(num_classes=K, alpha=1.0)
    draws = torch.Generator().manual_seed(seed)
    lam = float(torch.rand((), generator=draws))
    column, row = int(torch.randint(12, (), generator=draws)), int(torch.randint(8, (), generator=draws))
    monkeypatch.setattr(theirs, "_dist", type("Dist", (), {"sample": lambda self, size: torch.tensor([lam])})())
    answers = iter([torch.tensor([column]), torch.tensor([row])])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randint", lambda *args, **kwargs: next(answers))
        images, soft = theirs(IMAGES, LABELS)
    box = cutmix_box(8, 12, lam, (row, column))
    roll = torch.arange(N).roll(1)
    assert torch.equal(cutmix(IMAGES, roll, box), images)
    share = torch.full((N,), kept_area(8, 12, box), dtype=torch.float64)
    target = carrying(LABELS, LossSpec(("CutMix",)), LABELS[roll], share)
    torch.testing.assert_close(CE(LOGITS, target), CE(LOGITS, soft.double()), rtol=1e-6, atol=0)


def test_box_is_timms(monkeypatch):
    """For cuts of an even size; of an odd one the paper and torchvision leave the last row, and timm does not."""
    import numpy as np
    from timm.data.mixup import cutmix_bbox_and_lam

    for row, column, lam in ((0, 0, 0.3), (5, 11, 0.7), (4, 6, 0.0), (7, 2, 0.75)):
        answers = iter([row, column])
        monkeypatch.setattr(np.random, "randint", lambda *args, answers=answers, **kwargs: next(answers))
        theirs, corrected = cutmix_bbox_and_lam((N, 3, 8, 12), lam, correct_lam=True)
        box = cutmix_box(8, 12, lam, (row, column))
        assert box == tuple(int(edge) for edge in theirs)
        assert kept_area(8, 12, box) == pytest.approx(corrected)


def mixed(labels: Tensor, seed: int = 0, **inputs: Tensor) -> tuple[dict[Any, Tensor], SoftTarget, float]:
    target = carrying(labels, LossSpec(("CutMix",)))
    return CutMix().mix(inputs or {"x": IMAGES}, target, PERMUTATION, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_mixed_by_the_area_that_was_cut(seed):
    inputs, target, lam = mixed(LABELS, seed)
    kept = (inputs["x"] == IMAGES).all(1).double().mean((1, 2))
    torch.testing.assert_close(kept, torch.full((N,), lam, dtype=torch.float64))
    loss = lam * CE(LOGITS, LABELS) + (1 - lam) * CE(LOGITS, LABELS[PERMUTATION])
    torch.testing.assert_close(CE(LOGITS, target), loss, rtol=1e-6, atol=0)
    assert target.tolist() == (LABELS if lam >= 0.5 else LABELS[PERMUTATION]).tolist()


def test_masks_are_cut_like_the_images():
    images = torch.randint(256, (N, 1, 8, 12))
    for mask in (images.squeeze(1), images):
        inputs, target, _ = mixed(mask, seed=2, x=images.float(), y=images.to(torch.float64))
        assert torch.equal(inputs["x"].long().view_as(target), torch.tensor(target.tolist()))
        assert torch.equal(inputs["x"].double(), inputs["y"])
        assert not torch.equal(inputs["x"], images.float())
        assert len(target.parts) == 1


def test_rejects_what_has_no_area_or_several():
    message = r"CutMix cuts images \(N, ..., H, W\) of one size, also the masks, and found "
    with pytest.raises(RuntimeError, match=message + r"float32 \(5, 7\), int64 \(5,\)"):
        mixed(LABELS, x=torch.zeros(N, 7))
    with pytest.raises(RuntimeError, match=message + r"float32 \(5, 3, 4, 4\), float32 \(5, 3, 8, 8\)"):
        mixed(LABELS, x=torch.zeros(N, 3, 4, 4), y=torch.zeros(N, 3, 8, 8))
    with pytest.raises(RuntimeError, match=message + r".*int64 \(5, 4, 6\)"):
        mixed(torch.zeros(N, 4, 6, dtype=torch.int64))


def test_segmentation_with_ignored_pixels():
    """The loss of a fit is that of the batch that the module got; with smoothing next to it."""
    seen: list[Tensor] = []

    class Segmenter(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(1, 3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            mask = batch["mask"].long()
            logits = self.net(batch["image"])
            loss = CE(logits, mask, ignore_index=255)
            plain = torch.tensor(mask.tolist())
            seen.append(loss.detach() - CE(logits, plain, ignore_index=255, label_smoothing=0.1).detach())
            assert torch.equal(batch["image"][:, 0].long(), plain)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    mask = torch.randint(3, (4, 8, 8), dtype=torch.uint8)
    mask[:, :2] = 255
    batch = {"image": mask[:, None].float(), "mask": mask}
    trainer = make_trainer(CutMix(), LabelSmoothing(0.1), max_epochs=1, limit_val_batches=0)
    trainer.fit(Segmenter(), loader_of(batch, batch, batch), eval_loader())
    assert [float(difference) for difference in seen] == [0.0, 0.0, 0.0]


def test_order_beside_smoothing_has_no_meaning():
    weights = [
        fit_with(CE, *tricks).weights
        for tricks in ([CutMix(), LabelSmoothing(0.3)], [LabelSmoothing(0.3), CutMix()], [CutMix()])
    ]
    assert not differences(*weights[:2])
    assert differences(*weights[1:])
