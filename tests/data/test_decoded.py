"""Images that are decoded once: the same pixels, little room or none, and several processes at a time."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photos import photo

from lit_tricks.data import ImageFolder
from lit_tricks.data.io import decoded
from lit_tricks.data.io.decoded import DecodedFiles
from lit_tricks.data.io.jpeg import BadImageError, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CACHES = ["memory", "disk"]
SIZES = [(60, 40), (40, 60), (20, 17), (33, 33)]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ImageFolder]:
    monkeypatch.setenv("LIT_TRICKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "_stores", type(decoded._stores)())
    monkeypatch.setattr(decoded, "BLOCK", 3)
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for index, size in enumerate(SIZES):
                photo(*size, seed=index).save(folder / f"{index}.{'png' if index == 3 else 'jpg'}")
    options = {"image_size": 16, "resize_size": 20, "batch_size": 4, "num_workers": 0}
    return lambda **given: ImageFolder(str(tmp_path / "images"), **{**options, **given})


def batches(loader: Any) -> list[Any]:
    return [part for batch in loader for part in batch]


@pytest.mark.parametrize("cache", CACHES)
def test_pixels_are_those_of_the_files(make: Callable[..., ImageFolder], cache: str) -> None:
    """Bit by bit where an image is not smaller; in evaluation up to the rounding of one resizing more."""
    plain, cached = make(resize_size=100), make(resize_size=100, cache=cache)
    torch.manual_seed(0)
    for name in ("train_dataloader", "val_dataloader"):
        pairs = zip(batches(getattr(plain, name)()), batches(getattr(cached, name)()), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)
    source = make(cache=cache).source("val")
    assert [source[i][0].size for i in range(4)] == [(30, 20), (20, 30), (20, 17), (20, 20)]
    assert np.array_equal(np.asarray(source[0][0]), pixels_of(source[0][0]))
    for (left, _), (right, _) in zip(make().val_dataloader(), make(cache=cache).val_dataloader(), strict=True):
        assert (left.int() - right.int()).abs().max() <= 2
    assert make(eval_size=32, cache=cache).source("val")[0][0].size == (60, 40)  # 40 pixels are needed


@pytest.mark.parametrize("cache", CACHES)
def test_files_are_read_once(make: Callable[..., ImageFolder], cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(cache=cache)
    data.setup("fit")
    source = data.source("train")
    assert isinstance(source, DecodedFiles)
    monkeypatch.setattr(decoded, "pixels_of", lambda image: pytest.fail("decoded again"))
    again = make(cache=cache)
    again.setup("fit")
    assert again.source("train")._store is source._store  # type: ignore[attr-defined]
    twin = copy.deepcopy(data).source("train")
    assert twin._store is source._store  # type: ignore[attr-defined]
    loaded = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 3000
    assert np.array_equal(pixels_of(loaded[2][0]), pixels_of(source[2][0]))
    if cache == "disk":  # another process, or another day
        decoded._stores.clear()
        fresh = make(cache=cache).source("train")
        assert np.array_equal(pixels_of(fresh[2][0]), pixels_of(source[2][0]))


@pytest.mark.parametrize("cache", CACHES)
def test_changed_files_are_decoded_anew(make: Callable[..., ImageFolder], cache: str, tmp_path: Path) -> None:
    before = pixels_of(make(cache=cache).source("val")[0][0])
    photo(60, 40, seed=9).save(tmp_path / "images" / "val" / "ant" / "0.jpg")
    after = pixels_of(make(cache=cache).source("val")[0][0])
    assert before.shape == after.shape
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("cache", CACHES)
def test_broken_files_are_errors_or_skipped_as_ever(
    make: Callable[..., ImageFolder], cache: str, tmp_path: Path
) -> None:
    path = tmp_path / "images" / "train" / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:500])
    path.with_name("1.jpg").write_bytes(b"none")
    source = make(cache=cache).source("train")
    for index in (0, 1):
        with pytest.raises(BadImageError, match=f"{index}.jpg"):
            pixels_of(source[index][0])
    assert source[2][0].size == (20, 17)
    skipping = make(cache=cache, on_bad_image="skip")
    skipping.setup("fit")
    assert sum(len(batch[1]) for batch in skipping.train_dataloader()) == 8


def test_cache_without_room_raises(make: Callable[..., ImageFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 3 * (30 * 20 + 20 * 30 + 20 * 17 + 20 * 20)
    monkeypatch.setattr(decoded, "_free_memory", lambda: needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": needed - 1}))
    with pytest.raises(ValueError, match=rf'cache="memory".* {needed} bytes.*cache="disk"'):
        make(cache="memory").setup("fit")
    with pytest.raises(ValueError, match=rf'cache="disk".* {needed} bytes.*LIT_TRICKS_CACHE'):
        make(cache="disk").setup("fit")
    monkeypatch.setenv("LIT_TRICKS_CACHE", "")
    with pytest.raises(ValueError, match=r'cache="disk".*LIT_TRICKS_CACHE'):
        make(cache="disk").setup("fit")
    with pytest.raises(ValueError, match="cache='ram'"):
        make(cache="ram")


def test_what_a_killed_process_left_is_overwritten(make: Callable[..., ImageFolder], tmp_path: Path) -> None:
    source = make(cache="disk").source("val")
    assert isinstance(source, DecodedFiles)
    [file] = (tmp_path / "cache").glob("*.pixels")
    file.replace(file.with_suffix(".part"))
    decoded._stores.clear()
    again = make(cache="disk").source("val")
    assert np.array_equal(pixels_of(again[0][0]), pixels_of(source[0][0]))
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".pixels", ".lock"}


def test_several_processes_write_one_file(make: Callable[..., ImageFolder], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=lambda: make(cache="disk").source("val")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 1
    assert make(cache="disk").source("val")[3][0].size == (20, 20)
