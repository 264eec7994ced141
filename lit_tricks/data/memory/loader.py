"""Loaders of images in memory: batches are made at once, on the device of the images, by the process that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lit_tricks.data.io.worker_errors import EvalLoader
from lit_tricks.data.loader import ShuffleSampler, TrainLoader, check_same_batches
from lit_tricks.data.memory.batch_transforms import BatchTransform
from lit_tricks.data.memory.draws import Key
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.data.samples import Samples, WholeBatch, collate

__all__ = ["MemoryEvalLoader", "MemorySamples", "MemoryTrainLoader"]

CPU = torch.device("cpu")
Place = tuple[Tensor, Tensor]  # images and labels


class MemorySamples(Samples):
    """Samples of images in memory. A ``BatchTransform`` makes whole batches of them; others act image by image.

    Attributes:
        device: where batches are made; always the CPU in a worker process.
        share: of the device's free memory that the images may take. They stay in the host's memory where they would
            take more, and at 0; then each batch is copied to the device.
    """

    source: MemorySource
    device = CPU
    share: float = 0.0

    def place(self) -> Place:
        """Return images and labels on the device if there is room, or in the host's memory."""
        images = self.source.stored
        on_device = images.on(self.device, self.share) if self.share and self._device() != CPU else None
        return on_device or (images.images, images.labels)

    def plan(self, indices: Tensor, place: Place) -> Tensor:
        """Return rows, epochs and indices, int64, shape (3, N), for the images.

        Args:
            indices: of samples, which carry the epoch; on the CPU.
            place: of the images.
        """
        epochs = torch.div(indices, len(self), rounding_mode="floor")
        indices = indices - epochs * len(self)
        plan = torch.stack((self.source.rows[indices], epochs, indices))
        return plan if place[0].device == CPU else _sent(plan, place[0].device)

    def batch(self, place: Place, plan: Tensor) -> list[Tensor]:
        """Make the batch [images, labels] of a part of a plan."""
        transform, device = cast(BatchTransform, self.transform), self._device()
        (images, labels), (rows, epochs, indices) = place, plan
        labels = labels[rows]
        if images.device == device:
            return [transform.batch(images, rows, Key(self.seed, epochs, indices)), labels]
        room = torch.empty(len(rows), *images.shape[1:], dtype=torch.uint8, pin_memory=_pins(device))
        taken = torch.index_select(images, 0, rows, out=room)
        taken, labels, plan = (_sent(tensor, device) for tensor in (taken, labels, plan))
        return [transform.batch(taken, None, Key(self.seed, plan[1], plan[2])), labels]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Give the samples of a batch (see the base class)."""
        if not isinstance(self.transform, BatchTransform):
            return super().__getitems__(indices)
        place = self.place()
        whole = self.batch(place, self.plan(torch.as_tensor(indices), place))
        samples = WholeBatch(zip(*whole, strict=True))
        samples.whole = whole
        return samples

    def _device(self) -> torch.device:
        return CPU if get_worker_info() else self.device


class MemoryTrainLoader(TrainLoader):
    """A loader of training batches that makes each at once, unless it has workers, and resumes in an epoch."""

    _begun: tuple[int, int] | None = None  # the epoch, and the batches of it that were handed out

    def __iter__(self) -> Iterator[Any]:
        """Load an epoch, or what is left of it (see the base class)."""
        if not _at_once(self):
            yield from super().__iter__()
            return
        epoch, given = self._epoch(), 0
        state, self.next_iter_state = self.next_iter_state, None
        if state and state["epoch"] == epoch:
            check_same_batches((state["processes"], state["batch_size"]), (self._processes(), self.batch_size))
            given = state["given"]
        for batch in _batches(self, given):
            given += 1
            self._begun = epoch, given
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return what was handed out in the epoch."""
        if not _at_once(self):
            return super().state_dict()
        if self._begun is None:
            return dict(self.next_iter_state or {})
        epoch, given = self._begun
        now = {"epoch": epoch, "given": given, "workers": False}
        return {**now, "batch_size": self.batch_size, "processes": self._processes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out (see the base class)."""
        super().load_state_dict(state)
        self._begun = None


class MemoryEvalLoader(EvalLoader):
    """A loader of all samples in their order that makes each batch at once, unless it has workers."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _batches(self) if _at_once(self) else super().__iter__()


def _at_once(loader: Any) -> bool:
    plain = loader.batch_size is not None and loader.collate_fn is collate  # neither was replaced
    return plain and not loader.num_workers and isinstance(loader.dataset, MemorySamples)


def _batches(loader: DataLoader[Any], given: int = 0) -> Iterator[Any]:
    """Make the batches of an epoch, except for the first ones, which were given before."""
    samples, size, sampler = cast(MemorySamples, loader.dataset), loader.batch_size or 1, loader.sampler
    order = sampler.order(sampler.epoch) if isinstance(sampler, ShuffleSampler) else list(sampler)
    stop = len(order) // size * size if loader.drop_last else len(order)
    starts = range(given * size, stop, size)
    if not isinstance(samples.transform, BatchTransform):
        for start in starts:
            yield collate(samples.__getitems__(order[start : start + size]))
        return
    place = samples.place()
    plan = samples.plan(torch.tensor(order), place)
    for start in starts:
        yield samples.batch(place, plan[:, start : min(start + size, stop)])


def _pins(device: torch.device) -> bool:
    return device.type == "cuda"


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to a device; out of pinned memory, neither waits for the other."""
    if not _pins(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
