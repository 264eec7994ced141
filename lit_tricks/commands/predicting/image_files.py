"""Find the image files of a command line: files, folders and globs."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from lit_tricks.data.io.file_index import left_out
from lit_tricks.data.io.formats import ENDINGS
from lit_tricks.data.samples import find_images
from lit_tricks.utils.log import log

__all__ = ["image_files"]


SHOWN = 5  # names in a message
STDIN = "-"


def image_files(words: Iterable[str]) -> dict[str, str]:
    """Find the image files of the given paths, and log ignored files of folders.

    A file that is named itself is used with any ending. Below a folder, at any depth, files with the ending of an image
    are used.

    Args:
        words: paths of files and folders, and globs such as ``photos/**/*.jpg``. "-" reads names from standard input,
            one per line.

    Returns:
        The named folder, or the parent folder, for each file, in the order of the paths. Each file occurs once.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    for word in _expanded(words):
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
            "%d files were ignored, since their endings do not belong to images (%s): %s", len(others), counts, shown
        )
    if not found:
        raise FileNotFoundError(f"images={' '.join(words)}: no image was found. Files must end in {' '.join(ENDINGS)}.")
    return found


def _expanded(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        if word == STDIN:
            yield from filter(str.strip, sys.stdin.read().splitlines())
        else:
            yield word


def _paths(word: str) -> list[str]:
    """Return the files and folders of an argument."""
    if os.path.lexists(word):
        return [word]
    paths = sorted(glob.glob(word, recursive=True))
    if paths:
        return [path for path in paths if not os.path.isdir(path)] or paths
    what = "no file matches" if glob.has_magic(word) else "there is no such file or folder"
    raise FileNotFoundError(f"images={word!r}: {what}. Give image files, folders of images, or globs.")
