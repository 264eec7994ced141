"""Files of ``predict``: never over images or files of the user, and without text that a spreadsheet runs."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_tricks.run.mask_writer import MaskWriter
from lit_tricks.run.tables import check_table, write_table

COLUMNS = {"file": "", "label1": "", "probability1": ".6f", "error": ""}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in ``photos`` and ``photos/deep``."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.jpg", "deep/c.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), 77, np.uint8)).save(path)
    return Path("photos")


def masks_of(folder: str | Path, root: Path) -> MaskWriter:
    """Write a mask for each image."""
    files = {str(path): str(root) for path in sorted(root.rglob("*")) if path.is_file()}
    writer, trainer = MaskWriter(folder, files), SimpleNamespace()
    module: Any = SimpleNamespace(class_names=["ground", "cell"])
    writer.on_predict_start(trainer, module)  # type: ignore[arg-type]
    for file in files:
        labels = torch.ones(1, 2, 3, dtype=torch.uint8)
        writer.on_predict_batch_end(trainer, module, labels, (None, [file]), 0)  # type: ignore[arg-type]
    return writer


def content(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_masks_are_written_beside_the_images(photos: Path) -> None:
    before = content(photos)
    masks_of("masks", photos)
    assert {str(path) for path in Path("masks").rglob("*.png")} == {"masks/a.png", "masks/b.png", "masks/deep/c.png"}
    with Image.open("masks/a.png") as mask:
        assert (mask.size, np.unique(np.asarray(mask)).tolist()) == ((6, 4), [1])
    assert content(photos) == before


@pytest.mark.parametrize("folder", ["photos", "./photos", "photos/../photos", "absolute", "link"])
def test_masks_never_replace_the_images_that_are_read(folder: str, photos: Path) -> None:
    Path("link").symlink_to("photos")
    before = content(photos)
    with pytest.raises(FileExistsError, match="choose another --output"):
        masks_of(photos.absolute() if folder == "absolute" else folder, photos)
    assert content(photos) == before


@pytest.mark.parametrize("there", ["file", "link", "dangling link", "linked folder", "masks of an earlier run"])
def test_masks_replace_no_file_and_follow_no_link(there: str, photos: Path) -> None:
    Path("masks").mkdir()
    Path("precious").mkdir()
    Path("precious/c.png").write_text("precious")
    if there == "file":
        Path("masks/a.png").write_text("corrected by hand")
    elif there == "link":
        Path("masks/a.png").symlink_to("../precious/c.png")
    elif there == "dangling link":
        Path("masks/a.png").symlink_to("../precious/new.png")
    elif there == "linked folder":
        Path("masks/deep").symlink_to("../precious")
    else:
        masks_of("masks", photos)
    before = content(Path())
    with pytest.raises(FileExistsError, match=r"masks/(a|deep/c)\.png"):
        masks_of("masks", photos)
    assert content(Path()) == before
    assert not Path("precious/new.png").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "image,label\n1.jpg,cat\n"),
        ("photo.csv", "\x89PNG"),
        ("settings.json", '{"lr": 0.1}'),
        ("log.jsonl", '{"epoch": 1}\n'),
        ("data.parquet", "PAR1"),
        ("notes", "read me"),
    ],
)
def test_a_table_replaces_only_tables_of_predictions(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FileExistsError, match="not a table of predictions"):
        check_table(str(path))
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.jsonl", "p.parquet", "p"])
def test_a_table_of_an_earlier_run_is_replaced(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    for probability in (0.5, 0.25):
        check_table(path)
        write_table(path, COLUMNS, [["a.jpg", "cat", probability, None]])
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    if name == "p.csv":
        assert Path(path).read_text().splitlines()[1] == "a.jpg,cat,0.250000,"


@pytest.mark.parametrize("where", ["class", "file", "error"])
@pytest.mark.parametrize("text", ['=HYPERLINK("http://evil","x")', "+1+1", "-1+1", "@SUM(1)", "=cmd|' /C calc'!A0"])
def test_cells_that_would_be_formulas_are_text(text: str, where: str, tmp_path: Path) -> None:
    row = [text if where == "file" else "a.jpg", text if where == "class" else "cat", -0.5, None]
    row[3] = text if where == "error" else None
    write_table(str(tmp_path / "p.csv"), COLUMNS, [row])
    with (tmp_path / "p.csv").open(newline="") as stream:
        [found] = csv.DictReader(stream)
    key = {"class": "label1", "file": "file", "error": "error"}[where]
    assert found[key] == f"'{text}"
    assert found["probability1"] == "-0.500000", "a number is no formula"
    write_table(str(tmp_path / "p.json"), COLUMNS, [row])
    assert json.loads((tmp_path / "p.json").read_text())[0][key] == text, "JSON has no formulas"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.jsonl", "p.parquet"])
def test_a_name_without_an_encoding_loses_no_predictions(name: str, tmp_path: Path) -> None:
    rows = [[file, "cat", 0.5, None] for file in ("a.jpg", os.fsdecode(b"z\xff\xfe.jpg"), "b.jpg")]
    path = tmp_path / name
    if name.endswith(".parquet"):
        from pyarrow import parquet

        write_table(str(path), COLUMNS, rows)
        assert parquet.read_table(path).column("file").to_pylist() == ["a.jpg", "z\\xff\\xfe.jpg", "b.jpg"]
        return
    write_table(str(path), COLUMNS, rows)
    assert path.read_bytes().count(b".jpg") == 3
