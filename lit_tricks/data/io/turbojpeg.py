"""Decode a region of a JPEG file by the TurboJPEG API of libjpeg-turbo 3, if the machine has it.

simplejpeg decodes all columns from the top down. This module skips the columns to the sides of a crop and the rows
above it, and the pixels of the crop are bitwise equal. The library is the system's, conda's, or part of the package
``turbojpeg`` (the extra of this name).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from functools import cache
from importlib import metadata

import numpy as np
import numpy.typing as npt

__all__ = ["decode_region"]

NAMES = ("libturbojpeg.so.0", "libturbojpeg.0.dylib", "turbojpeg.dll")
DECOMPRESS, RGB = 1, 0  # of turbojpeg.h: TJINIT_DECOMPRESS, TJPF_RGB


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


@cache
def _library() -> ctypes.CDLL | None:
    """Load TurboJPEG 3; None where there is no such library."""
    for path in _paths():
        with contextlib.suppress(OSError, AttributeError):  # it is not there; it is of version 2
            library = ctypes.CDLL(path)
            pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
            library.tj3Init.restype = pointer
            library.tj3Destroy.argtypes = [pointer]
            library.tj3GetErrorStr.argtypes, library.tj3GetErrorStr.restype = [pointer], ctypes.c_char_p
            library.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, size]
            library.tj3SetCroppingRegion.argtypes = [pointer, _Region]
            library.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, size, pointer, number, number]
            return library
    return None


def _paths() -> Iterator[str]:
    yield from NAMES
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("turbojpeg") or ():
            if file.parent.name.endswith("libs") and "turbojpeg" in file.name:
                yield str(file.locate())


class _Decoder:
    """A handle of TurboJPEG, for one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.handle = library.tj3Init(DECOMPRESS)

    def __del__(self) -> None:
        self.library.tj3Destroy(self.handle)


class _Decoders(threading.local):
    def __init__(self) -> None:
        library = _library()
        self.own = library and _Decoder(library)


def decode_region(data: bytes, pixels: npt.NDArray[np.uint8], top: int, left: int, height: int, width: int) -> bool:
    """Decode a region of a JPEG file into its place in the image. Other pixels of these rows are undefined.

    Args:
        data: bytes of the file.
        pixels: pixels of the whole image, shape (rows, columns, 3), contiguous, changed in place.
        top: first row of the region.
        left: first column, a multiple of the width of the blocks that are coded together.
        height: in rows.
        width: in columns.

    Returns:
        True, or False without a library that can decode this file.

    Raises:
        ValueError: with the first error of libjpeg, as in simplejpeg; decoded rows are in ``pixels``.
    """
    decoder = _decoders.own
    if not decoder:
        return False
    library, handle = decoder.library, decoder.handle
    if library.tj3DecompressHeader(handle, data, len(data)):
        return False
    if library.tj3SetCroppingRegion(handle, _Region(left, top, width, height)):
        return False
    row = pixels.strides[0]
    start = pixels.ctypes.data + top * row + 3 * left
    if library.tj3Decompress8(handle, data, len(data), start, row, RGB):
        raise ValueError(library.tj3GetErrorStr(handle).decode(errors="replace"))
    return True


_decoders = _Decoders()
