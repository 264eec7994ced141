"""JPEG files as PIL images. libjpeg-turbo decodes only the part and the size that are requested."""

from __future__ import annotations

import io
import math
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from lit_tricks.data.io.formats import prepare_reader
from lit_tricks.data.io.turbojpeg import decode_region
from lit_tricks.data.transforms import to_rgb
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.files import read_regular

__all__ = ["JPEG", "BadImageError", "Box", "Pixels", "decode_image", "pixels_of", "read_image"]

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

# libjpeg's message at the end of an image whose height was lowered, and for a few intact files of ImageNet.
HARMLESS = "extraneous bytes before marker"
SOF0, SOF1, SOF2, SOS = 0xC0, 0xC1, 0xC2, 0xDA
END = b"\xff\xd9"
TURNS = {  # of the EXIF orientations; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(RuntimeError):
    """A file cannot be read as an image. The message names the file, and the cause has the reason."""


def read_image(path: str, exact: bool = False, exif: bool = False) -> Image.Image:
    """Read an image file: a JPEG that is decoded later, or an 8-bit RGB image.

    Args:
        path: the file.
        exact: see ``JPEG``.
        exif: rotate the image by its EXIF orientation. A JPEG that must be rotated is decoded at once and completely.

    Raises:
        BadImageError: if it cannot be read, now or when it is decoded; the message names the file.
    """
    try:
        data = read_regular(path)
    except OSError as error:
        if not is_about_input(error):  # such as too many open files: a skipped image would be lost without a word
            raise
        raise _unreadable(path, error) from error
    return decode_image(data, path, exact, exif)


def decode_image(data: bytes, name: str, exact: bool = False, exif: bool = False) -> Image.Image:
    """Make an image of the bytes of a file (see ``read_image``); ``name`` is for messages."""
    header = _header(data)
    if header is None:
        return _decode_any(data, name, exif)
    limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)  # as PIL has it
    if header.width * header.height > limit:
        bomb = Image.DecompressionBombError(
            f"{header.width} x {header.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS allows: {limit}"
        )
        raise _unreadable(name, bomb) from bomb
    image = JPEG(data, name, exact, header)
    method = TURNS.get(_orientation(data)) if exif else None
    return image if method is None else Image.fromarray(image.pixels()).transpose(method)


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG; 1, upright, where there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # EXIF of cameras is often broken, and the image may be whole
        if not is_about_input(error):
            raise
        return 1


def pixels_of(image: Image.Image, box: Box | None = None) -> Pixels:
    """Return the RGB values of an image, shape (rows, width, 3), rows from the top: of all, or of a box.

    With a box, the last row is the last row of the box, and pixels to the sides of the box or above it are undefined.
    """
    if isinstance(image, JPEG):
        return image.pixels(box)
    return np.array(to_rgb(image))[: box and box[0] + box[2]]


class JPEG(Image.Image):
    """An RGB image of a JPEG file with the interface of a PIL image, decoded when its pixels are requested.

    For a box, ``pixels`` decodes only the necessary part, bitwise equal to the same pixels of the whole image. Data
    above and to the sides of the box is read, but not converted to pixels (see ``decode_region``). Below the box only
    the end of the file is checked: a truncated file is found, and damaged data is not.

    Args:
        data: bytes of the file.
        name: name of the file, for messages.
        exact: also read the data below the box.
        header: result of ``_header``.

    Raises:
        BadImageError: when it is decoded, for broken data; the message names the file.
    """

    def __init__(self, data: bytes, name: str, exact: bool, header: _Header) -> None:
        super().__init__()
        self._mode, self._size = "RGB", (header.width, header.height)
        self._args = data, name, exact, header
        self._pixels: Pixels | None = None  # all of them
        self._loaded = False

    def __reduce__(self) -> Any:
        return JPEG, self._args

    def pixels(self, box: Box | None = None) -> Pixels:
        """Give the RGB values, shape (rows, width, 3): of all, or of what is in a box (see ``pixels_of``)."""
        data, name, exact, header = self._args
        if box is None:
            if self._pixels is None:
                self._pixels = _decode(data, name, np.empty((header.height, header.width, 3), np.uint8), None)
            return self._pixels
        rows, bottom = header.height, box[0] + box[2]
        if self._pixels is not None:
            return self._pixels[:bottom]
        if header.scan and not exact and data.rfind(END, header.scan) > 0:
            rows = min(rows, header.rows_for(bottom))
        if rows < header.height:
            at = header.position
            data = b"".join((data[:at], struct.pack(">H", rows), data[at + 2 :]))
        pixels = np.empty((rows, header.width, 3), np.uint8)
        return _decode(data, name, pixels, header.region(box, rows) if header.scan else None)[:bottom]

    def load(self) -> Any:
        """Decode, for PIL."""
        if not self._loaded:
            self.im = Image.fromarray(self.pixels()).im
            self._loaded = True
        return super().load()


class _Header(NamedTuple):
    """The header of a JPEG file that libjpeg-turbo can convert to RGB.

    Args:
        width: in pixels.
        height: in pixels.
        position: of the height in the file.
        block: rows and columns of pixels that are coded together.
        scan: where the pixels begin, or 0 where they cannot be decoded from the top downwards.
    """

    width: int
    height: int
    position: int
    block: tuple[int, int]
    scan: int

    def rows_for(self, bottom: int) -> int:
        """Rows to decode for those above ``bottom``; colors of half the height are smoothed over blocks."""
        block, _ = self.block
        spare = 0 if block == 8 else 1
        return (-(-bottom // block) + spare) * block

    def region(self, box: Box, rows: int) -> Box:
        """Return the region to decode for a box: from the start of a block to the last row, which may contain errors.

        The region has 5 extra columns, because colors of half width are smoothed only in wider regions.
        """
        top, left, _, width = box
        right = min(left + width + 5, self.width)
        top, left = max(top - 1, 0), max(left - 5, 0) // self.block[1] * self.block[1]
        return top, left, rows - top, right - left


def _header(data: bytes) -> _Header | None:
    """Read the markers up to the first scan; None for what is better left to PIL."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, frame = 2, None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xFF:  # fills up
            at += 1
            continue
        if marker in (SOF0, SOF1, SOF2):
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            bomb = width * height > (Image.MAX_IMAGE_PIXELS or math.inf)  # which PIL rejects, or warns about
            if precision != 8 or channels not in (1, 3) or not height or not width or bomb:
                return None
            sampling = data[at + 11 : at + 11 + 3 * channels : 3]
            block = 8 * max(code & 15 for code in sampling), 8 * max(code >> 4 for code in sampling)
            frame = marker, width, height, at + 5, block, channels
        elif marker == SOS:
            if frame is None:
                return None
            kind, width, height, position, block, channels = frame
            from_top = kind != SOF2 and data[at + 4] == channels
            return _Header(width, height, position, block, at if from_top else 0)
        at += 2 + length
    return None


def _decode(data: bytes, name: str, pixels: Pixels, region: Box | None) -> Pixels:
    """Decode a file into ``pixels``, all or a region at least; or into new ones, where only PIL can."""
    from simplejpeg import decode_jpeg  # here, because the small data sets do without

    try:
        if not (region and decode_region(data, pixels, *region)):
            decode_jpeg(data, buffer=pixels)
    except ValueError as error:  # the first thing that libjpeg complained about; what it decoded is in the buffer
        message = str(error)
        if HARMLESS in message:
            return pixels
        if message.startswith("Corrupt JPEG data"):  # PIL does not report this
            raise _unreadable(name, error) from error
        return np.array(_decode_any(data, name))
    return pixels


def _decode_any(data: bytes, name: str, exif: bool = False) -> Image.Image:
    try:
        prepare_reader(data)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if exif else image
    except UnidentifiedImageError as error:
        error.args = ("cannot identify image file",)  # the address of an object in memory follows
        raise _unreadable(name, error) from error
    except Exception as error:  # PIL's decoders fail with any type: OSError, SyntaxError, ValueError, struct.error, ...
        if not is_about_input(error) and not isinstance(error, ValueError):  # a format that lacks its package
            raise
        raise _unreadable(name, error) from error
    if image.format == "PPM" and image.mode == "I":  # 16 bits, which PIL gives in 32
        turned = Image.fromarray(np.asarray(turned).astype(np.uint16))
    try:
        return to_rgb(turned)
    except (ValueError, OSError) as error:  # a mode without a fixed range, and what PIL cannot convert
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> BadImageError:
    return BadImageError(f"cannot read the image {name!r} ({error}): replace the file or remove it")
