"""Facts about image files, read by several processes: size, content, and what is odd about the format."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset

from lit_tricks.data.io.file_index import Paths
from lit_tricks.data.io.formats import prepare_reader
from lit_tricks.data.io.jpeg import BadImageError, decode_image, pixels_of
from lit_tricks.utils.files import read_regular

__all__ = ["ODDITIES", "Facts", "ImageFacts", "facts_of", "read_facts"]

BLOCK = 16  # files that a process reads at a time
FILES_PER_WORKER = 32  # fewer are read before a process has started
SMALL = 8  # pixels of a short side that is too short to show anything

# What is odd about an image, and what follows from it. The bits of ``Facts.oddities`` are in this order.
ODDITIES = {
    "wrong ending": "the format is another one than the ending of the name. They are read by content.",
    "CMYK": "the colors are for print, and become RGB without a color profile. Convert them to compare colors.",
    "16 bit": "16 bits become 8, so that dark images may lose all detail.",
    "tiny": f"the short side has fewer than {SMALL} pixels.",
    "animated": "only the first frame is read.",
    "EXIF orientation": "the photos are turned if you give --data.exif true.",
    "transparent": "transparency is dropped, and what it hid becomes visible.",
}


class ImageFacts(NamedTuple):
    """Facts about one file.

    Args:
        content: hash of the bytes.
        pixels: hash of the size and the RGB values.
        width: in pixels; 0 for a file that cannot be read.
        height: in pixels.
        oddities: bits in the order of ``ODDITIES``.
        reason: why the file cannot be read; empty if it can.
    """

    content: int
    pixels: int
    width: int = 0
    height: int = 0
    oddities: int = 0
    reason: str = ""


@dataclass
class Facts:
    """Facts about all files, an item each.

    Args:
        content: hashes of the bytes, int64.
        pixels: hashes of the pixels, int64.
        widths: in pixels, int32; 0 for files that cannot be read.
        heights: in pixels, int32.
        oddities: bits in the order of ``ODDITIES``, uint8.
        reasons: for files that cannot be read, by their index.
    """

    content: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    oddities: npt.NDArray[np.uint8]
    reasons: dict[int, str]

    def odd(self, name: str) -> npt.NDArray[np.int64]:
        """Return the indices of the files with an oddity."""
        bit = 1 << [*ODDITIES].index(name)
        return np.flatnonzero(self.oddities & bit)


def facts_of(path: str) -> ImageFacts:
    """Read an image file as training does, and return the facts about it."""
    try:
        data = read_regular(path)
    except OSError as error:
        return ImageFacts(0, 0, reason=error.strerror or str(error))
    content = _hash(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF and of large images
            odd = _oddities(data, path)
            pixels = pixels_of(decode_image(data, path, exact=True))
    except BadImageError as error:
        return ImageFacts(content, 0, reason=str(error.__cause__ or error).partition("\n")[0])
    height, width = pixels.shape[:2]
    odd |= {"tiny"} if min(width, height) < SMALL else set()
    bits = sum(1 << bit for bit, name in enumerate(ODDITIES) if name in odd)
    key = _hash(f"{width} {height} ".encode(), np.ascontiguousarray(pixels).data)
    return ImageFacts(content, key, width, height, bits)


def _oddities(data: bytes, path: str) -> set[str]:
    """Return what is odd about a format; nothing of a file that Pillow does not open."""
    found = set()
    try:
        prepare_reader(data)
        with Image.open(io.BytesIO(data)) as image:
            kind = "JPEG" if image.format == "MPO" else image.format  # phones put several images into a JPEG
            ending = os.path.splitext(path)[1].lower()
            expected = Image.registered_extensions().get(ending)
            is_deep = image.mode.startswith(("I", "F")) or (kind == "PNG" and data[24:25] == b"\x10")
            tests = {
                "wrong ending": bool(ending) and kind != expected,
                "CMYK": image.mode == "CMYK",
                "16 bit": is_deep,
                "animated": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
                "transparent": "A" in image.mode or "transparency" in image.info,
            }
            found = {name for name, is_so in tests.items() if is_so}
            if int(image.getexif().get(ExifTags.Base.Orientation, 1)) in range(2, 9):
                found.add("EXIF orientation")
    except Exception:  # damaged files, which decoding reports, and damaged EXIF of good ones
        pass
    return found


def _hash(*parts: Any) -> int:
    """Return 64 bits of content, never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "big", signed=True) or 1


class _Files(Dataset[ImageFacts]):
    def __init__(self, paths: Paths) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageFacts:
        return facts_of(self.paths[index])


def read_facts(paths: Paths, num_workers: int, advance: Callable[[float], None]) -> Facts:
    """Read all files. A process holds one image at a time, and the result takes 25 bytes a file.

    Args:
        paths: of the files.
        num_workers: processes that read; 0 reads in this one.
        advance: called with the number of files that were read.
    """
    count = len(paths)
    found = Facts(
        np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int32), np.zeros(count, np.int32),
        np.zeros(count, np.uint8), {},
    )  # fmt: skip
    workers = min(num_workers, count // FILES_PER_WORKER)
    at = 0
    for block in DataLoader(_Files(paths), batch_size=BLOCK, num_workers=workers, collate_fn=list):
        for facts in block:
            found.content[at], found.pixels[at], found.widths[at], found.heights[at], found.oddities[at] = facts[:5]
            if facts.reason:
                found.reasons[at] = facts.reason
            at += 1
        advance(len(block))
    return found
