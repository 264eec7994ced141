"""Images of files that are decoded once, at a short side, and kept in memory or in one file of the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from lightning_utilities.core.rank_zero import rank_zero_info
from PIL import Image

from lit_tricks.data.io.file_index import cache_folder
from lit_tricks.data.io.jpeg import BadImageError, Box, Pixels, pixels_of
from lit_tricks.data.samples import Files
from lit_tricks.utils.files import locked, open_regular
from lit_tricks.utils.transient import Transient

__all__ = ["Cache", "DecodedFiles"]

Cache = Literal["memory", "disk"]

VERSION = 1  # of the files in the cache
BLOCK = 256  # images that are decoded ahead
Shapes = npt.NDArray[np.int64]  # height and width of each image; the height is below 0 where its pixels cannot be read


class Decoded(Image.Image):
    """An RGB image that is decoded already, with the interface of a PIL image."""

    def __init__(self, values: Pixels) -> None:
        super().__init__()
        self._mode, self._size = "RGB", (values.shape[1], values.shape[0])
        self._values = values
        self._loaded = False

    def __reduce__(self) -> Any:
        return Decoded, (np.array(self._values),)

    def pixels(self, box: Box | None = None) -> Pixels:
        """Give the RGB values (see ``pixels_of``)."""
        return self._values[: box and box[0] + box[2]]

    def load(self) -> Any:
        """Fill the image, for PIL."""
        if not self._loaded:
            self.im, self._loaded = Image.fromarray(self._values).im, True
        return super().load()


class Store:
    """The pixels of all images, one after another.

    Args:
        shapes: of the images, shape (N, 2).
        pixels: uint8, of the length that the shapes need.
    """

    def __init__(self, shapes: Shapes, pixels: Pixels) -> None:
        self.shapes = shapes
        self.pixels = pixels
        self.ends: npt.NDArray[np.int64] = np.cumsum(_sizes(shapes))


class DecodedFiles(Transient, Files):
    """Images that were decoded once, and resized to a short side if the short side was longer.

    Copies share the pixels. A pickle has no pixels: another process decodes the files again, or opens the cache file.

    Args:
        files: the files; a file that cannot be read raises its error when the image is requested.
        short_side: in pixels, at least 1.
        cache: "memory", or "disk" for a file in the cache folder of the user, which all processes share.
        owner: name of the data module, for messages.

    Raises:
        ValueError: if the pixels do not fit.
        OSError: if the file cannot be written.
    """

    transient: ClassVar[dict[str, Any]] = {"_store": None}

    def __init__(self, files: Files, short_side: int, cache: Cache, owner: str) -> None:
        super().__init__(files.paths, files.read, files.labels)
        self.short_side = short_side
        self.cache = cache
        self.owner = owner
        self._store: Store | None = None
        self._open()

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        store = self._store or self._open()
        height, width = store.shapes[index].tolist()
        if height <= 0:
            return super().__getitem__(index)  # and its error
        end = int(store.ends[index])
        pixels = store.pixels[end - 3 * height * width : end].reshape(height, width, 3)
        return Decoded(pixels), self.paths[index] if self.labels is None else int(self.labels[index])

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodedFiles:
        return self

    def _open(self) -> Store:
        key = self._key()
        self._store = _stores.get(key)
        if self._store is None:
            self._store = _stores[key] = self._in_memory() if self.cache == "memory" else self._on_disk(key)
        return self._store

    def _key(self) -> str:
        """Name the content: the files by path, size and time, and what is made of them."""
        options = sorted(getattr(self.read, "keywords", {}).items())
        digest = hashlib.sha256(f"{VERSION} {self.cache} {self.short_side} {options}".encode())
        for path in self.paths:
            with contextlib.suppress(OSError):
                found = os.stat(path)
                digest.update(
                    f"{os.path.abspath(path)}\0{found.st_size} {found.st_mtime_ns}\0".encode("utf-8", "replace")
                )
        return digest.hexdigest()[:32]

    def _in_memory(self) -> Store:
        shapes = self._shapes()
        size = self._check_room(shapes, _free_memory(), 'use cache="disk", ')
        pixels, at = np.empty(size, np.uint8), 0
        for part in self._decoded(shapes):
            pixels[at : at + part.size] = part.ravel()
            at += part.size
        return Store(shapes, pixels)

    def _on_disk(self, key: str) -> Store:
        folder = cache_folder()
        if folder is None:
            raise ValueError(f'{self.owner}(cache="disk"): LIT_TRICKS_CACHE is empty. Name a folder in it.')
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{key}.pixels"
        count = len(self.paths)
        with locked(folder / f"{key}.lock"):
            if not _is_whole(target, count):
                self._write(target)
        shapes = np.fromfile(target, np.int64, 2 * count).reshape(count, 2)
        size = int(_sizes(shapes).sum())
        # Copy on write: nothing writes, and torch warns of arrays that cannot be written.
        pixels = np.memmap(target, np.uint8, "c", shapes.nbytes, size) if size else np.empty(0, np.uint8)
        return Store(shapes, pixels)

    def _write(self, target: Path) -> None:
        shapes = self._shapes()
        self._check_room(
            shapes, shutil.disk_usage(target.parent).free, "name a folder with more room in LIT_TRICKS_CACHE, "
        )
        part = target.with_suffix(".part")  # of one process at a time; what a killed one left is overwritten
        try:
            with part.open("wb") as file:
                file.write(shapes.tobytes())
                for pixels in self._decoded(shapes):
                    file.write(pixels.tobytes())
                file.seek(0)
                file.write(shapes.tobytes())  # by now it is known which images are broken
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _check_room(self, shapes: Shapes, free: int | None, remedy: str) -> int:
        size = int(_sizes(shapes).sum())
        if free is not None and size > free:
            raise ValueError(
                f'{self.owner}(cache="{self.cache}"): {len(shapes)} decoded images take {size} bytes, and {free} are '
                f"free. {remedy[:1].upper()}{remedy[1:]}a smaller resize_size, or cache=None."
            )
        rank_zero_info(
            f'{self.owner}(cache="{self.cache}"): decoding {len(shapes)} images once, into {size / 1e6:.0f} MB'
        )
        return size

    def _shapes(self) -> Shapes:
        with self._pool() as pool:
            return np.array(list(pool.map(self._shape, range(len(self.paths)))), np.int64).reshape(-1, 2)

    def _shape(self, index: int) -> tuple[int, int]:
        try:
            width, height = self.read(self.paths[index]).size
        except BadImageError:
            return 0, 0
        short = min(width, height)
        if short > self.short_side:
            width, height = (max(1, round(side * self.short_side / short)) for side in (width, height))
        return height, width

    def _decoded(self, shapes: Shapes) -> Iterator[Pixels]:
        """Decode all images, a few ahead; one that cannot be read is black, and gets a height below 0."""
        with self._pool() as pool:
            for start in range(0, len(shapes), BLOCK):
                block = shapes[start : start + BLOCK]
                yield from pool.map(self._pixels, range(start, start + len(block)), block)

    def _pixels(self, index: int, shape: npt.NDArray[np.int64]) -> Pixels:
        height, width = shape.tolist()
        try:
            pixels = pixels_of(self.read(self.paths[index]))
        except BadImageError:
            shape[0] = -height  # a view of all shapes
            return np.zeros((height, width, 3), np.uint8)
        if pixels.shape[:2] == (height, width):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


_stores: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()


def _sizes(shapes: Shapes) -> Shapes:
    """Bytes of each image."""
    sizes: Shapes = np.abs(shapes).prod(1) * 3
    return sizes


def _is_whole(target: Path, count: int) -> bool:
    """Return whether a file holds the shapes of so many images and their pixels."""
    try:
        with open_regular(target) as file:
            shapes = np.frombuffer(file.read(16 * count), np.int64)
            return (
                len(shapes) == 2 * count and target.stat().st_size == 16 * count + _sizes(shapes.reshape(-1, 2)).sum()
            )
    except (OSError, ValueError):  # there is none, or the file is damaged
        return False


def _free_memory() -> int | None:
    """Return the memory that processes can still get; None where it is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None
