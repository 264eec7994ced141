"""``lit-tricks data check``: each kind of finding, the table, the picture, JSON, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli import Outcome, cli, done, workplace, write_image_folder, write_images
from PIL import Image

from lit_tricks.commands.data import check
from lit_tricks.commands.data.checking.image_facts import ODDITIES, facts_of
from lit_tricks.data import ImageFolder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


def found() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path("check.json").read_text())
    return result


def findings(words: tuple[str, ...] = ("photos",), code: int = 0) -> dict[str, Any]:
    """Run a check, and return its findings by kind."""
    outcome = cli("data", "check", *words, "--num_workers=0")
    assert outcome.code == code, outcome
    return {finding["kind"]: finding for finding in found()["findings"]}


def noise(*shape: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_a_good_folder(folder: Path) -> None:
    write_image_folder(folder / "photos")
    before = sorted(folder.rglob("*"))
    outcome = done("data", "check", "photos", "--num_workers=0")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["class", "train", "val"]
    assert ["ant", "4", "2"] in lines
    assert ["total", "12", "6"] in lines
    assert ["short", "side", "20", "20", "20", "20", "20"] in lines
    assert "no faults" in outcome.out
    assert found()["splits"] == {"train": 12, "val": 6, "test": 0}
    assert found()["sizes"]["width"] == dict.fromkeys(("0.0", "0.05", "0.5", "0.95", "1.0"), 24.0)
    assert found()["findings"] == []
    with Image.open("check.png") as image:
        assert min(image.size) > 400
    assert {*folder.rglob("*")} - {*before} == {folder / "check.png", folder / "check.json"}


@pytest.mark.slow
def test_several_processes_find_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image_folder(folder / "photos")
    (folder / "photos" / "train" / "ant" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    monkeypatch.setattr("lit_tricks.commands.data.checking.image_facts.FILES_PER_WORKER", 5)
    results = []
    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="1 faults would stop a run"):
            check("photos", num_workers=workers)
        results.append(found())
    assert results[0] == results[1]


def test_json_goes_to_standard_output(folder: Path) -> None:
    write_image_folder(folder / "photos")
    outcome: Outcome = done("data", "check", "photos", "--json", "--out=x.png", "--num_workers=0")
    assert json.loads(outcome.out) == json.loads(Path("x.json").read_text())
    assert json.loads(outcome.out)["classes"]["bee"] == {"train": 4, "val": 2, "test": 0}


@pytest.mark.slow
def test_a_flat_folder_is_checked_as_it_will_be_held_out(folder: Path) -> None:
    write_images(folder / "photos" / "ant", 3)
    write_images(folder / "photos" / "bee", 1, seed=1)
    assert "1 image" not in str(findings(code=1)["structure"]["text"])
    assert "val_fraction=0.2 needs two: 'bee'" in findings(code=1)["structure"]["text"]
    write_images(folder / "photos" / "bee", 3, seed=1)
    assert findings() == {}
    assert not list(Path("photos").glob("*.csv"))
    ImageFolder("photos", batch_size=2, num_workers=0, val_fraction=0.2).setup("fit")
    assert findings() == {}  # the file with the split is no odd file
    assert "val_fraction" in findings(("photos", "--val_fraction=null"), code=1)["structure"]["text"]


def test_faults_of_folders(folder: Path) -> None:
    root = write_image_folder(folder / "photos")
    shutil.rmtree(root / "val" / "ant")
    (root / "val" / "ant").mkdir()
    outcome = cli("data", "check", "photos", "--num_workers=0")
    assert outcome.code == 1
    assert "fault: structure: val has class folders without images: 'ant'" in outcome.out
    assert outcome.err.startswith("lit-tricks: error: data check photos: 1 faults")
    (root / "val" / "ant").rmdir()
    assert "differ: only in train: ant" in findings(code=1)["structure"]["text"]


def test_files_that_cannot_be_read(folder: Path) -> None:
    root = write_image_folder(folder / "photos") / "train" / "ant"
    image = noise(40, 40, 3)
    image.save(root / "x.jpg")
    image.save(root / "x.png")
    (root / "cut.jpg").write_bytes((root / "x.jpg").read_bytes()[:800])
    (root / "cut.png").write_bytes((root / "x.png").read_bytes()[:800])
    (root / "empty.webp").touch()
    (root / "text.gif").write_text("no image")
    (root / "gone.bmp").symlink_to("nowhere")
    os.mkfifo(root / "pipe.jpg")
    unreadable = findings(code=1)["unreadable"]
    names = [text.partition(" (")[0] for text in unreadable["files"]]
    bad = ["cut.jpg", "cut.png", "empty.webp", "gone.bmp", "pipe.jpg", "text.gif"]
    assert sorted(names) == [f"train/ant/{name}" for name in bad]
    assert (unreadable["level"], unreadable["count"]) == ("fault", 6)
    assert all(text.endswith(")") and "()" not in text for text in unreadable["files"])


def test_equal_images_are_found_across_splits(folder: Path) -> None:
    root = write_image_folder(folder / "photos")
    noise(30, 30, 3).save(root / "train" / "ant" / "x.png")
    for place in ("train/ant/copy.png", "val/ant/other.png", "train/bee/labeled.png"):
        shutil.copy(root / "train" / "ant" / "x.png", root / place)
    noise(30, 31, 3, seed=1).save(root / "train" / "cow" / "y.png")
    noise(30, 31, 3, seed=1).save(root / "train" / "cow" / "y.bmp")
    kinds = findings()
    assert kinds["duplicates across splits"]["level"] == "warning"
    assert "val/ant/other.png" in kinds["duplicates across splits"]["files"][0]
    assert kinds["conflicting labels"]["files"][0].endswith("(same file)")
    assert kinds["duplicates"]["files"] == ["train/cow/y.bmp = train/cow/y.png (same pixels)"]


def odd_images(root: Path) -> dict[str, str]:
    """Write one image of each odd kind, and return their names."""
    root.mkdir(parents=True, exist_ok=True)
    image = noise(20, 24, 3, seed=9)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "liar.jpg", format="PNG")
    image.convert("CMYK").save(root / "print.jpg")
    Image.fromarray((np.arange(400, dtype=np.uint16) * 90).reshape(20, 20)).save(root / "deep.png")
    noise(1, 1, 3).save(root / "dot.png")
    noise(24, 20, 3).save(root / "moving.gif", save_all=True, append_images=[noise(24, 20, 3, seed=1)])
    image.rotate(90).save(root / "phone.jpg", exif=exif)
    noise(20, 20, 4).save(root / "hole.png")
    names = ("liar.jpg", "print.jpg", "deep.png", "dot.png", "moving.gif", "phone.jpg", "hole.png")
    return dict(zip(ODDITIES, names, strict=True))


def test_odd_formats_are_counted(folder: Path) -> None:
    root = write_image_folder(folder / "photos")
    names = odd_images(root / "train" / "ant")
    kinds = findings()
    assert {kind: kinds[kind]["files"] for kind in ODDITIES} == {
        kind: [f"train/ant/{name}"] for kind, name in names.items()
    }
    assert "--data.exif true" in kinds["EXIF orientation"]["text"]


def test_a_png_of_16_bits_in_colors(folder: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(6 * 9) for _ in range(9))
    head = struct.pack(">IIBBBBB", 9, 9, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    Path("deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    facts = facts_of("deep.png")
    assert (facts.width, facts.oddities) == (9, 1 << [*ODDITIES].index("16 bit"))


def test_what_is_not_read(folder: Path) -> None:
    root = write_image_folder(folder / "photos")
    write_images(root / "train" / ".hidden", 1)
    write_images(root / "train" / "ant" / "__MACOSX", 1)
    write_images(root / "extra" / "ant", 1, seed=7)
    shutil.copy(root / "train/ant/0.jpg", root / "train/ant/._0.jpg")
    shutil.copy(root / "train/ant/0.jpg", root / "train/loose.jpg")
    (root / "train" / "ant" / "raw.cr2").touch()
    kinds = findings()
    assert sorted(kinds["hidden"]["files"]) == ["train/.hidden", "train/ant/._0.jpg", "train/ant/__MACOSX"]
    assert sorted(kinds["unused images"]["files"]) == ["extra/ant/0.jpg", "train/loose.jpg"]
    assert kinds["other files"]["files"] == ["train/ant/raw.cr2"]
    assert {*kinds} == {"hidden", "unused images", "other files"}


def test_imbalance_and_similar_classes_are_found(folder: Path) -> None:
    write_images(folder / "photos" / "Ant lion", 45)
    write_images(folder / "photos" / "ant-lion", 4, seed=1)
    kinds = findings()
    assert "11 times" in kinds["imbalance"]["text"]
    assert "Ant lion / ant-lion" in kinds["similar classes"]["text"]


@pytest.mark.slow
def test_many_classes_and_terminal_escapes(folder: Path) -> None:
    for number in range(40):
        write_images(folder / "photos" / f"class {number:02}", 2, seed=number)
    write_images(folder / "photos" / "\x1b[31mred\n", 2, seed=99)
    outcome = done("data", "check", "photos", "--num_workers=0")
    assert "... 11 more" in outcome.out
    assert "\x1b" not in outcome.out
    assert len(outcome.out.splitlines()) < 50


@pytest.mark.slow
def test_table_is_checked_like_a_folder(folder: Path) -> None:
    write_images(folder / "photos", 6)
    rows = [
        f"{number}.jpg,{name},{split}"
        for number, name, split in zip(range(6), "abaabb", ["train"] * 3 + ["val"] * 3, strict=True)
    ]
    table = folder / "photos" / "labels.csv"
    table.write_text("\n".join(["file,label,split", *rows]))
    assert findings((str(table),)) == {}
    assert found()["splits"] == {"train": 3, "val": 3, "test": 0}
    wrong = ["gone.jpg,a,train", "0.jpg,b,train", "1.jpg,,val", "2.jpg,a,extra", "../x.jpg,a,train", "3.jpg"]
    table.write_text("\n".join(["file,label,split", *rows, *wrong]))
    outcome = cli("data", "check", str(table), "--num_workers=0")
    assert outcome.code == 1
    faults = [finding for finding in found()["findings"] if finding["level"] == "fault"]
    assert [fault["kind"] for fault in faults] == ["structure"] * 5 + ["unreadable"]
    for fault, text in zip(
        faults, ["has the label 'b'", "'label' is empty", "'extra'", "outside of", "has 1 cells"], strict=False
    ):
        assert text in fault["text"], fault
    assert faults[-1]["files"] == ["gone.jpg (No such file or directory)"]
    table.write_text("\n".join(["file,label,split", "0.jpg,a,train", "1.jpg,b,train", "2.jpg,a,val"]))
    kinds = findings((str(table),))
    assert kinds["missing classes"]["text"].startswith("val has no image of them: b")
    assert kinds["unused images"]["count"] == 3


@pytest.mark.parametrize(
    ("words", "code", "token"),
    [
        (("nowhere",), 1, "no such folder or file"),
        (("photos", "--out=x.jpg"), 1, "does not end in .png"),
        (("photos", "--out=no/x.png"), 1, "folder that does not exist"),
        (("photos", "--val_fraction=2"), 1, "val_fraction=2"),
        (("photos", "--num_workers=-1"), 1, "num_workers=-1"),
        (("photos", "--jsn"), 2, "jsn"),
        ((), 2, "needs ROOT"),
    ],
)
def test_wrong_words_end_with_one_line(folder: Path, words: tuple[str, ...], code: int, token: str) -> None:
    (folder / "photos").mkdir()
    outcome = cli("data", "check", *words)
    assert (outcome.code, outcome.err.count("\n")) == (code, 1), outcome
    assert token in outcome.err
    assert not Path("check.json").exists()


def test_an_empty_folder(folder: Path) -> None:
    (folder / "photos").mkdir()
    assert "no class folder" in findings(code=1)["structure"]["text"]
    assert found()["images"] == 0
