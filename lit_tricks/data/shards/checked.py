"""litdata's data set of shards whose index was checked. To be imported where litdata is installed."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from litdata import StreamingDataset
from litdata.streaming.resolver import Dir
from litdata.utilities.dataset_utilities import get_default_cache_dir

from lit_tricks._compat import clear_outdated_shards, overrides
from lit_tricks.data.shards.index_format import INDEX, MOST_BYTES, SCHEMES, check_index
from lit_tricks.utils.files import locked, read_regular, write_whole

__all__ = ["CheckedDataset"]


class CheckedDataset(StreamingDataset):  # type: ignore[misc]
    """A data set of litdata that reads no index but a checked one.

    The index of a bucket is loaded once, before. litdata would load it again, and might get another one: so the checked
    one is put where litdata keeps what it has loaded. Each process checks the file before it reads it.

    Args:
        url: where the shards are.
        index: of the shards, checked.
        cache_dir: where litdata keeps what it reads from a bucket; None is its own place.
        settings: of litdata's data set.
    """

    def __init__(self, url: str, index: dict[str, Any], cache_dir: str | None, **settings: Any) -> None:
        if not url.startswith(SCHEMES):
            super().__init__(url, cache_dir=cache_dir, **settings)
            return
        folder = cache_dir or get_default_cache_dir()
        os.makedirs(folder, exist_ok=True)
        # one process of a machine at a time: a cache that another one is just about to fill looks outdated
        with locked(os.path.join(folder, "lit_tricks.lock")):
            super().__init__(_cached(url, index, folder), cache_dir=cache_dir, **settings)

    @overrides(StreamingDataset)
    def _create_cache(self, worker_env: Any) -> Any:
        check_index(json.loads(read_regular(os.path.join(self.input_dir.path, INDEX), MOST_BYTES)))
        return super()._create_cache(worker_env)


def _cached(url: str, index: dict[str, Any], cache_dir: str) -> Dir:
    """Put the checked index into the cache; the folder is the one that litdata would choose."""
    stamp = index.get("updated_at", "0")
    stamp = _digest(url) if stamp == "0" else stamp
    folder = os.path.join(cache_dir, _digest(url))
    clear_outdated_shards(folder, stamp)
    path = os.path.join(folder, stamp)
    os.makedirs(path, exist_ok=True)
    write_whole(os.path.join(path, INDEX), json.dumps(index, sort_keys=True))
    return Dir(path=path, url=url)


def _digest(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
