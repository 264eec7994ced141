"""The image files that words on a command line name: files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable

from lit_tricks.data.io.file_index import left_out
from lit_tricks.data.io.formats import ENDINGS
from lit_tricks.data.samples import find_images
from lit_tricks.utils.log import log

__all__ = ["image_files"]


SHOWN = 5  # names in a message


def image_files(words: Iterable[str]) -> dict[str, str]:
    """Find the image files that words name, and log which files of the folders were left out.

    A file that is named itself is taken whatever its ending. Below a folder, at any depth, the files with the ending of
    an image are taken.

    Args:
        words: files, folders, and globs such as ``photos/**/*.jpg``.

    Returns:
        For each file the folder that was named, or that it lies in, in the order of the words; each file is there once.

    Raises:
        FileNotFoundError: if a word names nothing, or no image is found.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    for word in words:
        for path in _paths(word):
            if os.path.isdir(path):
                found |= {file: path for file in find_images(path) if file not in found}
                others += left_out(path)[1]
            else:
                found.setdefault(path, os.path.dirname(path))
    if others:
        kinds = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        shown = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        log.warning(
            "%d files were left out, as their endings are not those of images (%s): %s", len(others), counts, shown
        )
    if not found:
        raise FileNotFoundError(f"images={' '.join(words)}: no image was found. Files must end in {' '.join(ENDINGS)}.")
    return found


def _paths(word: str) -> list[str]:
    """Return the files and folders that a word names."""
    if os.path.lexists(word):
        return [word]
    paths = sorted(glob.glob(word, recursive=True))
    if paths:
        return [path for path in paths if not os.path.isdir(path)] or paths
    what = "no file matches" if glob.has_magic(word) else "there is no such file or folder"
    raise FileNotFoundError(f"images={word!r}: {what}. Give image files, folders of images, or globs.")
