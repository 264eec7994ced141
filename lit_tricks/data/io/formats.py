"""The endings of image files, and readers for formats that Pillow may lack."""

from __future__ import annotations

from importlib.util import find_spec

from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["ENDINGS", "is_image", "prepare_reader"]

ENDINGS: tuple[str, ...] = (*IMG_EXTENSIONS, ".gif", ".avif", ".heic", ".heif")

# The first bytes of an ISO media file are its length; then it names its kind.
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF = (b"avif", b"avis")


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its ending."""
    return name.lower().endswith(ENDINGS)


def prepare_reader(data: bytes) -> None:
    """Let Pillow read the format of a file, by the file's first bytes, where a package for it is installed.

    Raises:
        ValueError: if no such package is installed.
    """
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in HEIC:
        if find_spec("pillow_heif") is None:
            raise ValueError('Pillow reads HEIC only with pillow-heif: pip install "lit-tricks[heic]"')
        from pillow_heif import register_heif_opener

        register_heif_opener()
    elif brand in AVIF:
        from PIL import features

        if not features.check("avif") and find_spec("pillow_avif") is None:
            raise ValueError("this Pillow reads no AVIF: pip install 'pillow>=11.3'")
