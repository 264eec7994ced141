"""Progressive resizing: train on small images at first, and on full images at the end, in as many steps (Howard, 2018).

One caveat: each size needs its own kernels and graphs. With ``torch.compile`` the first step at each size is slow.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor

from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.arguments import MAX_SIDE, choice, integer, invalid, number
from lit_tricks.utils.batch import describe, find, reject_boxes, replace, tensors_in
from lit_tricks.utils.image_size import require_fit, resize, resize_nearest
from lit_tricks.utils.training_length import TrainingLength, steps_done

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["ProgressiveResizing", "progressive_side"]


def progressive_side(progress: float, side: int, start_scale: float, start: float, end: float, multiple_of: int) -> int:
    """Return the side of the images: ``start_scale`` of the full side until ``start``, then rising to it until ``end``.

    Args:
        progress: share of the run that is done, in [0, 1].
        side: the full side in pixels.
        start_scale: scale at the start, in (0, 1).
        start: progress from which the side rises.
        end: progress from which the side is full.
        multiple_of: smaller sides are rounded to the nearest multiple of this number, at least to the number itself.

    Example:
        >>> [progressive_side(part, 224, 0.5, 0.2, 0.8, 32) for part in (0.0, 0.5, 0.8)]
        [128, 160, 224]
    """
    if progress >= end:
        return side
    scale = start_scale + (1 - start_scale) * max(0.0, progress - start) / (end - start)
    return min(side, multiple_of * max(1, round(side * scale / multiple_of)))


class ProgressiveResizing(Trick):
    """Train on small images first, and on larger ones later ([Howard, 2018](https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html)).

    Batches are resized on the device (bilinear, antialiased). The side of the images is ``start_scale`` times the full
    side until ``start``, and rises linearly to the full side at ``end``. Masks (N, H, W) are also resized (nearest).
    The size depends on the optimizer step only, so a resumed run continues with the same sizes. Mixing tricks get the
    resized images. PreciseBN, validation, test and prediction get images of full size.

    Cost: less than a run at full size, as a step at half the side has a quarter of the operations. Use it for long runs
    of convolutional networks at 160 pixels or more. Leave it out if details decide the class, if data loading limits
    the speed, and for networks that take only one size. BatchNorm has other statistics on small images, so the run
    needs a last part at full size, or PreciseBN or FixRes afterwards.

    Args:
        start_scale: side at the start as a share of the full side, in (0, 1). Near 0 images show nothing. 0.5 is usual.
        start: share of the run after which the images begin to grow, in [0, ``end``).
        end: share of the run after which images have full size, in (``start``, 1]. 1 means the last step.
        multiple_of: smaller sides are multiples of this number of pixels, 1 or more. Use the network's total stride,
            such as 32. Fewer sizes need fewer kernels and graphs.
        mode: "resize", or "crop", which cuts a random part of that size out of all images of a batch.
        total_steps: optimizer steps of the run. Set it only if Trainer and loaders have no length.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when training starts, if the length of the run is unknown; in the first batch, if it has no
            images, they are too small, or the network cannot take the smallest size.

    Example:
        ``- {class_path: ProgressiveResizing, init_args: {start_scale: 0.5, end: 0.8}}``
    """

    conflict_with_frozen = "trains at other sizes than the one that FixRes trains for"

    def __init__(
        self,
        start_scale: float = 0.5,
        start: float = 0.0,
        end: float = 0.8,
        multiple_of: int = 32,
        mode: Literal["resize", "crop"] = "resize",
        total_steps: int | None = None,
    ) -> None:
        self.start_scale: float = number(self, "start_scale", start_scale, "(0, 1)", "0.5 begins with half the side.")
        fix = "Give a share of the run, such as 0.8."
        self.start: float = number(self, "start", start, "[0, 1)", fix)
        self.end: float = number(self, "end", end, "(0, 1]", fix)
        if not self.start < self.end:
            raise invalid(self, "images grow from `start` to `end`. Give an `end` above `start`.", start=start, end=end)
        fix = "Give a number of pixels."
        self.multiple_of: int = integer(self, "multiple_of", multiple_of, 1, fix, most=MAX_SIDE)
        self.mode: str = choice(self, "mode", mode, ("resize", "crop"))
        fix = "Give the number of steps of the whole run."
        self.total_steps: int | None = integer(self, "total_steps", total_steps, 1, fix, or_none="the Trainer's number")
        self._seeds, self._draws = Generator(), Generator()
        self._length = TrainingLength(
            "ProgressiveResizing", "", "ProgressiveResizing(total_steps=...)", self.total_steps
        )
        self._side = 0
        self._checked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the batches before tricks that change their targets."""
        if stage != "fit":
            return
        self._checked = False
        self.change_training_batches(trainer, partial(self._resized, trainer))
        if trainer.global_step == 0:
            seed: int = trainer.strategy.broadcast(torch.initial_seed())
            self._seeds.manual_seed(seed ^ zlib.crc32(b"ProgressiveResizing"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the run in steps, and announce the sizes.

        Raises:
            RuntimeError: if the length of the run is unknown.
        """
        self._length.measure(trainer, pl_module)
        first, full = round(self.start * self._length.run), round(self.end * self._length.run)
        self.announce(
            f"{self.mode} to {self.start_scale:g} of the side, rising from step {first}, full from step {full} of "
            f"{self._length.run}; for the last epochs, or after it, FixRes or PreciseBN fit the statistics to full size"
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the shorter side."""
        if self._side and self.should_log(trainer):
            pl_module.log("progressive_resizing/size", float(self._side))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise if a batch makes another number of steps than assumed."""
        self._length.check(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator of the seeds of crops."""
        return {"seeds": self._seeds.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generator of the seeds."""
        self._seeds.set_state(state_dict["seeds"].cpu())

    def _resized(self, trainer: Trainer, batch: Any) -> Any:
        images = _images_in(batch)
        height, width = images[next(iter(images))].shape[-2:]
        if not self._checked:
            self._check(trainer, next(iter(images.values())))
        progress = steps_done(trainer, trainer.lightning_module) / self._length.run
        size = self._side_at(progress, height), self._side_at(progress, width)
        self._side = min(size)
        seed = int(torch.randint(2**62, (), generator=self._seeds)) + trainer.global_rank
        if size == (height, width):
            return batch
        self._draws.manual_seed(seed)
        top, left = (
            int(torch.randint(full - new + 1, (), generator=self._draws))
            for full, new in zip((height, width), size, strict=True)
        )
        for path, tensor in list(tensors_in(batch)):
            if tensor.shape[-2:] != (height, width) or tensor.dim() < 3:
                continue
            if self.mode == "crop":
                changed = tensor[..., top : top + size[0], left : left + size[1]].contiguous()
            else:
                changed = resize(tensor, size) if path in images else resize_nearest(tensor, size)
            batch = replace(batch, path, changed)
        return batch

    def _side_at(self, progress: float, side: int) -> int:
        return progressive_side(progress, side, self.start_scale, self.start, self.end, self.multiple_of)

    def _check(self, trainer: Trainer, images: Tensor) -> None:
        """Check once that the smallest size is smaller than the images, and that the network supports it."""
        self._checked = True
        sides = tuple(images.shape[-2:])
        smallest = self._side_at(0.0, sides[0]), self._side_at(0.0, sides[1])
        if smallest == sides:
            raise RuntimeError(
                f"ProgressiveResizing has no effect: of {sides[0]} x {sides[1]} pixels, {self.start_scale:g} is not "
                f"less in multiples of {self.multiple_of}: give a smaller multiple_of, as ProgressiveResizing("
                f"multiple_of={max(1, min(sides) // 8)})."
            )
        known = torch.zeros_like(images[:1])
        require_fit(trainer.lightning_module, smallest, known, f"ProgressiveResizing(start_scale={self.start_scale:g})")

    def unwrap(self) -> None:
        """Also forget the size."""
        super().unwrap()
        self._side = 0


def _images_in(batch: Any) -> dict[Any, Tensor]:
    """Return the images of a batch: floats or uint8 with 4 dimensions, of the size of the first."""
    reject_boxes(batch, "ProgressiveResizing", "images without other data, or with masks")
    try:
        found = find(batch, "ProgressiveResizing")[0]
    except RuntimeError:
        found = dict(tensors_in(batch))
    images = {p: t for p, t in found.items() if t.dim() == 4 and (t.is_floating_point() or t.dtype == torch.uint8)}
    if not images:
        raise RuntimeError(
            f"ProgressiveResizing found no images in the training batch: {describe(batch)}. It needs tensors of "
            "floats or uint8 of shape (N, C, H, W): let the collate_fn of the loader return such."
        )
    return images
