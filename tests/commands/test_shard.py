"""``lit-tricks data shard``: what is in the shards, and that nothing else is touched, whatever happens."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli import cli, done, write_image_folder, write_images
from litdata import StreamingDataset
from PIL import Image

from lit_tricks.commands.data import shard
from lit_tricks.data.shards import writer as _shard_writer
from lit_tricks.data.shards.writer import image_bytes

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what it has deprecated since
    return write_image_folder(tmp_path / "images")


def samples(folder: Path) -> list[tuple[bytes, int, str]]:
    dataset = StreamingDataset(str(folder))
    return [tuple(dataset[index]) for index in range(len(dataset))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_are_the_files(images: Path, tmp_path: Path) -> None:
    write_images(images / "test" / "ant", 1)
    for name in CLASSES[1:]:
        write_images(images / "test" / name, 2)
    out = tmp_path / "shards"
    assert shard(str(images), str(out), shard_mb=0.003) == out
    for split, count in (("train", 12), ("val", 6), ("test", 5)):
        found = samples(out / split)
        assert {name: content for content, _, name in found} == files(images / split)
        assert [CLASSES[label] for _, label, _ in found] == [name.partition("/")[0] for *_, name in found]
        assert not [path for path in (out / split).glob("chunk*") if b"ARROW1" in path.read_bytes()]  # see the writer
        index = json.loads((out / split / "index.json").read_text())
        assert index["classes"] == list(CLASSES)
        assert len(found) == count
        assert len(index["chunks"]) > 1
        names = [name for *_, name in found]
        assert (names == sorted(names)) == (split != "train")  # shards of training images hold all classes


def test_shards_do_not_depend_on_the_workers(images: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        done("data", "shard", str(images), str(tmp_path / f"{workers}"), f"--num-workers={workers}", "--short-side=10")
    one, three = files(tmp_path / "1"), files(tmp_path / "3")
    assert one.keys() == three.keys()
    assert all(one[name] == three[name] for name in one if name.endswith(".bin"))


def test_short_side_shrinks_what_is_larger(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((50, 40), Image.Resampling.BICUBIC)
    for name, image in {
        "rgb.png": picture,
        "gray.png": picture.convert("L"),
        "cmyk.jpg": picture.convert("CMYK"),
    }.items():
        path = tmp_path / name
        image.save(path)
        for short_side in (None, 40, 60):
            assert image_bytes(str(path), short_side) == path.read_bytes()
        small = Image.open(io.BytesIO(image_bytes(str(path), 20)))
        assert (small.format, small.size, small.mode) == ("JPEG", (25, 20), "RGB")
        expected = np.asarray(image.convert("RGB").resize((25, 20), Image.Resampling.LANCZOS), float)
        assert np.abs(np.asarray(small) - expected).mean() < 2  # of 255


def test_files_of_the_user_survive(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """litdata.optimize would delete these."""
    temporary, home = tmp_path / "tmp", tmp_path / "home"
    home.mkdir()
    for name in ("data", "chunks"):
        (temporary / name).mkdir(parents=True)
        (temporary / name / "thesis.tex").write_text(name)
    before = files(temporary), files(images)
    for name, value in {"TMPDIR": str(temporary), "HOME": str(home), "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)  # to be found anew
    done("data", "shard", str(images), str(tmp_path / "out"))
    assert tempfile.gettempdir() == str(temporary)
    assert (files(temporary), files(images)) == before
    assert not list(home.iterdir())


def test_existing_output_is_replaced_on_request(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    done("data", "shard", str(images), str(out))
    outcome = cli("data", "shard", str(images), str(out))
    assert outcome.code == 1
    assert "holds shards already: name another folder, or replace them: --overwrite" in outcome.err
    write_images(images / "val" / "cow", 3)
    done("data", "shard", str(images), str(out), "--overwrite")
    assert len(samples(out / "val")) == 7
    (out / "val" / "notes.txt").write_text("mine")
    before = files(out)
    outcome = cli("data", "shard", str(images), str(out), "--overwrite")
    assert "other than shards (val/notes.txt): name another folder" in outcome.err
    assert "other than shards (train)" in cli("data", "shard", str(images), str(images), "--overwrite").err
    (tmp_path / "file").write_text("mine")
    assert "is a file: name a folder" in cli("data", "shard", str(images), str(tmp_path / "file"), "--overwrite").err
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images", "shards"]


def test_an_error_leaves_no_half_result(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shard(str(images), str(out))
    before = files(out)
    (images / "val" / "cow" / "1.jpg").write_bytes(b"not an image")
    for target in (out, tmp_path / "new"):
        with pytest.raises(RuntimeError, match=r"cannot read .*val/cow/1\.jpg.*remove it"):
            shard(str(images), str(target), overwrite=True)
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "shards"]


def test_an_interrupt_leaves_no_half_result(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def image_bytes(*args: Any) -> bytes:
        if list(tmp_path.glob("out.incomplete*/train/*.bin")):
            interrupted.append(args[0])
            raise KeyboardInterrupt
        return plain(*args)

    interrupted: list[str] = []
    plain = _shard_writer.image_bytes
    monkeypatch.setattr(_shard_writer, "image_bytes", image_bytes)
    outcome = cli("data", "shard", str(images), str(tmp_path / "out"), "--num-workers=1", "--shard-mb=0.001")
    assert interrupted
    assert outcome.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--short-side=0"], "short_side must be at least 1 pixel, got 0"),
        (["--num-workers=0"], 'num_workers must be "auto" or at least 1, got 0'),
        (["--shard-mb=0"], "shard_mb must be above 0, got 0"),
    ],
)
def test_arguments_out_of_range(images: Path, tmp_path: Path, words: list[str], message: str) -> None:
    outcome = cli("data", "shard", str(images), str(tmp_path / "out"), *words)
    assert outcome.code == 1
    assert message in outcome.err


def test_buckets_and_wrong_folders(images: Path, tmp_path: Path) -> None:
    assert "copy them into the bucket" in cli("data", "shard", str(images), "s3://bucket/x").err
    assert "root='nowhere' is not a folder" in cli("data", "shard", "nowhere", str(tmp_path / "out")).err
