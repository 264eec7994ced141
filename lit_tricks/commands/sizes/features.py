"""Store the features of the classifier per image in a file, so that an interrupted pass can continue.

One caveat: files are identified by path, size and time, and data without files by a few samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_tricks.utils.dataset_transforms import nested
from lit_tricks.utils.files import abandoned, read_regular, write_whole

__all__ = ["FeatureFile", "digest_of_data", "digest_of_weights", "input_of"]

SEEN = 16  # samples by which data is known


class FeatureFile:
    """Features and labels of all samples, written in their order, mapped into memory.

    Args:
        folder: for ``features.bin``, ``labels.bin`` and ``state.json``. What is there of another key is removed.
        key: of all that the features depend on.
        samples: number of them.

    Attributes:
        done: samples that are there.
    """

    def __init__(self, folder: Path, key: str, samples: int) -> None:
        self.folder = folder
        self.samples = samples
        self.done: int = 0
        self.state: dict[str, Any] = {"key": key, "samples": samples}
        self.maps: tuple[Tensor, Tensor] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            state = json.loads(read_regular(folder / "state.json"))
        except (OSError, ValueError):
            state = {}
        if state.get("key") == key and state.get("samples") == samples:
            self.state, self.done = state, state.get("done", 0)
            if self.done:
                self._map()
        else:
            self.remove()
            folder.mkdir(parents=True)

    def remember(self, **values: Any) -> None:
        """Store values with the features. ``state`` returns them after an interruption."""
        self.state.update(values)
        write_whole(self.folder / "state.json", json.dumps(self.state), durable=False)

    def append(self, features: Tensor, labels: Tensor) -> None:
        """Add the features and labels of the next samples: (N, features) and (N)."""
        if self.maps is None:
            self.state |= {"dim": features.shape[1], "dtype": str(features.dtype).removeprefix("torch.")}
            self._map()
        assert self.maps is not None
        here = slice(self.done, self.done + len(labels))
        self.maps[0][here] = features.cpu()
        self.maps[1][here] = labels.cpu()
        self.done += len(labels)
        self.remember(done=self.done)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return all features and labels."""
        assert self.maps is not None
        return self.maps

    def remove(self) -> None:
        """Delete the files."""
        self.maps = None
        for path in abandoned(self.folder / "state.json"):
            path.unlink(missing_ok=True)
        for name in ("features.bin", "labels.bin", "state.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def _map(self) -> None:
        def mapped(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
            count = torch.Size(shape).numel()
            return torch.from_file(str(self.folder / name), shared=True, size=count, dtype=dtype).view(shape)

        kind: torch.dtype = getattr(torch, self.state["dtype"])
        self.maps = (
            mapped("features.bin", [self.samples, self.state["dim"]], kind),
            mapped("labels.bin", [self.samples], torch.int64),
        )


@contextmanager
def input_of(layer: nn.Module) -> Any:
    """Collect what a layer is called with: the list has the last one."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[:] = [args[0].detach()]

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def digest_of_weights(module: nn.Module) -> str:
    """Return a fingerprint of the names and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def digest_of_data(dataset: Any, samples: Callable[[list[int]], Iterable[Any]]) -> str:
    """Return a fingerprint of the files of a data set (path, size, time, label), and of a few loaded samples.

    Args:
        dataset: data set with files in ``samples`` or ``paths``, or in an inner data set.
        samples: returns (image, label) tensors for a few indices.
    """
    digest = hashlib.sha256(f"{len(dataset)}".encode())
    inner = [part for whole in nested(dataset) for part in (whole, getattr(whole, "source", None))]
    for part in inner:
        for entry in getattr(part, "samples", None) or getattr(part, "paths", None) or ():
            path = entry[0] if isinstance(entry, list | tuple) else entry
            if isinstance(path, str | os.PathLike):
                found = os.stat(path)
                digest.update(f"{entry} {found.st_size} {found.st_mtime_ns}".encode())
    count = min(SEEN, len(dataset))
    for images, labels in samples([i * len(dataset) // count for i in range(count)]):
        for tensor in (images, labels):
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)
