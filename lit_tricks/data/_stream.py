"""litdata's data set and loader, with our decoding, draws and epochs. To be imported where litdata is installed."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import downloader
from litdata.streaming.sampler import ChunkedIndex
from litdata.utilities.env import _DistributedEnv
from torch import Tensor

from lit_tricks.data._samples import derive_seed, load_image, seeded
from lit_tricks.data.transforms import Transform

__all__ = ["ShardSamples", "StreamLoader"]

# Endpoints of S3 without TLS, such as a MinIO in the next room: boto3 takes them, obstore asks to be told.
getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = "true"


class ShardSamples(StreamingDataset):  # type: ignore[misc]
    """Transformed samples of shards; random transforms give the same for the same (seed, epoch, index).

    Args:
        url: folder or bucket with the shards of one split.
        transform: image to tensor. May be replaced at any time before the workers start.
        seed: of the order and of the random transforms.
        shuffle: anew in each epoch, and leave out the samples that do not fill a batch in each process; otherwise all
            samples in their order, each in one process.
        num_replicas: number of processes.
        rank: of this process.
        cache_dir: where shards of a bucket are kept; None is litdata's own place.
    """

    posix_fast: Any  # of litdata
    current_epoch: int

    def __init__(
        self,
        url: str,
        transform: Transform,
        seed: int,
        shuffle: bool,
        num_replicas: int,
        rank: int,
        cache_dir: str | None,
    ) -> None:
        # Shuffled in the whole shard, not in blocks of it. Of the seed NumPy takes 32 bits.
        order = derive_seed(seed) % 2**32
        super().__init__(url, cache_dir=cache_dir, shuffle=shuffle, seed=order, item_shuffle_window=0)
        self.set_drop_last(shuffle)
        # As one node: with more, litdata keeps each node to its part of the shards from the second epoch on.
        self.distributed_env = _DistributedEnv(num_replicas, rank, 1)
        if self.posix_fast is not None:  # one order on every file system
            self.posix_fast = dataclasses.replace(self.posix_fast, kind="posix")
        self.transform = transform
        self.draws = seed

    def __getitem__(self, index: ChunkedIndex) -> tuple[Tensor, int]:
        name = ""
        try:
            item = self.cache[index]
            name = item["name"]
            image = load_image(io.BytesIO(item["image"]))
        except Exception as error:  # damage shows in many ways
            shard = self.subsampled_files[index.chunk_index]
            raise RuntimeError(
                f"cannot read sample {index.index} in {shard} of {self.input_dir.url or self.input_dir.path} "
                f"({name or 'no file name'}: {error}): write the shards again, or copy this one anew"
            ) from error
        with seeded(self.draws, self.current_epoch - 1, index.index):
            return self.transform(image), item["label"]

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardSamples:
        twin = copy.copy(self)
        twin.cache = twin.shuffler = None  # open files and threads, made anew when they are needed
        return twin


class StreamLoader(StreamingDataLoader):  # type: ignore[misc]
    """litdata's loader, whose epochs are those of the Trainer; Lightning saves its state in checkpoints.

    Args:
        dataset: what to load.
        epoch: tells the epoch that begins, from 0; None counts the passes.
        kwargs: of the loader.
    """

    current_epoch: int  # of litdata, from 1

    def __init__(self, dataset: ShardSamples, epoch: Callable[[], int] | None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if self.epoch is not None:
            # litdata counts passes from 1. The state of an epoch that ended early does not concern the next one.
            epoch = self.epoch()
            self.restore &= self.current_epoch == epoch + 1
            if not self.restore:
                self.current_epoch = epoch
        yield from super().__iter__()

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on after the batches that were handed out.

        Raises:
            ValueError: if the shards are not those of the checkpoint.
        """
        state, dataset = dict(obj["dataset"]), self.dataset
        shards = [state["subsampled_files"], [list(part) for part in state["region_of_interest"]]]
        if shards != [dataset.subsampled_files, [list(part) for part in dataset.region_of_interest]]:
            where = dataset.input_dir.url or dataset.input_dir.path
            raise ValueError(
                f"the shards in {where} are not those that the checkpoint was trained on, so that their epoch can not "
                "go on: use those shards, or start from the weights alone"
            )
        # Where they lie does not matter; litdata would refuse them in another place.
        state.update(input_dir_path=dataset.input_dir.path, input_dir_url=dataset.input_dir.url)
        state.update(cache_dir_path=dataset.cache_dir.path)
        super().load_state_dict(obj | {"dataset": state})
