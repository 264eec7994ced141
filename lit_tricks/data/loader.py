"""The order of the samples, and a loader that resumes in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_tricks._compat import has_iterator
from lit_tricks.data.io.worker_errors import guarded
from lit_tricks.data.samples import Samples, derive_seed

__all__ = ["BalancedSampler", "EvalSampler", "ShuffleSampler", "TrainLoader", "check_same_batches", "eval_batch_size"]

Indices = npt.NDArray[np.int64]


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
        images, passes = self._drawn(epoch, size, -(-size // repeats))
        indices = (images[:, None] + (passes[:, None] * repeats + np.arange(repeats)) * size).ravel()[:size]
        mine = np.resize(indices, self.total_size)[self.rank :: self.num_replicas]  # resize repeats from the start
        return mine.tolist()  # type: ignore[no-any-return]

    def _drawn(self, epoch: int, size: int, count: int) -> tuple[Indices, Indices]:
        """Return ``count`` of ``size`` images in the order of an epoch, and the number of earlier draws of each."""
        images = torch.randperm(size, generator=self._generator(epoch)).numpy()[:count]
        return images, np.full(len(images), epoch)

    def _generator(self, *key: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *key))


class BalancedSampler(ShuffleSampler):
    """Draw rare classes more often, only by (seed, epoch). The number of samples of an epoch does not change.

    Classes of ``n`` images are drawn in proportion to ``n ** (1 - balance)``
    ([Kang et al., 2020](https://arxiv.org/abs/1910.09217), equation 1). Each class has an endless list of shuffled
    passes over its images, of which each epoch takes the next part. So all images of a class are drawn equally often,
    up to one, also over several epochs. The index carries the number of the pass, so that each draw of an image is
    augmented differently.

    Args:
        samples: samples to draw, with their labels in ``targets``.
        num_replicas: number of processes, which share the draws.
        rank: rank of this process.
        seed: seed, the same in all processes.
        repeats: number of times that each draw is in an epoch.
        balance: in (0, 1]. 1 draws all classes equally often, and 0.5 in proportion to the square root of ``n``.

    Raises:
        ValueError: if the samples have no labels, or an epoch has fewer draws than classes.

    Attributes:
        weights: relative frequency of each image, as ``WeightedRandomSampler`` has it.
    """

    def __init__(
        self, samples: Samples, num_replicas: int, rank: int, seed: int, repeats: int = 1, balance: float = 1.0
    ) -> None:
        super().__init__(samples, num_replicas, rank, seed, repeats)
        if samples.targets is None:
            raise ValueError(f"balance={balance:g} needs a label of each image, and the samples have none")
        labels = samples.targets.numpy()
        classes, counts = np.unique(labels, return_counts=True)
        draws = -(-len(labels) // repeats)
        if draws < len(classes):
            raise ValueError(
                f"repeats={repeats} leaves {draws} draws in an epoch for {len(classes)} classes, and "
                f"balance={balance:g} needs at least one of each class: lower repeats"
            )
        self.members: list[Indices] = [np.flatnonzero(labels == label) for label in classes]
        frequency = counts ** (1.0 - balance)
        self.draws: Indices = _shares(frequency, draws)
        self.weights: Tensor = torch.from_numpy((frequency / counts)[np.searchsorted(classes, labels)])

    def _drawn(self, epoch: int, size: int, count: int) -> tuple[Indices, Indices]:
        parts = [self._of_class(place, epoch) for place in range(len(self.members))]
        images, passes = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = torch.randperm(len(images), generator=self._generator(epoch)).numpy()
        return images[order], passes[order]

    def _of_class(self, place: int, epoch: int) -> tuple[Indices, Indices]:
        """Return the images of a class in an epoch, and the numbers of their passes."""
        members, draws = self.members[place], int(self.draws[place])
        first, last = epoch * draws // len(members), -(-(epoch + 1) * draws // len(members))
        passes = np.arange(first, last)
        generators = [self._generator(place, number, 0) for number in range(first, last)]
        shuffled = torch.cat([torch.randperm(len(members), generator=generator) for generator in generators])
        begin = epoch * draws - first * len(members)
        images: Indices = members[shuffled.numpy()][begin : begin + draws]
        return images, passes.repeat(len(members))[begin : begin + draws]


def _shares(weights: npt.NDArray[np.floating[Any]], total: int) -> Indices:
    """Share a number out in proportion to weights, at least 1 each, by the largest remainders."""
    exact = weights / weights.sum() * total
    shares: Indices = np.maximum(np.floor(exact).astype(np.int64), 1)
    missing = total - int(shares.sum())
    order = np.argsort(shares - exact, kind="stable")  # the largest remainders first
    if missing >= 0:
        shares[order[:missing]] += 1
    for _ in range(-missing):  # those that were raised to 1 take from the largest
        shares[np.argmax(shares)] -= 1
    return shares


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
