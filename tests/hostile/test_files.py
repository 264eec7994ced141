"""Files and folders that nobody means: pipes, circles of links, hidden folders, names without an encoding."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.boxes import write_coco, write_voc
from helpers.cli import write_image_folder, write_images
from helpers.masks import write_ade, write_folder
from helpers.masks import write_voc as write_voc_masks
from PIL import Image

from lit_tricks.data import (
    ADE20KSegmentation,
    CocoDetection,
    ImageFolder,
    SegmentationFolder,
    VOCDetection,
    VOCSegmentation,
)
from lit_tricks.data.io import file_index
from lit_tricks.data.io.file_index import find_images, list_images
from lit_tricks.data.io.jpeg import read_image
from lit_tricks.data.segmentation.pairs import read_mask
from lit_tricks.utils.files import (
    abandoned,
    open_regular,
    printable,
    read_regular,
    text_cell,
    write_whole,
    written_whole,
)

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, links and bytes in names as POSIX has them")
HIDDEN = (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "@tmp")
LISTS = ["VOC2007/trainval", "VOC2007/test"]
DEAD = 2**22 + 1  # no process has this number: Linux counts to 2**22


def image_folder(root: Path, **arguments: Any) -> ImageFolder:
    return ImageFolder(str(root), image_size=8, batch_size=2, num_workers=0, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Pipes, devices and sockets


@pytest.fixture(params=["pipe", "socket", "device"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], None]:
    """Put something that is not a regular file in the place of one."""
    if os.name != "posix":
        pytest.skip("these are POSIX's")

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        else:
            before = Path.cwd()
            os.chdir(path.parent)  # such a path must be short
            try:
                server = socket.socket(socket.AF_UNIX)
                server.bind(path.name)
                server.close()
            finally:
                os.chdir(before)

    return make


@pytest.mark.timeout(60)
@pytest.mark.parametrize("split", ["train", "val", "predict"])
def test_an_image_that_is_no_file_is_named(split: str, odd: Any, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root")
    write_images(tmp_path / "photos", 2)
    odd({"train": root / "train/ant/0.jpg", "val": root / "val/ant/0.jpg", "predict": tmp_path / "photos/0.jpg"}[split])
    data = image_folder(root, predict_dir=str(tmp_path / "photos"))
    with pytest.raises(RuntimeError, match=r"0\.jpg"):
        list(getattr(data, f"{split}_dataloader")())


@pytest.mark.timeout(60)
def test_a_bad_image_that_is_no_file_is_skipped(odd: Any, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root")
    odd(root / "train/ant/0.jpg")
    data = image_folder(root, on_bad_image="skip")
    assert sum(len(batch[0]) for batch in data.train_dataloader()) == 12


@pytest.mark.timeout(60)
def test_a_shard_of_an_image_that_is_no_file_is_rejected(odd: Any, tmp_path: Path) -> None:
    from lit_tricks.commands.data import shard

    root = write_image_folder(tmp_path / "root")
    odd(root / "train/ant/0.jpg")
    with pytest.raises(RuntimeError, match=r"0\.jpg"):
        shard(str(root), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_pair_that_is_no_file_is_named(kind: str, odd: Any, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    name = "0.jpg" if kind == "images" else "0.png"
    odd(root / "val" / kind / name)
    data = SegmentationFolder(str(root), crop_size=8, batch_size=1, num_workers=0)
    with pytest.raises((RuntimeError, ValueError), match=name.replace(".", r"\.")):
        list(data.val_dataloader())


@pytest.mark.timeout(60)
def test_annotations_that_are_no_files_are_named(odd: Any, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    odd(root / "annotations" / "instances_val2017.json")
    with pytest.raises(OSError, match="instances_val2017"):
        CocoDetection(str(root))
    root = write_voc(tmp_path / "voc", LISTS)
    [xml, *_] = sorted((root / "VOC2007" / "Annotations").glob("*.xml"))
    odd(xml)
    data = VOCDetection(str(root), train=["VOC2007/trainval"], classes=["ant", "bee"], num_workers=0)
    with pytest.raises((OSError, ValueError), match=xml.stem):
        [data.source(split) for split in ("train", "val")]


@posix
def test_a_file_of_any_size_is_opened_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as stream:
        stream.truncate(2**40)  # takes no room
    with pytest.raises(OSError, match="large"):
        read_regular(path)
    with open_regular(path) as stream:
        assert stream.read(3) == b"\0\0\0"
    path.write_bytes(b"1234")
    assert read_regular(path, limit=4) == b"1234"
    with pytest.raises(OSError, match="4 bytes, more than 3"):
        read_regular(path, limit=3)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Links


@posix
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "links",
    [
        {"a/up": ".."},
        {"a/up": "..", "b/up": ".."},
        {"a/b": "../b", "b/a": "../a"},
        {f"{one}/{other}": f"../{other}" for one in "abcdefghij" for other in "abcdefghij" if one != other},
        {"a/itself": "itself"},
    ],
    ids=["up", "two up", "each other", "all of ten to each other", "itself"],
)
def test_an_image_is_found_once_whatever_links_there_are(links: dict[str, str], tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 1)
    for link, target in links.items():
        path = tmp_path / "photos" / link
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(target)
    assert find_images(str(tmp_path / "photos")) == ["0.jpg"]
    root = write_image_folder(tmp_path / "root")
    data = image_folder(root, predict_dir=str(tmp_path / "photos"))
    assert [path for _, paths in data.predict_dataloader() for path in paths] == [str(tmp_path / "photos" / "0.jpg")]


@posix
def test_a_class_folder_that_links_upwards_holds_its_own_images(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path)
    (root / "train" / "ant" / "all").symlink_to("..")
    paths, labels, _ = list_images(str(root / "train"))
    assert len(paths) == 12
    assert np.bincount(labels).tolist() == [4, 4, 4]


@posix
def test_a_folder_of_masks_that_links_upwards(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "train" / "images" / "up").symlink_to(".")
    data = SegmentationFolder(str(root), crop_size=8, batch_size=1, num_workers=0)
    assert len(data.source("train")) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is hidden


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_index, "_told", set())


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["train", "train/ant", "val", "val/ant"])
def test_a_hidden_folder_is_no_class_and_its_images_do_not_count(where: str, name: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path)
    write_images(root / where / name, 2)
    data = image_folder(root)
    assert data.classes == ["ant", "bee", "cow"]
    assert (len(data.source("train")), len(data.source("val"))) == (12, 6)


@pytest.mark.parametrize("name", [*HIDDEN, "._0.jpg", ".hidden.png"])
def test_what_is_hidden_is_not_predicted(name: str, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 2)
    if name.endswith((".jpg", ".png")):
        (tmp_path / "photos" / name).write_bytes(b"\0\5\x16\7")  # as macOS writes them
    else:
        write_images(tmp_path / "photos" / name / "deep", 1)
    assert find_images(str(tmp_path / "photos")) == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("name", ["._0.jpg", ".ipynb_checkpoints/0.jpg", "__MACOSX/0.jpg", "@eaDir/0.jpg/thumb.jpg"])
def test_what_is_hidden_is_no_image_of_a_mask_nor_of_boxes(name: str, tmp_path: Path) -> None:
    def hide(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")

    root = write_folder(tmp_path / "own")
    hide(root / "train" / "images")
    hide(root / "val" / "masks")
    data: Any = SegmentationFolder(str(root), crop_size=8, batch_size=1, num_workers=0)
    assert (len(data.source("train")), len(data.source("val"))) == (4, 2)
    root = write_voc_masks(tmp_path / "voc")
    hide(root / "JPEGImages")
    assert len(VOCSegmentation(str(root), num_workers=0).source("val")) == 2
    root = write_ade(tmp_path / "ade")
    hide(root / "images" / "training")
    assert len(ADE20KSegmentation(str(root), num_workers=0).source("train")) == 2
    root = write_voc(tmp_path / "boxes", LISTS)
    hide(root / "VOC2007" / "JPEGImages")
    data = VOCDetection(str(root), train=["VOC2007/trainval"], classes=["ant", "bee"], num_workers=0)
    assert len(data.source("val")) == 3


def test_what_is_hidden_is_logged_once_with_its_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_image_folder(tmp_path)
    write_images(root / "train" / ".ipynb_checkpoints", 3)
    (root / "train" / "ant" / "._0.jpg").touch()
    (root / "train" / "ant" / ".DS_Store").touch()  # no image
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            list_images(str(root / "train"))
            list_images(str(root / "val"))
    lines = [line for line in caplog.messages if "hidden" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{root / 'train'}: 2 hidden")


def test_what_is_hidden_stays_hidden_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_TRICKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_index, "REMEMBER_FROM", 1)
    monkeypatch.setattr(file_index, "SETTLED", -3600.0)
    root = write_image_folder(tmp_path / "root")
    write_images(root / "train" / "ant" / "@eaDir", 1)
    first = list(list_images(str(root / "train"))[0])
    monkeypatch.setattr(file_index, "_told", set())
    monkeypatch.setattr(os, "scandir", lambda path: pytest.fail(f"{path} was read again"))
    assert list(list_images(str(root / "train"))[0]) == first
    assert {count for _, count in file_index._told} == {1}


@pytest.mark.parametrize("folder", [["..", 1], ["a/b", 0], ["", 0], ["ant", 7]])
def test_a_cache_that_cannot_be_right_is_not_used(folder: list[Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LIT_TRICKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_index, "REMEMBER_FROM", 1)
    monkeypatch.setattr(file_index, "SETTLED", -3600.0)
    root = write_image_folder(tmp_path / "root") / "train"
    expected = list(list_images(str(root))[0])
    [cache] = (tmp_path / "cache").iterdir()
    head, _, text = cache.read_bytes().partition(b"\n")
    content = json.loads(head)
    name, count = folder
    [entry] = [each for each in content["folders"] if each[0] == ("ant" if name == "ant" else "")]
    if name == "ant":
        entry[2] = count  # more images than names
    else:
        entry[3].append(name)
    cache.write_bytes(json.dumps(content).encode() + b"\n" + text)
    assert list(list_images(str(root))[0]) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Names that are not UTF-8


@pytest.fixture
def raw() -> str:
    """A name of bytes that are no UTF-8."""
    name = os.fsdecode(b"z\xff\xfe")
    if os.name != "posix":
        pytest.skip("Windows has no such names")
    return name


def test_a_class_folder_without_an_encoding_has_a_name_that_can_be_written(raw: str, tmp_path: Path) -> None:
    root = write_image_folder(tmp_path, classes=("ant", raw))
    data = image_folder(root)
    assert data.classes == ["ant", "z\\xff\\xfe"]
    labels = [label for batch in data.val_dataloader() for label in batch[1].tolist()]
    assert sorted(labels) == [0, 0, 1, 1]
    for file in (root / "train" / raw).iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"z\\xff\\xfe"):
        image_folder(root).source("train")


def test_shards_of_files_without_an_encoding(raw: str, tmp_path: Path) -> None:
    from lit_tricks.commands.data import shard
    from lit_tricks.data import Streaming

    root = write_image_folder(tmp_path / "root", classes=("ant", raw))
    (root / "train" / "ant" / "0.jpg").rename(root / "train" / "ant" / f"{raw}.jpg")
    shard(str(root), str(tmp_path / "out"))
    data: Any = Streaming(str(tmp_path / "out"), image_size=8, batch_size=2, num_workers=0)
    assert data.classes == ["ant", "z\\xff\\xfe"]
    names = {data.source("train").item(i)[2] for i in range(8)}
    assert "ant/z\\xff\\xfe.jpg" in names


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain.jpg", "plain.jpg"),
        ("é画.jpg".encode(), "é画.jpg"),
        (b"z\xff\xfe.jpg", "z\\xff\\xfe.jpg"),
        (b"\x80", "\\x80"),
    ],
)
def test_undecodable_names_are_printable(name: bytes, shown: str) -> None:
    assert printable(os.fsdecode(name)) == shown
    assert printable("\ud800") == "\\ud800"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x")'])
def test_formulas_become_text(text: str) -> None:
    assert text_cell(text) == f"'{text}"
    file = io.StringIO()
    csv.writer(file).writerow([text_cell(text)])
    assert next(csv.reader(io.StringIO(file.getvalue(), newline="")))[0][0] == "'"


@pytest.mark.parametrize("text", ["ant", "a=b", "1", "", "é", "a,b", '"'])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert text_cell(text) == text


# ---------------------------------------------------------------------------------------------------------------------
# Files are written whole


def test_a_file_is_there_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    target.write_text("good")
    with written_whole(target) as part:
        part.write_text("half")
        assert target.read_text() == "good"
        assert part.parent == tmp_path  # renaming needs one file system
    assert target.read_text() == "half"
    assert list(tmp_path.iterdir()) == [target]
    with contextlib.suppress(KeyboardInterrupt), written_whole(target) as part:
        part.write_text("never")
        raise KeyboardInterrupt
    assert target.read_text() == "half"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_content_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, synced = tmp_path / "results.json", []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, target.exists())))
    write_whole(target, "content")
    assert synced == [(target.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    write_whole(target, "other", durable=False)
    assert len(synced) == 2


@posix
def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "report.md").symlink_to(victim)
    (tmp_path / f".report.md.{os.getpid()}.part").symlink_to(victim)
    write_whole(tmp_path / "report.md", "report")
    assert victim.read_text() == "precious"
    assert (tmp_path / "report.md").read_text() == "report"
    assert not (tmp_path / "report.md").is_symlink()


@posix
def test_a_pipe_or_device_is_not_written_over(odd: Any, tmp_path: Path) -> None:
    odd(tmp_path / "out.csv")
    with pytest.raises(OSError, match=r"out\.csv"):
        write_whole(tmp_path / "out.csv", "text")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full, as Linux has it")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    target.write_text("good")
    with pytest.raises(OSError, match=r"No space left on device.*results\.json"):  # noqa: PT012, SIM117
        with written_whole(target) as part:
            part.unlink()
            part.symlink_to("/dev/full")
            part.write_text("text")
    assert target.read_text() == "good"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_only_what_dead_processes_left_is_abandoned(tmp_path: Path) -> None:
    for name in (f".a.{DEAD}.part", f".a.{os.getpid()}.part", ".a.part", f".b.{DEAD}.part", f".a.{DEAD}.part.bak"):
        (tmp_path / name).touch()
    assert [path.name for path in abandoned(tmp_path / "a")] == [f".a.{DEAD}.part"]
    (tmp_path / f"out.incomplete-{DEAD}").mkdir()
    (tmp_path / "out.incomplete-mine").mkdir()
    assert [path.name for path in abandoned(tmp_path / "out", "incomplete")] == [f"out.incomplete-{DEAD}"]


# ---------------------------------------------------------------------------------------------------------------------
# 16-bit PGM


@pytest.mark.parametrize("maximum", [65535, 1023, 256])
@pytest.mark.parametrize("plain", [False, True])
def test_grey_images_of_16_bits(maximum: int, plain: bool, tmp_path: Path) -> None:
    values = np.linspace(0, maximum, 64 * 16).round().astype(">u2").reshape(16, 64)
    head = f"P{2 if plain else 5}\n# a comment\n64 16\n{maximum}\n".encode()
    body = " ".join(map(str, values.ravel())).encode() if plain else values.tobytes()
    path = tmp_path / "g.pgm"
    path.write_bytes(head + body)
    expected = (values.astype(float) / maximum * 65535).round().astype(int) >> 8
    found = np.asarray(read_image(str(path)))
    assert found.shape == (16, 64, 3)
    assert np.array_equal(found[..., 0], expected)
    Image.fromarray((values.astype(float) / maximum * 65535).round().astype(np.uint16)).save(tmp_path / "g.png")
    assert np.array_equal(found, np.asarray(read_image(str(tmp_path / "g.png"))))  # as all other files of 16 bits


@pytest.mark.parametrize(("maximum", "kind"), [(3, "u1"), (255, "u1"), (300, ">u2"), (65535, ">u2")])
def test_labels_of_a_grey_file_are_its_values(maximum: int, kind: str, tmp_path: Path) -> None:
    labels = np.arange(4, dtype=kind).reshape(2, 2)
    path = tmp_path / "m.pgm"
    path.write_bytes(f"P5\n2 2\n{maximum}\n".encode() + labels.tobytes())
    assert read_mask(str(path)).tolist() == [[0, 1], [2, 3]]
