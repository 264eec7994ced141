"""The order of the training samples, and a loader that can go on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lit_tricks.data._samples import Samples, derive_seed

__all__ = ["ShuffleSampler", "TrainLoader"]


class ShuffleSampler(DistributedSampler[int]):
    """Shuffle by (seed, epoch) alone, whatever was drawn before, and hand out indices that carry the epoch.

    It is a ``DistributedSampler`` even for one process, because Lightning leaves such a sampler in place and calls
    its ``set_epoch``. Like its parent it repeats a few samples where they do not divide among the processes.

    Args:
        samples: what is shuffled.
        num_replicas: number of processes.
        rank: of this process.
        seed: the same in all processes.
    """

    def __init__(self, samples: Samples, num_replicas: int, rank: int, seed: int) -> None:
        super().__init__(samples, num_replicas, rank, seed=seed)
        self.skip = 0  # leave out so many samples of the next pass, once

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(size, generator=generator).numpy()
        mine = np.resize(order, self.total_size)[self.rank :: self.num_replicas]  # resize repeats from the start
        skip, self.skip = self.skip, 0
        return iter((mine[skip:] + self.epoch * size).tolist())


class TrainLoader(DataLoader[Any]):
    """A loader that starts its workers when the first batch is asked for, and resumes in the middle of an epoch.

    Lightning makes the iterator before it tells the sampler the epoch, and workers read ahead at once: after a resume
    they would load the batches of epoch 0. Lightning saves ``state_dict`` in its checkpoints.
    """

    _batches = 0  # handed out in this epoch
    _state: dict[str, int] | None = None  # from a checkpoint, until the next epoch starts

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        state, self._state, self._batches = self._state, None, 0
        sampler = self.sampler
        # A state of an epoch that was finished does not concern the epoch that starts now.
        if state and isinstance(sampler, ShuffleSampler) and state["epoch"] == sampler.epoch:
            self._batches = state["batches"]
            sampler.skip = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Tell the epoch and the number of batches handed out in it."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the given batch, if the next epoch is the one it belongs to."""
        self._state = dict(state)
