"""The path of a picture that a command writes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["png_path"]


def png_path(out: str) -> Path:
    """Return the path of a PNG file to write.

    Raises:
        ValueError: if the file's name does not end in .png.
        FileNotFoundError: if its folder does not exist.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {out} does not end in .png, and a PNG file is what is written.")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out {out} lies in a folder that does not exist: make it first.")
    return path
