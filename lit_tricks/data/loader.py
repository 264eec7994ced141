"""The order of the samples, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_tricks._compat import has_iterator
from lit_tricks.data.io.worker_errors import guarded
from lit_tricks.data.samples import Samples, derive_seed

__all__ = ["EvalSampler", "ShuffleSampler", "TrainLoader", "check_same_batches", "eval_batch_size"]


class ShuffleSampler(DistributedSampler[int]):
    """Shuffle only by (seed, epoch), and yield indices that carry the epoch.

    It is a ``DistributedSampler`` even for one process, because Lightning leaves such a sampler in place and calls
    its ``set_epoch``. Like its parent, it repeats a few samples if the number of processes does not divide their
    number.

    With repeats, an epoch has the same number of samples from fewer images. Each image occurs several times in a row,
    on several processes or in one batch ([Hoffer et al., 2020](https://arxiv.org/abs/1901.09335)). The index then
    carries the number of the pass over the images, ``epoch * repeats + repeat``, so that each repeat is augmented
    differently.

    Args:
        samples: samples to shuffle.
        num_replicas: number of processes.
        rank: rank of this process.
        seed: seed, the same in all processes.
        repeats: number of times that each image is in an epoch.
    """

    def __init__(self, samples: Samples, num_replicas: int, rank: int, seed: int, repeats: int = 1) -> None:
        super().__init__(samples, num_replicas, rank, seed=seed)
        self.repeats = repeats

    def __iter__(self) -> Iterator[int]:
        return _Order(self)

    def order(self, epoch: int) -> list[int]:
        """Give the indices of this process in an epoch."""
        size, repeats = len(self.dataset), self.repeats  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        images = torch.randperm(size, generator=generator).numpy()[: -(-size // repeats)]
        passes = epoch * repeats + np.arange(repeats)
        indices = (images[:, None] + passes * size).ravel()[:size]
        mine = np.resize(indices, self.total_size)[self.rank :: self.num_replicas]  # resize repeats from the start
        return mine.tolist()  # type: ignore[no-any-return]


class _Order(Iterator[int]):
    """The indices of an epoch, with the state that StatefulDataLoader saves."""

    def __init__(self, sampler: ShuffleSampler) -> None:
        self.sampler = sampler
        self._begin(sampler.epoch, 0)

    def _begin(self, epoch: int, given: int) -> None:
        self.epoch, self.given = epoch, given
        self.indices = self.sampler.order(epoch)

    def __next__(self) -> int:
        if self.given == len(self.indices):
            raise StopIteration
        self.given += 1
        return self.indices[self.given - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin(**state)


class TrainLoader(StatefulDataLoader):  # type: ignore[misc]  # torchdata is untyped
    """A loader that starts its workers at the first batch, and resumes in the middle of an epoch.

    Lightning makes the iterator before it sets the epoch of the sampler, and workers prefetch at once. After a resume
    they would load the batches of epoch 0. Lightning saves ``state_dict`` in its checkpoints.
    """

    next_iter_state: dict[str, Any] | None

    def __iter__(self) -> Iterator[Any]:
        """Load an epoch, or what is left of it.

        Raises:
            ValueError: if it was begun with other batches.
        """
        state = self.next_iter_state
        # A state of an epoch that was finished does not concern the epoch that starts now.
        if state and state["epoch"] != self._epoch():
            self.next_iter_state = None
        elif state:
            check_same_batches((state["processes"], state["batch_size"]), (self._processes(), self.batch_size))
        yield from guarded(self, super().__iter__)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the batches that were returned in the epoch."""
        if not has_iterator(self):  # not begun: the parent would start the workers
            return dict(self.next_iter_state or {})
        now = {"epoch": self._epoch(), "workers": self.num_workers > 0, "batch_size": self.batch_size}
        return {**super().state_dict(), **now, "processes": self._processes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was returned, if the next epoch is its epoch.

        Raises:
            RuntimeError: if the state was saved with worker processes and there are none now, or the reverse.
        """
        if state and state["workers"] != (self.num_workers > 0):
            before = "at least 1" if state["workers"] else "0"
            raise RuntimeError(
                f"num_workers={self.num_workers} cannot resume in the middle of an epoch that started with "
                f"num_workers of {before}: resume with such a number, or from a checkpoint at the end of an epoch"
            )
        super().load_state_dict(state)

    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)  # Trainer(overfit_batches) has put another sampler there

    def _processes(self) -> int:
        return getattr(self.sampler, "num_replicas", 1)


def check_same_batches(before: tuple[int, int], now: tuple[int, int]) -> None:
    """Compare (number of processes, batch size) of the beginning of an epoch and of its rest.

    Lightning counts the batches of one process, and ends the epoch at their number. With other values it would skip
    samples or the validation.

    Raises:
        ValueError: if they differ.
    """
    if before != now:
        (processes, size), (processes_now, size_now) = before, now
        raise ValueError(
            f"an epoch that started in {processes} processes with batches of {size} cannot resume in {processes_now} "
            f"with batches of {size_now}: resume with as many, or from a checkpoint of the end of an epoch"
        )


class EvalSampler(DistributedSampler[int]):
    """Share samples among processes, in their order, each once; shares differ by one at most.

    It is a ``DistributedSampler`` so that Lightning leaves it in place: its own repeats samples.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


def eval_batch_size(batch_size: int, samples: int, replicas: int) -> int:
    """Give the batch size next to ``batch_size`` with which all processes have the same number of batches.

    In a fit, processes wait for each other in each batch of validation, as DDP gives all the buffers of the first.

    Raises:
        ValueError: if there are fewer samples than processes.
    """
    least, more = divmod(samples, replicas)
    if least == 0:
        raise ValueError(f"{samples} images cannot be shared among {replicas} processes: use fewer processes")
    if not more:
        return batch_size
    smaller, larger = range(batch_size, 1, -1), range(batch_size + 1, least + 2)
    size: int = next(size for size in (*smaller, *larger) if least % size)
    return size
