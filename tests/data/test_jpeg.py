"""JPEG files that are decoded when needed and as far as needed: against PIL, bit for bit, and broken ones."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from helpers.photos import jpeg, photo
from PIL import Image
from torchvision.transforms import v2

from lit_tricks.data.io import jpeg as _jpeg
from lit_tricks.data.io import turbojpeg as _turbojpeg
from lit_tricks.data.io.jpeg import Box, decode_image, pixels_of, read_image

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "restart markers": {"subsampling": 2, "restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "EXIF": {"exif": b"Exif\x00\x00" + bytes(5000)},
    "4:4:0": {"colorsubsampling": "440"},
    "4:1:1": {"colorsubsampling": "411"},
    "gray": {"colorsubsampling": "Gray"},
}


def encode(image: Image.Image, kind: str) -> bytes:
    """By PIL, or by simplejpeg where PIL does not know such files."""
    if "colorsubsampling" in KINDS[kind]:
        return simplejpeg.encode_jpeg(np.asarray(image), **KINDS[kind])  # type: ignore[no-any-return]
    return jpeg(image, **KINDS[kind])


def by_pil(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(params=["TurboJPEG", "simplejpeg"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without the library that decodes regions."""
    if request.param == "simplejpeg":
        monkeypatch.setattr(_turbojpeg, "_library", lambda: None)
    elif not _turbojpeg._library():
        pytest.skip("there is no TurboJPEG 3 on this machine")
    monkeypatch.setattr(_turbojpeg, "_decoders", _turbojpeg._Decoders())
    return str(request.param)


def boxes(width: int, height: int) -> list[Box]:
    """All of the image, its corners, and anything, small and large."""
    rng = np.random.RandomState(0)
    found: list[Box] = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
    for largest in [3, 1000] * 15:
        h, w = (rng.randint(1, min(side, largest) + 1) for side in (height, width))
        found.append((rng.randint(height - h + 1), rng.randint(width - w + 1), h, w))
    return found


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_of_a_box_are_those_of_the_whole_image(
    kind: str, exact: bool, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions, decode = [], _turbojpeg.decode_region
    monkeypatch.setattr(_jpeg, "decode_region", lambda *args: regions.append(decode(*args)) or regions[-1])
    for width, height in ((1, 1), (8, 8), (50, 37), (97, 130), (160, 96)):
        data = encode(photo(width, height), kind)
        whole = by_pil(data)
        for box in boxes(width, height):
            top, left, h, w = box
            found = pixels_of(decode_image(data, "a.jpg", exact), box)
            assert found.shape == (top + h, width, 3)
            assert np.array_equal(found[top:, left : left + w], whole[top : top + h, left : left + w])
    assert set(regions) == (set() if kind == "progressive" else {decoder == "TurboJPEG"})


def test_rows_below_a_box_are_decoded_where_it_shall_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, decode = [], _jpeg._decode
    monkeypatch.setattr(_jpeg, "_decode", lambda *args: rows.append(len(args[2])) or decode(*args))
    data = jpeg(photo(64, 200))
    for exact in (False, True):
        pixels_of(decode_image(data, "a.jpg", exact), (0, 0, 40, 64))
    assert rows == [64, 200]  # 40 are 3 rows of blocks, and a spare one


def test_the_whole_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, decode = [], _jpeg._decode
    monkeypatch.setattr(_jpeg, "_decode", lambda *args: calls.append(1) or decode(*args))
    image = decode_image(jpeg(photo(64, 200)), "a.jpg")
    assert image.size == (64, 200)
    assert not calls
    for box in (None, (0, 0, 50, 64), None, (10, 10, 30, 30)):
        pixels_of(image, box)
    image.resize((10, 10))
    assert len(calls) == 1


def test_threads_decode_side_by_side() -> None:
    data = jpeg(photo(160, 96))
    whole = by_pil(data)

    def decode(box: Box) -> bool:
        top, left, h, w = box
        found = pixels_of(decode_image(data, "a.jpg"), box)[top:, left : left + w]
        return np.array_equal(found, whole[top : top + h, left : left + w])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(decode, boxes(160, 96) * 20))


@pytest.mark.parametrize("kind", ["absent", "of version 2", "found"])
def test_the_library_that_decodes_regions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:  # without the functions of version 3
        tjInitDecompress = None  # noqa: N815

    def load(path: str) -> Any:
        if kind == "absent":
            raise OSError(path)
        return Old() if kind == "of version 2" else cdll(path)

    cdll = _turbojpeg.ctypes.CDLL
    monkeypatch.setattr(_turbojpeg.ctypes, "CDLL", load)
    find = _turbojpeg._library.__wrapped__
    if kind == "found":
        assert find()  # the extra `dev` brings one
    else:
        assert find() is None


def test_image_is_a_pil_image() -> None:
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
    found = pixels_of(read_image(path), (0, 0, 9, 9))
    expected = 15 if mode == "I;16" else np.asarray(Image.open(path).convert("RGB"))[:9]
    assert (found.shape[2], found.dtype, found.flags.writeable) == (3, np.uint8, True)
    assert np.array_equal(found[:, :9], np.broadcast_to(expected, found.shape)[:, :9])


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
@pytest.mark.parametrize("box", [None, (0, 0, 160, 120), (100, 60, 40, 40)])
def test_broken_files_are_named(tmp_path: Path, kind: str, exact: bool, box: Box | None, decoder: str) -> None:
    path = tmp_path / "picture of a bee.jpg"
    path.write_bytes(broken()[kind])
    with pytest.raises(RuntimeError, match=r"cannot read .*of a bee\.jpg.*remove it"):
        pixels_of(read_image(str(path), exact), box)
    if kind in ("half", "almost whole"):  # the rows that are asked for are there, the end of the file is not
        with pytest.raises(RuntimeError, match="cannot read the image"):
            pixels_of(read_image(str(path), exact), (0, 0, 16, 16))


def test_errors_are_found_by_both_decoders_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bytes are wrong: both complain, or both give the same pixels."""
    if not _turbojpeg._library():
        pytest.skip("there is no TurboJPEG 3 on this machine")
    data, rng = jpeg(photo(96, 128), quality=90, subsampling=2), np.random.RandomState(0)
    scan, box = data.index(b"\xff\xda") + 12, (64, 40, 40, 40)
    complaints = 0
    for place in rng.randint(scan, len(data) - 32, 150):
        wrong = data[:place] + rng.bytes(30) + data[place + 30 :]
        found: list[Any] = []
        for decode in (_turbojpeg.decode_region, lambda *_: False):
            monkeypatch.setattr(_jpeg, "decode_region", decode)
            try:
                found.append(pixels_of(decode_image(wrong, "a.jpg"), box)[64:, 40:80].tobytes())
            except RuntimeError:
                found.append(None)
        assert found[0] == found[1]
        complaints += found[0] is None
    assert 10 < complaints < 140


@pytest.mark.parametrize("what", ["nowhere", "folder", "closed"])
def test_files_that_cannot_be_opened_are_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / f"{what}.jpg"
    if what == "folder":
        path.mkdir()
    elif what == "closed":
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(RuntimeError, match=rf"cannot read .*{what}.jpg"):
        read_image(str(path))


def test_file_with_libjpeg_warning_is_decoded(decoder: str) -> None:
    data = jpeg(photo(64, 200))
    scan = data.index(b"\xff\xda")
    for odd in (data + b"more", data[:-2] + b"\x00\x00\x00\xff\xd9", data.replace(b"JFIF\x00\x01", b"JFIF\x00\x07")):
        assert odd != data
        assert odd[scan] == 0xFF
        for box in (None, (0, 0, 20, 64)):
            assert np.array_equal(pixels_of(decode_image(odd, "a.jpg"), box), by_pil(data)[: box and box[2]])


def test_a_decompression_bomb_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(RuntimeError, match=r"cannot read .*'a\.jpg' .*bomb"):
        decode_image(jpeg(photo(64, 64)), "a.jpg")
