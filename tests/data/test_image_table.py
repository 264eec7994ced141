"""Images whose labels are in a table: the same batches as from folders, and a message for each fault of a table."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import FIT, QUIET, built, checkpoint, cli, done, metrics, workplace, write_image_folder, write_images
from PIL import Image

from lit_tricks import LinearScaling
from lit_tricks.commands.data import shard
from lit_tricks.data import ImageFolder, ImageTable
from lit_tricks.data.datamodule import ImageDataModule, Split
from lit_tricks.utils.files import write_whole

OPTIONS: dict[str, Any] = {"image_size": 16, "batch_size": 4, "num_workers": 0}
ROWS = {"a.jpg": "ant", "b.jpg": "bee", "c.jpg": "ant", "d.jpg": "bee", "e.jpg": "ant", "f.jpg": "bee"}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def table(path: Path, text: str | bytes) -> str:
    """Write a table, and the images in ``ROWS`` to the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        if not (path.parent / name).exists():
            Image.new("RGB", (8, 8)).save(path.parent / name)
    write_whole(path, text)
    return str(path)


def csv_of(rows: dict[str, str], header: str = "file,label") -> str:
    return "\n".join([header, *(f"{file},{label}" for file, label in rows.items())])


def files(data: ImageDataModule, split: Split) -> dict[str, str]:
    source: Any = data.source(split)
    paths = [os.path.relpath(path, data.root) for path in source.paths]  # type: ignore[attr-defined]
    return {path: data.classes[label] for path, label in zip(paths, source.labels.tolist(), strict=True)}


def make(text: str | bytes, root: Path, name: str = "labels.csv", **options: Any) -> ImageTable:
    return ImageTable(table(root / name, text), **OPTIONS | {"val_fraction": 0.3} | options)


# As ImageFolder


@pytest.mark.parametrize("cache", [None, "memory"])
@pytest.mark.parametrize("held_out", [False, True])
def test_batches_are_those_of_the_folder(tmp_path: Path, held_out: bool, cache: Any) -> None:
    root = write_image_folder(tmp_path / "images")
    flat = root / "train"
    if held_out:
        paths = sorted(flat.rglob("*.jpg"), reverse=True)
        rows = [f"{path.relative_to(flat)},{path.parent.name}" for path in paths]
        made = ImageFolder(str(flat), **OPTIONS, val_fraction=0.25, cache=cache)
        text, base = "\n".join(["image,species", *rows]), flat
    else:
        paths = sorted(root.rglob("*.jpg"), key=lambda path: path.name)
        rows = [f"{path.relative_to(root)},{path.parent.name},{path.parts[-3]}" for path in paths]
        made = ImageFolder(str(root), **OPTIONS, cache=cache)
        text, base = "\n".join(["image,species,split", *rows]), root
    write_whole(base / "labels.csv", text)
    options = {"label_column": "species", "val_fraction": 0.25 if held_out else None, "cache": cache}
    found = ImageTable(str(base / "labels.csv"), **OPTIONS, **options)
    assert found.classes == made.classes == ["ant", "bee", "cow"]
    assert not found.has_test
    for data in (found, made):
        torch.manual_seed(3)
        data.setup("fit")
    for split in ("train", "val"):
        ours, theirs = (list(getattr(data, f"{split}_dataloader")()) for data in (found, made))
        assert len(ours) == len(theirs) > 0
        for left, right in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, left, right))


def test_validation_images_are_held_out_for_good(tmp_path: Path) -> None:
    data = make(csv_of(ROWS), tmp_path)
    assert len(files(data, "train")) == 4
    val = files(data, "val")
    assert sorted(val.values()) == ["ant", "bee"]
    assert (tmp_path / "labels_split_0.3_0.csv").is_file()
    more = {f"{number}.jpg": "ant" for number in range(10)}
    for name in more:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert val.items() <= files(make(csv_of(more | ROWS), tmp_path), "val").items()
    assert len(files(make(csv_of(more | ROWS), tmp_path), "val")) == 4 + 1
    assert (tmp_path / "labels.csv").exists()


# What is read


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (csv_of(ROWS), {}),
        (csv_of(ROWS, "File Name,Class"), {}),
        (csv_of(ROWS, "label,file"), {"file_column": "label", "label_column": "file"}),
        (csv_of(ROWS, "picture,what"), {}),
        (csv_of(ROWS).replace(",", ";"), {}),
        (csv_of(ROWS).replace(",", "\t"), {}),
        (csv_of(ROWS).replace(",", "|"), {}),
        ("\n\n" + csv_of(ROWS).replace("\n", "\r\n\r\n"), {}),
        (csv_of(ROWS).replace("\n", "\r"), {}),
        ("\ufeff" + csv_of(ROWS), {}),
        (csv_of({f"  ./x/../{file}": f" {label} " for file, label in ROWS.items()}), {}),
        (csv_of({f'"{file}"': f'"{label}"' for file, label in ROWS.items()}), {}),
        (csv_of(ROWS | {"./a.jpg": "ant"}), {}),
        ("\n".join(["id,file,label,note", *(f'{i},{f},{c},"x, y"' for i, (f, c) in enumerate(ROWS.items()))]), {}),
        ("\n".join(["file,label,split", *(f"{f},{c}," for f, c in ROWS.items())]), {"split_column": None}),
    ],
)
def test_forms_of_csv(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    data = make(text, tmp_path, **options)
    assert files(data, "train") | files(data, "val") == ROWS


def test_json_lines_and_numbers(tmp_path: Path) -> None:
    numbers = dict(zip(ROWS, (10, 9, 10, 9, 10, 9), strict=True))
    text = "\n".join(json.dumps({"file_name": file, "label": label}) for file, label in numbers.items())
    data = make(text + "\n\n", tmp_path, "x.jsonl")
    assert data.classes == ["9", "10"]
    assert files(data, "train") | files(data, "val") == {file: str(label) for file, label in numbers.items()}
    data = make(text, tmp_path, "x.jsonl", classes=["10", "9"])
    assert files(data, "train") | files(data, "val") == {file: str(label) for file, label in numbers.items()}
    with pytest.raises(ValueError, match="only in classes: 11"):
        make(text, tmp_path, "x.jsonl", classes=["10", "9", "11"])


@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "Validation", "TEST")])
def test_a_column_gives_the_splits(tmp_path: Path, words: tuple[str, str, str]) -> None:
    split_of = dict(zip(ROWS, [words[0], words[0], words[1], words[1], words[2], words[2]], strict=True))
    text = "\n".join(["file,label,subset", *(f"{f},{c},{split_of[f]}" for f, c in ROWS.items())])
    data = make(text, tmp_path, val_fraction=None)
    assert data.has_test
    assert [sorted(files(data, split)) for split in SPLITS] == [
        ["a.jpg", "b.jpg"],
        ["c.jpg", "d.jpg"],
        ["e.jpg", "f.jpg"],
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("where", ["root", "splits"])
def test_layout_of_hugging_face(tmp_path: Path, where: str, kind: str) -> None:
    expected: dict[str, dict[str, str]] = {}
    rows: dict[Path, list[tuple[str, str]]] = {}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        expected[split] = {f"{name}/{file}": label for file, label in ROWS.items()}
        table(tmp_path / name / "x", "")
        (tmp_path / name / "x").unlink()
        folder, prefix = (tmp_path, f"{name}/") if where == "root" else (tmp_path / name, "")
        rows.setdefault(folder, []).extend((prefix + file, label) for file, label in ROWS.items())
    for folder, pairs in rows.items():
        text = csv_of(dict(pairs), "file_name,label")
        if kind == "jsonl":
            text = "\n".join(json.dumps({"file_name": file, "label": label}) for file, label in pairs)
        (folder / f"metadata.{kind}").write_text(text)
    data = ImageTable(str(tmp_path), **OPTIONS)
    assert data.has_test
    assert {split: files(data, split) for split in SPLITS} == expected


def test_a_folder_without_splits(tmp_path: Path) -> None:
    table(tmp_path / "metadata.csv", csv_of(ROWS, "file_name,label"))
    data = ImageTable(str(tmp_path), **OPTIONS, val_fraction=0.3)
    assert files(data, "train") | files(data, "val") == ROWS
    assert (tmp_path / "metadata_split_0.3_0.csv").is_file()
    with pytest.raises(FileNotFoundError, match=r"--data ImageTable --data\.table"):
        ImageFolder(str(tmp_path))


def test_the_root_may_be_elsewhere(tmp_path: Path) -> None:
    table(tmp_path / "images" / "unused.csv", "")
    path = tmp_path / "tables" / "labels.csv"
    path.parent.mkdir()
    for rows in (ROWS, {str(tmp_path / "images" / file): label for file, label in ROWS.items()}):
        path.write_text(csv_of(rows))
        data = ImageTable(str(path), str(tmp_path / "images"), **OPTIONS, val_fraction=0.3)
        assert files(data, "train") | files(data, "val") == ROWS
    assert (tmp_path / "tables" / "labels_split_0.3_0.csv").is_file()


# What is wrong with a table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("file,label\n", "no rows"),
        ("a.jpg,ant\nb.jpg,bee", "line 1 has no names of columns"),
        ("file,label,file\na.jpg,ant,x", "several columns 'file'"),
        ("x,y,z\n1,2,3", "--data.file_column, one of 'x', 'y', 'z'"),
        ("file,x,y\na.jpg,1,2", "--data.label_column, one of 'file', 'x', 'y'"),
        (csv_of(ROWS | {"a.jpg ": "bee"}), r"line 8: 'a.jpg' has the label 'bee', and 'ant' in labels.csv line 2"),
        ("file,label,split\na.jpg,ant,train\n./a.jpg,ant,val", "has the split 'val', and 'train'"),
        (csv_of(ROWS | {"g.jpg": ""}), "line 8: 'label' is empty"),
        (csv_of(ROWS | {"g.jpg": "  "}), "line 8: 'label' is empty"),
        (csv_of(ROWS | {"": "ant"}), "line 8: 'file' is empty"),
        ("file,label,split\na.jpg,ant,train\nb.jpg,ant,extra", "line 3: the split 'extra' is unknown"),
        ("file,label,split\na.jpg,ant,", "'split' is empty"),
        (csv_of(ROWS | {"../a.jpg": "ant"}), r"line 8: '\.\./a\.jpg' is outside of .*--data\.root"),
        (csv_of(ROWS | {"x/../../a.jpg": "ant"}), "outside of"),
        (csv_of(ROWS | {"/etc/passwd": "ant"}), "outside of"),
        (csv_of(ROWS | {".": "ant"}), "outside of"),
        (csv_of(ROWS | {"a\0b.jpg": "ant"}), "line 8.*characters that no file name has"),
        (csv_of(ROWS) + "\nx.jpg", "line 8 has 1 cells, and the header 2"),
        (csv_of(ROWS) + "\nx.jpg,a,b", "line 8 has 3 cells"),
        (csv_of(ROWS) + '\n"x.jpg,ant', "Repair the quotes"),
        (csv_of(ROWS).encode() + b"\nx.jpg,\xe4nt", "line 8: the text is not UTF-8"),
        (csv_of(ROWS).encode("utf-16"), "not UTF-8"),
        ("file,label,split\na.jpg,ant,val", "no training images"),
        ("file,label,split\na.jpg,ant,train\nb.jpg,bee,val", "val has classes that train lacks: 'bee'"),
    ],
)
def test_faults_of_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make(text, tmp_path)
    assert str(raised.value).startswith("ImageTable(")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 2 is no JSON object"),
        ("{", "line 2 is no JSON object"),
        ('{"file": "b.jpg"}', "line 2: 'label' is empty"),
        ('{"file": "b.jpg", "label": null}', "line 2: 'label' is empty"),
        ('{"file": "b.jpg", "label": ["ant", "bee"]}', "Write one text or whole number"),
        ('{"file": "b.jpg", "label": true}', "Write one text or whole number"),
        ('{"file": "\\ud800.jpg", "label": "ant"}', "characters that no file name has"),
        ("[" * 100_000, "line 2 is no JSON object"),
    ],
)
def test_faults_of_json_lines(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make('{"file": "a.jpg", "label": "ant"}\n' + line, tmp_path, "x.jsonl")


def test_missing_files_and_columns(tmp_path: Path) -> None:
    path = table(tmp_path / "labels.csv", csv_of(ROWS | {"gone.jpg": "ant", "b\\g.jpg": "bee"}))
    data = ImageTable(path, **OPTIONS, val_fraction=0.3)
    with pytest.raises(FileNotFoundError, match=r"2 of 8 files .*'gone\.jpg' of labels\.csv line 8.*--data\.root"):
        data.setup("fit")
    data = ImageTable(path, **OPTIONS, val_fraction=0.3, on_bad_image="skip")
    assert len(list(data.train_dataloader())) == 1
    for name in ("file_column", "label_column", "split_column"):
        with pytest.raises(ValueError, match=rf"{name}='x'.*no such column.*'file', 'label'"):
            ImageTable(path, **{name: "x"}, val_fraction=0.3)
        with pytest.raises(ValueError, match=rf"{name}=''"):
            ImageTable(path, **{name: ""})
    with pytest.raises(ValueError, match=r"no validation images.*val_fraction 0\.2"):
        ImageTable(path)
    with pytest.raises(FileNotFoundError, match=r"root=.*no such folder"):
        ImageTable(path, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="only image of its class"):
        make(csv_of({"a.jpg": "ant", "b.jpg": "bee", "c.jpg": "bee"}), tmp_path).setup("fit")


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv or metadata\.jsonl"):
        ImageTable(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        ImageTable(str(tmp_path / "gone.csv"))
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        ImageTable(table(tmp_path / "labels.xlsx", "x"))
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(OSError, match="not a regular file"):
        ImageTable(str(tmp_path / "pipe.csv"))
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="Keep one"):
        ImageTable(str(tmp_path))


def test_a_class_that_validation_lacks_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="val has no image of 1 classes: 'bee'"):
        make("file,label,split\na.jpg,ant,train\nb.jpg,bee,train\nc.jpg,ant,val", tmp_path)


def test_settings_make_the_same_data_module(tmp_path: Path) -> None:
    data = make(csv_of(ROWS), tmp_path, exif=True)
    settings = {key: value for key, value in data.hparams.items() if not key.startswith("_")}
    assert (settings["table"], settings["root"], settings["exif"]) == (str(tmp_path / "labels.csv"), None, True)
    again = ImageTable(**settings)
    assert files(again, "val") == files(data, "val")
    assert pickle.loads(pickle.dumps(data)).classes == ["ant", "bee"]
    (tmp_path / "labels.csv").unlink()
    assert ImageTable(**settings | {"predict_dir": str(tmp_path)}).classes == []


# In the commands


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*LeafSpec.* is deprecated")
def test_from_training_to_prediction(tmp_path: Path) -> None:
    with workplace(tmp_path):
        images = tmp_path / "images"
        for number, name in enumerate(("ant", "bee")):
            write_images(images / name, 6, seed=number)
        rows = [f"{path.relative_to(images)},{path.parent.name}" for path in sorted(images.rglob("*.jpg"))]
        write_whole(images / "labels.csv", "\n".join(["file,label", *rows]))
        small = ("--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0", "--data.val_fraction=0.3")
        words = ("--data=ImageTable", "--data.table=images/labels.csv", *small)
        done(*FIT, *words)
        settings = checkpoint("runs/tiny/v0/checkpoints/last.ckpt")
        assert settings["hyper_parameters"]["class_names"] == ["ant", "bee"]
        assert settings["datamodule_hyper_parameters"]["table"] == "images/labels.csv"
        done("predict", "images/ant/0.jpg", "--ckpt=runs/tiny/v0", "-o=out.csv", "--device=cpu")
        assert Path("out.csv").read_text().splitlines()[1].startswith("images/ant/0.jpg,")
        done("validate", "--ckpt_path=runs/tiny/v0", *QUIET)
        done("data", "preview", *FIT[1:], *words, "--out=x.png", "--count=2")
        assert {line.split(",")[1] for line in Path("x.csv").read_text().splitlines()[1:]} <= {"ant", "bee"}
        outcome = cli("fit", "--data=images/labels.csv")
        assert "did you mean --data ImageTable --data.table images/labels.csv?" in outcome.err
        assert "did you mean 'batch_size'" in cli("fit", *words, "--data.batchsize=3").err


def test_shards_of_a_table(tmp_path: Path) -> None:
    from litdata import StreamingDataset

    path = table(tmp_path / "images" / "labels.csv", csv_of(ROWS))
    shard(path, str(tmp_path / "shards"), val_fraction=0.3)
    data = ImageTable(path, **OPTIONS, val_fraction=0.3)
    for split in ("train", "val"):
        dataset = StreamingDataset(str(tmp_path / "shards" / split))
        found = {dataset[index][2]: data.classes[dataset[index][1]] for index in range(len(dataset))}
        assert found == files(data, split)  # type: ignore[arg-type]


@pytest.mark.slow
def test_default_settings_train_on_36_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with workplace(tmp_path):
        for number, name in enumerate(("ant", "bee", "cow")):
            write_images(tmp_path / "photos" / name, 15, seed=number)
        words = ("--data=ImageFolder", "--data.root=photos", "--data.val_fraction=0.2", "--data.num_workers=0")
        quick = ("--data.image_size=16", "--trainer.max_epochs=4", "--trainer.limit_train_batches=null", "--name=own")
        outcome = done(*FIT, *words, *quick)
        assert "LinearScaling: 0.1 x 8/256 = 0.003125" in outcome.log
        losses = [row["train/loss_step"] for row in metrics("runs/own/v0") if "train/loss_step" in row]
        assert 0 < max(losses) < 2 * math.log(3)
        assert checkpoint("runs/own/v0/checkpoints/last.ckpt")["datamodule_hyper_parameters"]["batch_size"] == 8
        own = {
            "--model.optimizer.lr=0.01": 0,
            "--model.optimizer=AdamW": 0,
            "--data.batch_size=8": 0,
            "--trainer.callbacks+=LinearScaling": 1,
        }
        for word, count in own.items():
            made = built(monkeypatch, *FIT, *words, word)
            assert sum(isinstance(each, LinearScaling) for each in made.trainer.callbacks) == count, word
