"""Read the index of litdata's shards, in a folder or a bucket, with clear errors if it is missing."""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from lit_tricks.data.io.jpeg import decode_image
from lit_tricks.data.shards.index_format import INDEX, MOST_BYTES, SCHEMES, check_index
from lit_tricks.utils.files import read_regular
from lit_tricks.utils.transient import Transient

if TYPE_CHECKING:
    from lit_tricks.data.datamodule import Split

__all__ = ["SPLITS", "Shards", "import_litdata", "read_shards"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
WRITE = "`lit-tricks data shard FOLDER ROOT` writes them"


def import_litdata() -> Any:
    """Import litdata, which is optional.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    try:
        import litdata
    except ModuleNotFoundError as error:
        if error.name != "litdata":
            raise
        raise ModuleNotFoundError(
            'shards need litdata, which is not installed: pip install "lit-tricks[streaming]"', name="litdata"
        ) from error
    return litdata


class Shards(Transient):
    """The shards of a split: number of samples, classes, and single samples.

    Args:
        split: name of the split.
        url: location of the shards.
        index: content of the index, checked.
        cache_dir: folder for shards that litdata reads from a bucket; None is litdata's default.
    """

    transient: ClassVar[dict[str, Any]] = {"_dataset": None}

    def __init__(self, split: Split, url: str, index: dict[str, Any], cache_dir: str | None) -> None:
        self.split = split
        self.url = url
        self.cache_dir = cache_dir
        self.index = index
        self.classes: list[str] = list(index["classes"])
        self.order: list[int] | None = None  # new label of each label
        self.files: list[Any] = [shard["filename"] for shard in index["chunks"]]
        self.ends: list[int] = list(accumulate(shard["chunk_size"] for shard in index["chunks"]))
        self._dataset: Any = None

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        data, label, _ = self.item(index)
        return decode_image(data, self.paths[index], exact=True), label

    def item(self, index: int) -> tuple[bytes, int, str]:
        """Read a single sample, also one that is not in turn: slow from a bucket."""
        if self._dataset is None:
            import_litdata()
            from lit_tricks.data.shards.checked import CheckedDataset

            self._dataset = CheckedDataset(self.url, self.index, self.cache_dir, batch_decode=0)
        return self.sample(*self._dataset[index])

    def sample(self, data: Any, label: int, name: str) -> tuple[bytes, int, str]:
        """Return a sample as it was read, with the label in the order of the classes.

        Raises:
            ValueError: if there is no class of this label.
        """
        if not 0 <= label < len(self.classes):
            raise ValueError(f"the label {label} is not one of the {len(self.classes)} classes")
        return bytes(data), label if self.order is None else self.order[label], name

    def place(self, index: int) -> str:
        """Return the location of a sample, for messages."""
        return f"sample {index} in {self.files[bisect_right(self.ends, index)]} of {self.url}"

    @property
    def paths(self) -> _Names:
        """Return the names of the samples in messages: the original file, and the location in the shards."""
        return _Names(self)


class _Names:
    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __getitem__(self, index: int) -> str:
        return f"{self.shards.item(index)[2]}: {self.shards.place(index)}"


def read_shards(root: str, split: Split, cache_dir: str | None = None) -> Shards:
    """Read the index of ``root/split``.

    Raises:
        ModuleNotFoundError: if a package for that kind of bucket is missing.
        FileNotFoundError: if there is no index.
        RuntimeError: if a shard in a folder is missing or cut off.
        PermissionError: if a bucket rejects the credentials.
        ConnectionError: if a bucket cannot be reached.
        ValueError: if the index was not written by ``lit-tricks data shard``.
    """
    remote = root.startswith(SCHEMES)
    url = f"{root.rstrip('/')}/{split}" if remote else os.path.join(root, split)
    try:
        index = json.loads(_remote_index(url) if remote else read_regular(os.path.join(url, INDEX), MOST_BYTES))
        check_index(index)
        shards = Shards(split, url, index, cache_dir)
    except FileNotFoundError as error:
        hint = "these are folders of images: use ImageFolder, or write shards of them" if _has_folders(url) else WRITE
        raise FileNotFoundError(f"no index of shards ({INDEX}) in {url!r}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}/{INDEX} is not an index of shards that can be read ({error}); {WRITE}") from error
    if not remote:
        _check_whole(url, index["chunks"])
    return shards


def _has_folders(folder: str) -> bool:
    return any(path.is_dir() for path in Path(folder).glob("*"))


def _check_whole(folder: str, shards: list[dict[str, Any]]) -> None:
    """Raise if a shard is too short, since litdata would wait for the rest."""
    for shard in shards:
        path = os.path.join(folder, shard["filename"])
        size = os.path.getsize(path) if os.path.isfile(path) else None
        if size != shard["chunk_bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {shard['chunk_bytes']}"
            raise RuntimeError(f"the shard {path!r} {found}: copy it anew, or write the shards again")


def _remote_index(url: str) -> bytes:
    """Load the index from a bucket, with the clients that litdata uses but without its 1000 attempts."""
    from litdata.streaming.downloader import get_downloader

    options: dict[str, Any] = {}
    if url.startswith("s3://"):
        from botocore.config import Config

        options["config"] = Config(connect_timeout=10, read_timeout=30, retries={"total_max_attempts": 3})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, INDEX)
        try:
            get_downloader(url, folder, [], options, {}).download_file(f"{url}/{INDEX}", str(path))
            return read_regular(path, MOST_BYTES)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{url} needs a package: pip install google-cloud-storage") from error
        except Exception as error:
            _explain(error, url)
            raise


def _explain(error: Exception, url: str) -> None:
    """Raise the built-in exception that corresponds to an error of a client of S3 or GCS."""
    response = getattr(error, "response", None)  # of botocore
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = status or getattr(error, "code", None)  # of google.api_core
    name = type(error).__name__
    if status == 404:
        raise FileNotFoundError(f"{url}/{INDEX}: {error}") from error
    if status in (400, 401, 403) or "Credentials" in name or name == "ProfileNotFound":
        raise PermissionError(
            f"{url} may not be read ({error}): check the bucket's name and the credentials, of S3 those that boto3 "
            "finds (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...), and of GCS by `gcloud auth application-default login`"
        ) from error
    if any(word in name for word in ("Connect", "Timeout", "Endpoint", "Retry")):
        raise ConnectionError(f"{url} cannot be reached ({error}): check AWS_ENDPOINT_URL and the network") from error
