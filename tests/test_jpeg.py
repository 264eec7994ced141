"""JPEG files that are decoded when needed and as far as needed: against PIL, bit for bit, and broken ones."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from lit_tricks.data._jpeg import JPEG, decode_image, pixels_of, read_image
from tests.photos import jpeg, photo

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "restart markers": {"subsampling": 2, "restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "EXIF": {"exif": b"Exif\x00\x00" + bytes(5000)},
}


def by_pil(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_above_the_cut_are_those_of_the_whole_image(kind: str) -> None:
    rng = np.random.RandomState(0)
    for width, height in ((1, 1), (8, 8), (50, 37), (97, 130), (160, 96)):
        data = jpeg(photo(width, height), **KINDS[kind])
        whole = by_pil(data)
        for bottom in (*rng.randint(1, height + 1, 6).tolist(), height):
            image, exact = decode_image(data, "a.jpg"), decode_image(data, "a.jpg", exact=True)
            assert isinstance(image, JPEG)
            assert image.size == (width, height)
            pixels = pixels_of(image, bottom)
            assert np.array_equal(pixels, whole[:bottom])
            assert np.array_equal(pixels_of(exact, bottom), whole[:bottom])
            assert exact._pixels is not None  # type: ignore[attr-defined]
            assert len(exact._pixels) == height  # type: ignore[attr-defined]
            assert image._pixels is not None
            if kind != "progressive" and bottom <= height - 48:
                assert len(image._pixels) < height


def test_it_is_decoded_once_and_again_only_for_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import simplejpeg

    calls, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *a, **k: calls.append(1) or decode(*a, **k))
    image = decode_image(jpeg(photo(64, 200)), "a.jpg")
    assert image.size == (64, 200)
    assert not calls
    for bottom in (50, 40, None, 100):
        pixels_of(image, bottom)
    image.resize((10, 10))
    assert len(calls) == 2


def test_it_is_a_pil_image() -> None:
    data = jpeg(photo(60, 40))
    whole = Image.fromarray(by_pil(data))
    for act in (
        lambda image: image.resize((20, 20)),
        lambda image: image.crop((3, 3, 30, 30)).convert("L"),
        copy.copy,
        v2.RandomResizedCrop(16, scale=(1, 1), ratio=(1, 1)),
        v2.Compose([v2.Resize(20), v2.CenterCrop(18), v2.functional.pil_to_tensor]),
        lambda image: pickle.loads(pickle.dumps(image)),
    ):
        assert np.array_equal(np.asarray(act(decode_image(data, "a.jpg"))), np.asarray(act(whole)))
    image = decode_image(data, "a.jpg")
    assert (image.mode, image.width, image.height) == ("RGB", 60, 40)
    assert np.array_equal(np.asarray(image), np.asarray(whole))


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "P", "LA", "RGBA", "I;16"])
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_all_other_kinds_are_what_pil_makes_of_them(tmp_path: Path, mode: str, ending: str) -> None:
    image = Image.fromarray(np.full((9, 9), 4000, np.uint16)) if mode == "I;16" else photo(30, 50).convert(mode)
    path = str(tmp_path / f"a.{ending}")
    try:
        image.save(path)
    except (OSError, KeyError):
        pytest.skip("there is no such file")
    found = pixels_of(read_image(path), 9)
    expected = 15 if mode == "I;16" else np.asarray(Image.open(path).convert("RGB"))[:9]
    assert (found.shape[2], found.dtype, found.flags.writeable) == (3, np.uint8, True)
    assert np.array_equal(found, np.broadcast_to(expected, found.shape))


def broken() -> dict[str, bytes]:
    data = jpeg(photo(120, 160), quality=90)
    middle = len(data) // 2
    return {
        "empty": b"",
        "text": b"not an image",
        "header only": data[:300],
        "half": data[:middle],
        "almost whole": data[:-2],
        "bits": data[:middle] + b"\x55\xff\xff\x00" * 50 + data[middle + 200 :],
        "end in the wrong place": data[:middle] + b"\xff\xd9",
        "no scan": data[:2] + b"\xff\xd9",
    }


@pytest.mark.parametrize("kind", broken())
@pytest.mark.parametrize("exact", [False, True])
def test_broken_files_are_named(tmp_path: Path, kind: str, exact: bool) -> None:
    path = tmp_path / "picture of a bee.jpg"
    path.write_bytes(broken()[kind])
    with pytest.raises(RuntimeError, match=r"cannot read the image .*of a bee\.jpg.*: replace the file or remove it"):
        pixels_of(read_image(str(path), exact))
    if kind in ("half", "almost whole"):  # the rows that are asked for are there, the end of the file is not
        with pytest.raises(RuntimeError, match="cannot read the image"):
            pixels_of(read_image(str(path), exact), 16)


@pytest.mark.parametrize("what", ["nowhere", "folder", "closed"])
def test_files_that_cannot_be_opened_are_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / f"{what}.jpg"
    if what == "folder":
        path.mkdir()
    elif what == "closed":
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(RuntimeError, match=f"cannot read the image .*{what}.jpg"):
        read_image(str(path))


def test_what_libjpeg_only_warns_of_is_decoded() -> None:
    data = jpeg(photo(64, 200))
    scan = data.index(b"\xff\xda")
    for odd in (data + b"more", data[:-2] + b"\x00\x00\x00\xff\xd9", data.replace(b"JFIF\x00\x01", b"JFIF\x00\x07")):
        assert odd != data
        assert odd[scan] == 0xFF
        for bottom in (None, 20):
            assert np.array_equal(pixels_of(decode_image(odd, "a.jpg"), bottom), by_pil(data)[:bottom])


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RuntimeError, match=r"cannot read the image 'a\.jpg' .*bomb"):
        decode_image(jpeg(photo(64, 64)), "a.jpg")
