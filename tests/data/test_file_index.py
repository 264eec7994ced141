"""The list of the image files: that of torchvision, found again without reading the folders, and never out of date."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lit_tricks.data.io import file_index as _listing
from lit_tricks.data.io.file_index import Paths, list_images

NAMES = (
    "bee/2.jpg",
    "bee/10.JPG",
    "bee/b/1.png",
    "bee/b-1/1.webp",
    "bee/notes.txt",
    "ant/é.jpeg",
    "ant/画像.jpg",
    "cow/x/y/z.tif",
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that was not changed for long, with a cache for however few images."""
    monkeypatch.setenv("LIT_TRICKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_listing, "REMEMBER_FROM", 1)
    monkeypatch.setattr(_listing, "SETTLED", -3600.0)
    for name in NAMES:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    return tmp_path / "root"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are read."""
    folders: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (folders.append(str(path)), scandir(path))[1])
    return folders


def torchvisions(root: Path) -> list[tuple[str, int]]:
    return list(DatasetFolder(str(root), lambda path: path, IMG_EXTENSIONS, allow_empty=True).samples)


def ours(root: Path) -> list[tuple[str, int]]:
    paths, labels, _ = list_images(str(root))
    return list(zip(paths, labels.tolist(), strict=True))


def test_listing_equals_torchvision(root: Path) -> None:
    paths, labels, classes = list_images(str(root))
    assert list(zip(paths, labels.tolist(), strict=True)) == torchvisions(root)
    assert classes == ["ant", "bee", "cow"]
    assert len(paths) == 7
    assert all(os.path.isfile(path) for path in paths)


def test_links_are_followed_and_loops_are_not(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "bee" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert ours(root) == torchvisions(root)
    (root / "cow" / "loop").symlink_to(root)
    (root / "cow" / "itself").symlink_to("itself")
    assert [path for path, _ in ours(root)] == [path for path, _ in torchvisions_without_loop(root)]


def torchvisions_without_loop(root: Path) -> list[tuple[str, int]]:
    (root / "cow" / "loop").unlink()
    return torchvisions(root)


def test_folders_are_read_once(root: Path, read: list[str]) -> None:
    first = ours(root)
    assert len(read) == 8
    read.clear()
    assert ours(root) == first
    assert read == []


CHANGES: dict[str, Callable[[Path], object]] = {
    "file": lambda root: (root / "bee" / "b" / "0.jpg").touch(),
    "file removed": lambda root: (root / "ant" / "画像.jpg").unlink(),
    "file renamed": lambda root: (root / "bee" / "2.jpg").rename(root / "bee" / "3.jpg"),
    "file moved": lambda root: (root / "bee" / "2.jpg").rename(root / "cow" / "2.jpg"),
    "class": lambda root: ((root / "emu").mkdir(), (root / "emu" / "1.jpg").touch()),
    "class renamed": lambda root: (root / "bee").rename(root / "wasp"),
    "folder below": lambda root: ((root / "cow" / "x" / "y" / "w").mkdir(), (root / "cow/x/y/w/1.jpg").touch()),
    "time put back": lambda root: restore(root / "bee", lambda folder: (folder / "11.jpg").touch()),
}


def restore(folder: Path, change: Callable[[Path], object]) -> None:
    """As rsync and tar do."""
    times = folder.stat()
    change(folder)
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(root: Path, read: list[str], change: Callable[[Path], object]) -> None:
    before = ours(root)
    time.sleep(0.02)  # the clock of the file system ticks a hundred times a second or more
    change(root)
    read.clear()
    after, count = ours(root), len(read)
    assert after == torchvisions(root) != before
    assert 1 <= count <= 4  # of 8


def test_a_folder_that_has_just_changed_is_not_relied_on(
    root: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_listing, "SETTLED", 2.0)
    first = ours(root)
    read.clear()
    assert ours(root) == first
    assert len(read) == 8
    later = time.time_ns() + 3 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    read.clear()
    assert ours(root) == ours(root) == first
    assert len(read) == 8


@pytest.mark.parametrize("content", [b"", b"nonsense\n", b'{"version": 1}\n', b"[]\nxyz", b"cut"])
def test_a_damaged_cache_is_done_without(root: Path, content: bytes) -> None:
    first = ours(root)
    [cache] = (root.parent / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-2] if content == b"cut" else content)
    assert ours(root) == first
    assert json.loads(cache.read_bytes().split(b"\n")[0])["root"] == str(root)


def test_a_cache_that_can_not_be_written_is_done_without(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("/proc/nowhere", str(root / "bee" / "2.jpg"), ""):
        monkeypatch.setenv("LIT_TRICKS_CACHE", place)
        assert ours(root) == torchvisions(root)


def test_few_images_are_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_listing, "REMEMBER_FROM", 8)
    ours(root)
    assert not (root.parent / "cache").exists()


def test_paths_are_strings_of_any_bytes() -> None:
    names = ["a/b.jpg", "", "ü/\udcff.png", "x" * 300]
    paths = Paths("/root", [os.fsencode(name) for name in names])
    assert list(paths) == [os.path.join("/root", name) for name in names]
    assert list(pickle.loads(pickle.dumps(paths))) == list(paths)
    assert list(Paths("/root", [])) == []
    for index in (4, -1):
        with pytest.raises(IndexError, match="there are 4 files"):
            paths[index]
