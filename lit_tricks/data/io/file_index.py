"""The image files below a folder, cached between runs, in a few tensors.

All listings use the same walk. The walk follows links, but not in circles. It ignores hidden names that begin with a
dot, such as ``.ipynb_checkpoints`` and ``._0.jpg``, and the folders that operating systems and archives add.

A list of a million strings makes loader processes grow: reading a string changes its reference count, which copies a
page of memory that was shared with the main process. Tensors have no such counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_tricks.data.io.formats import is_image
from lit_tricks.utils.files import read_regular

__all__ = ["Paths", "cache_folder", "class_folders", "find_images", "is_hidden", "left_out", "list_images"]

VERSION = 3  # of the files in the cache
REMEMBER_FROM = 5000  # images; fewer are found as fast
SETTLED = 2.0  # seconds after which a change moves a folder's time stamp on any file system
THREADS = 8  # a network file system answers many questions at a time
# In addition to names that begin with a dot: folders of macOS archives, NAS systems, Windows and file systems.
SYSTEM = {"__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"}
SYSTEM |= {"lost+found", "recycler", "__pycache__", "~snapshot"}
SYSTEM |= {"@tmp", "@appstore", "@recently-snapshot", "@sharesnap"}


class Paths(Sequence[str]):
    """Paths of files, in tensors: workers share them, also those that are not forked.

    Args:
        root: folder that the paths start with.
        names: the paths below it, in the encoding of the file system.
    """

    def __init__(self, root: str, names: Iterable[bytes]) -> None:
        self.root = root
        text = b"\0".join(names)
        self.text: Tensor = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)
        # where each ends; the 0 in between occurs in no path
        ends = np.flatnonzero(self.text.numpy() == 0)
        self.ends: Tensor = torch.from_numpy(np.append(ends, len(text)) if text else ends[:0])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} files, and none with the index {index}")
        ends = self.ends.numpy()
        name = self.text.numpy()[ends[index - 1] + 1 if index else 0 : ends[index]].tobytes()
        return os.path.join(self.root, os.fsdecode(name))

    def __repr__(self) -> str:
        return f"{len(self)} files below {self.root!r}"


@dataclass
class _Folder:
    """The cached content of a folder.

    Args:
        stamp: device, inode, and times of the last change of its list of files and of anything, in nanoseconds.
        count: number of images in the folder itself.
        names: names of the images, sorted, with a 0 between them.
        folders: names of its folders, sorted.
        hidden: number of its folders and images that are ignored.
    """

    stamp: list[int]
    count: int = 0
    names: bytes = b""
    folders: list[str] = field(default_factory=list)
    hidden: int = 0


def class_folders(root: str) -> list[str]:
    """List the folders in a folder, sorted, without what is hidden."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and not is_hidden(entry.name))


def find_images(root: str) -> list[str]:
    """List all image files below a folder, at any depth, by their path relative to the folder, sorted.

    Raises:
        OSError: if a folder cannot be read.
    """
    found, _ = _walk(root, {}, by_class=False)
    _tell_of_hidden(root, found)
    blocks = ((name, found[name].names.split(b"\0")) for name in found if found[name].count)
    return sorted(os.path.join(name, os.fsdecode(file)) for name, files in blocks for file in files)


def left_out(root: str) -> tuple[list[str], list[str]]:
    """List what is not read below a folder: hidden folders and images, and files that have no ending of an image."""
    hidden: list[str] = []
    others: list[str] = []
    for folder, folders, files in os.walk(root):
        hidden += [os.path.join(folder, name) for name in sorted(folders) if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        hidden += [os.path.join(folder, name) for name in sorted(files) if is_image(name) and name.startswith(".")]
        others += [os.path.join(folder, name) for name in sorted(files) if not is_hidden(name) and not is_image(name)]
    return hidden, others


def list_images(root: str) -> tuple[Paths, Tensor, list[str]]:
    """Find all image files below the folders of a folder, at any depth, by their ending.

    The order is the same as in torchvision: by first folder, then by folder, then by name. Long listings are kept in
    the cache folder of the user (``$LIT_TRICKS_CACHE``, or ``lit_tricks`` in ``$XDG_CACHE_HOME`` or ``~/.cache``). The
    next run reads only folders whose time stamp has changed, which happens when a file is added, removed or renamed. A
    folder that changed just before it was read is read again, because the next change may not change the stamp. A cache
    that cannot be written or read is ignored.

    Args:
        root: the folder.

    Returns:
        The files, the index of the folder in ``root`` per file, int64, and the names of these folders, sorted.

    Raises:
        OSError: if a folder cannot be read.
    """
    root, start = os.fspath(root), time.monotonic()
    cache = _cache_file(root)
    known = _read_cache(cache, root) if cache else {}
    found, scanned = _walk(root, known, by_class=True)
    _tell_of_hidden(root, found)
    tops = [name for name in found[""].folders if name in found]
    order = sorted((name for name in found if name), key=lambda name: (name.partition(os.sep)[0], name))
    counts = [found[name].count for name in order]
    position = {name: index for index, name in enumerate(tops)}
    labels = np.repeat([position[name.partition(os.sep)[0]] for name in order], counts).astype(np.int64)
    blocks = (_prefixed(os.fsencode(name + os.sep), found[name].names) for name in order if found[name].count)
    paths = Paths(root, blocks)
    if cache and scanned and len(paths) >= REMEMBER_FROM:
        _write_cache(cache, root, found)
    seconds = time.monotonic() - start
    if seconds > 2:
        rank_zero_info(f"{root}: {len(paths)} images in {len(found)} folders found in {seconds:.1f} s")
    return paths, torch.from_numpy(labels), tops


def _walk(root: str, known: dict[str, _Folder], by_class: bool) -> tuple[dict[str, _Folder], int]:
    """Return each folder by its path below the root, and how many had to be read.

    A folder that links lead to several times is there once, or once for each of the first folders, the classes.
    """
    found: dict[str, _Folder] = {}
    seen: dict[str, set[tuple[int, int]]] = {}
    scanned, level = 0, [""]
    with ThreadPoolExecutor(THREADS) as pool:
        while level:
            folders = pool.map(lambda name: _look(root, name, known.get(name)), level)
            deeper = []
            for name, (folder, is_new) in zip(level, folders, strict=True):
                identity = (folder.stamp[0], folder.stamp[1])
                first = name.partition(os.sep)[0] if by_class else ""
                visited = seen.setdefault(first, set(seen.get("", ())))
                if identity[1] and identity in visited:  # some file systems have no numbers of folders
                    continue
                visited.add(identity)
                scanned += is_new
                found[name] = folder
                deeper += [os.path.join(name, each) for each in folder.folders]
            level = deeper
    return found, scanned


def _look(root: str, name: str, known: _Folder | None) -> tuple[_Folder, bool]:
    """A folder, and whether it had to be read."""
    path, now = os.path.join(root, name), time.time_ns()
    status = os.stat(path)
    stamp = [status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    if known and known.stamp == stamp:
        return known, False
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_folder(entry):
                folders.append(entry.name)
            else:
                files.append(entry.name)
    seen = [each for each in folders if not is_hidden(each)]
    named = [os.fsencode(file) for file in files if is_image(file)]
    images = sorted(file for file in named if not file.startswith(b"."))
    hidden = len(folders) - len(seen) + len(named) - len(images)
    # Some file systems have no times of folders (0), or make them up (now).
    if not 0 < max(stamp[2:]) < now - SETTLED * 1e9 or stamp[2] == 0:
        stamp[2:] = [-1, -1]  # not to be relied on
    return _Folder(stamp, len(images), b"\0".join(images), sorted(seen), hidden), True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is left out, by its name."""
    return name.startswith(".") or name.lower() in SYSTEM


_told: set[tuple[str, int]] = set()  # folders, and how much is hidden in them


def _tell_of_hidden(root: str, found: dict[str, _Folder]) -> None:
    """Log once how much was left out."""
    count = sum(folder.hidden for folder in found.values())
    if count and (root, count) not in _told:
        _told.add((root, count))
        rank_zero_info(
            f"{root}: {count} hidden folders and images were ignored, whose names begin with a dot or belong to "
            "systems, such as __MACOSX and @eaDir"
        )


def _prefixed(prefix: bytes, names: bytes) -> bytes:
    return prefix + names.replace(b"\0", b"\0" + prefix)


def cache_folder() -> Path | None:
    """Return the cache folder of the user (see ``list_images``); None if there is none."""
    folder = os.environ.get("LIT_TRICKS_CACHE")
    if folder == "":
        return None
    with contextlib.suppress(OSError, RuntimeError):  # no home
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_tricks"
        return Path(folder or default)
    return None


def _cache_file(root: str) -> Path | None:
    folder = cache_folder()
    key = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
    return folder and folder / f"{key}.images"


def _read_cache(cache: Path, root: str) -> dict[str, _Folder]:
    """Return a line of JSON, then the names of the files."""
    try:
        line, _, text = read_regular(cache).partition(b"\n")
        head = json.loads(line)
        if head["version"] != VERSION or head["root"] != os.path.realpath(root) or head["size"] != len(text):
            return {}
        parts = _parts(text, [size for *_, size in head["folders"]])
        found = {
            name: _Folder(stamp, count, part, folders, hidden)
            for (name, stamp, count, folders, hidden, _), part in zip(head["folders"], parts, strict=True)
        }
        return found if all(map(_is_possible, found.values())) else {}
    except (OSError, ValueError, LookupError, TypeError):  # not there, not readable, or damaged
        return {}


def _is_possible(folder: _Folder) -> bool:
    """Return whether the entry of a cache is one that a walk makes: as many names as counted, and plain ones."""
    names = folder.names.split(b"\0") if folder.names else []
    plain = all(os.sep not in each and each not in ("", ".", "..") for each in folder.folders)
    return len(names) == folder.count and os.sep.encode() not in folder.names and plain


def _parts(text: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    for size in sizes:
        yield text[at : at + size]
        at += size


def _write_cache(cache: Path, root: str, found: dict[str, _Folder]) -> None:
    folders = [
        [name, each.stamp, each.count, each.folders, each.hidden, len(each.names)] for name, each in found.items()
    ]
    text = b"".join(each.names for each in found.values())
    head = {"version": VERSION, "root": os.path.realpath(root), "size": len(text), "folders": folders}
    with contextlib.suppress(OSError):  # a full disk, a home that is read only, ...
        cache.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=cache.parent)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(json.dumps(head).encode() + b"\n" + text)
            os.replace(part, cache)
        except OSError:
            os.unlink(part)
            raise
