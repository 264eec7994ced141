"""litdata's data set and loader, with our decoding, draws and epochs. To be imported where litdata is installed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.item_loader import Interval
from litdata.streaming.sampler import ChunkedIndex
from litdata.streaming.shuffle import NoShuffle
from PIL import Image

from lit_tricks._compat import allow_http_endpoints, overrides, share_among_workers, streaming_environment
from lit_tricks.data.io.worker_errors import guarded
from lit_tricks.data.loader import check_same_batches
from lit_tricks.data.samples import Samples, derive_seed
from lit_tricks.data.samples import collate as collate_samples
from lit_tricks.data.shards.checked import CheckedDataset
from lit_tricks.data.shards.index import Shards
from lit_tricks.utils.blame import is_about_input

__all__ = ["ShardSamples", "StreamLoader", "collate"]

allow_http_endpoints()
Decode = Callable[[bytes, str], Image.Image]


class ShardSamples(CheckedDataset):
    """Samples of shards, to be made into batches by ``collate``, with random draws tied to (seed, epoch, index).

    Args:
        shards: the shards of one split.
        samples: the transforms of the images.
        shuffle: whether to shuffle in each epoch and drop the samples that do not fill a batch in each process;
            otherwise all samples in their order, each in one process.
        num_replicas: number of processes.
        rank: rank of this process.
        decode: function that makes an image from the bytes of a file, and from its name for messages.
    """

    posix_fast: Any  # of litdata
    current_epoch: int

    def __init__(
        self, shards: Shards, samples: Samples, shuffle: bool, num_replicas: int, rank: int, decode: Decode
    ) -> None:
        # Shuffled in the whole shard, not in blocks of it. Of the seed NumPy takes 32 bits.
        order = derive_seed(samples.seed) % 2**32
        whole = {"item_shuffle_window": 0, "batch_decode": 0}  # and samples read one by one
        super().__init__(shards.url, shards.index, shards.cache_dir, shuffle=shuffle, seed=order, **whole)
        self.set_drop_last(shuffle)
        self.distributed_env: Any = streaming_environment(num_replicas, rank)
        if self.posix_fast is not None:  # one order on every file system
            self.posix_fast = dataclasses.replace(self.posix_fast, kind="posix")
        self.shards = shards
        self.samples = samples
        self.decode = decode
        self.transform = samples.transform  # may be replaced at any time before the workers start

    def __getitem__(self, index: ChunkedIndex) -> Any:
        try:
            data, label, name = self.cache[index]
            sample = self.shards.sample(data, label, name)
        except Exception as error:  # litdata fails with any type on damaged files
            if not is_about_input(error) and not isinstance(error, ValueError):  # an unknown label
                raise
            place = self.shards.place(index.index)
            raise RuntimeError(
                f"cannot read {place} ({error}): write the shards again, or copy this one anew"
            ) from error
        return _Sample(self, int(index.index), *sample)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardSamples:
        twin = copy.copy(self)
        twin.cache = twin.shuffler = None  # open files and threads, made anew when they are needed
        return twin

    def batch(self, items: list[_Sample]) -> Any:
        """Transform samples and make a batch of them."""
        self.samples.source, self.samples.transform = _Batch(items, self.shards, self.decode), self.transform
        first = (self.current_epoch - 1) * len(self.shards)
        return collate_samples(self.samples.__getitems__([first + item.number for item in items]))

    @overrides(StreamingDataset)
    def _create_shuffler(self, cache: Any) -> Any:
        shuffler = super()._create_shuffler(cache)
        return shuffler if self.shuffle else EqualShares(cache, self.seed, drop_last=False)


class _Sample(NamedTuple):
    samples: ShardSamples | None  # of the process that makes the batch, with the transform that it has there
    number: int
    data: bytes
    label: int
    name: str


class _Batch:
    """The samples of a batch by their numbers in the whole, and any other."""

    def __init__(self, items: list[_Sample], shards: Shards, decode: Decode) -> None:
        self.items = {item.number: item for item in items}
        self.shards, self.decode = shards, decode

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        item = self.items.get(number)
        if item is None:  # instead of a bad image
            item = _Sample(None, number, *self.shards.item(number))
        name = f"{item.name}: {self.shards.place(number)}"
        return self.decode(item.data, name), item.label


def collate(items: list[_Sample]) -> Any:
    """Make a batch, in the process that has read the samples."""
    samples = items[0].samples
    assert samples is not None
    return samples.batch(items)


class EqualShares(NoShuffle):  # type: ignore[misc]
    """All samples in their order, one stretch for each process, which differ by one sample at most.

    litdata gives the last process all that do not fill a batch in each; it would then have more batches than others,
    which wait for it in vain.
    """

    def get_chunks_and_intervals_per_workers(self, env: Any, num_workers: int, batch_size: int, epoch: int) -> Any:
        """Return the share out the shards; see litdata."""
        intervals = self.cache.get_chunk_intervals()
        ends = np.cumsum([stop - start for _, start, stop, _ in intervals])
        found: tuple[list[Any], list[Any]] = ([], [])
        for rank in range(env.world_size):
            first, last = (int(ends[-1]) * edge // env.world_size for edge in (rank, rank + 1))
            mine = [
                (number, Interval(begin, max(start, stop - end + first), min(stop, stop - end + last), finish))
                for number, ((begin, start, stop, finish), end) in enumerate(zip(intervals, ends, strict=True))
                if first < end and last > end - (stop - start)
            ]
            numbers, parts = zip(*mine, strict=True)
            shares = share_among_workers(numbers, parts, num_workers, batch_size)
            for whole, share in zip(found, shares, strict=True):
                whole.extend(share)
        return found


class StreamLoader(StreamingDataLoader):  # type: ignore[misc]
    """litdata's loader with the Trainer's epochs. Lightning saves its state in checkpoints.

    Args:
        dataset: data set to load.
        epoch: function that returns the epoch that begins, from 0; None counts the passes.
        kwargs: arguments of the loader.
    """

    current_epoch: int  # of litdata, from 1

    def __init__(self, dataset: ShardSamples, epoch: Callable[[], int] | None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.epoch = epoch
        self.is_foreign: bool = False  # the state that was loaded is of other shards
        self.begun_with: tuple[Any, Any] = 1, 1  # processes and batch size of that state

    def __iter__(self) -> Iterator[Any]:
        """Load an epoch, or what is left of it.

        Raises:
            ValueError: if the shards are not those that the epoch was begun with, or the batches are others.
        """
        if self.epoch is not None:
            # litdata counts passes from 1. The state of an epoch that ended early does not concern the next one.
            epoch = self.epoch()
            self.restore &= self.current_epoch == epoch + 1
            if not self.restore:
                self.current_epoch = epoch
        if self.restore and self.is_foreign:
            raise ValueError(
                f"the shards in {self.dataset.shards.url} are not those that the checkpoint was trained on, so that it "
                "cannot resume in the middle of an epoch: use the same shards, or a checkpoint from the end of an epoch"
            )
        if self.restore:
            check_same_batches(self.begun_with, (self.dataset.distributed_env.world_size, self.batch_size))
        yield from guarded(self, super().__iter__)

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue after the batches that were returned. The shards may be in another place now."""
        state, dataset = dict(obj["dataset"]), self.dataset
        shards = [state["subsampled_files"], [list(part) for part in state["region_of_interest"]]]
        self.is_foreign = shards != [
            dataset.subsampled_files,
            [list(part) for part in dataset.region_of_interest],
        ]
        self.begun_with = state["world_size"], state["batch_size"]
        state.update(input_dir_path=dataset.input_dir.path, input_dir_url=dataset.input_dir.url)
        state.update(cache_dir_path=dataset.cache_dir.path)
        super().load_state_dict(obj | {"dataset": state})
