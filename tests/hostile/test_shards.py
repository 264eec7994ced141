"""Shards of a stranger: nothing in them is executed, and no path leads out of their folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import write_image_folder

from lit_tricks.commands.data import shard
from lit_tricks.data import Streaming
from lit_tricks.data.shards.index_format import check_index

litdata = pytest.importorskip("litdata")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
DEAD = 2**22 + 1  # no process has this number: Linux counts to 2**22


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    shard(str(write_image_folder(folder / "images")), str(folder / "out"))
    return folder


@pytest.fixture
def shards(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "out", tmp_path / "out"))


def change(root: Path, edit: Callable[[dict[str, Any]], Any], split: str = "train") -> None:
    path = root / split / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def stream(root: Path, **arguments: Any) -> Any:
    return Streaming(str(root), image_size=8, batch_size=2, num_workers=0, **arguments)


LEAF = {"type": None, "context": None, "children_spec": []}
IMPORTS = {  # litdata imports the module that the context names
    "type": "collections.defaultdict",
    "context": json.dumps({"default_factory_module": "evil_factory", "default_factory_name": "x", "dict_context": []}),
    "children_spec": [],
}
BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pickle": lambda index: index["config"].update(data_format=["pickle", "int", "str"]),
    "graph": lambda index: index["config"].update(data_format=["graph:pickle", "int", "str"]),
    "another order of formats": lambda index: index["config"].update(data_format=["int", "bytes", "str"]),
    "a fourth part": lambda index: index["config"].update(data_format=["bytes", "int", "str", "pickle"]),
    "no format": lambda index: index["config"].pop("data_format"),
    "a format of None": lambda index: index["config"].update(data_format=None),
    "a spec that imports": lambda index: index["config"].update(data_spec=json.dumps([1, IMPORTS])),
    "a spec of a dict": lambda index: index["config"].update(data_spec=json.dumps([1, LEAF])),
    "a spec that is no JSON": lambda index: index["config"].update(data_spec="("),
    "another loader": lambda index: index["config"].update(item_loader="TokensLoader"),
    "compression": lambda index: index["config"].update(compression="zstd"),
    "encryption": lambda index: index["config"].update(encryption={"algorithm": "rsa"}),
    "an unknown setting": lambda index: index["config"].update(hook="os.system"),
    "a path upwards": lambda index: index["chunks"][0].update(filename="../../outside.bin"),
    "an absolute path": lambda index: index["chunks"][0].update(filename="/etc/passwd"),
    "a path of Windows": lambda index: index["chunks"][0].update(filename="..\\chunk-0-0.bin"),
    "a folder": lambda index: index["chunks"][0].update(filename="."),
    "a number as name": lambda index: index["chunks"][0].update(filename=5),
    "no name": lambda index: index["chunks"][0].pop("filename"),
    "a size below zero": lambda index: index["chunks"][0].update(chunk_size=-1),
    "a size of words": lambda index: index["chunks"][0].update(chunk_size="12"),
    "a size that is true": lambda index: index["chunks"][0].update(chunk_size=True),
    "no chunks": lambda index: index.update(chunks=[]),
    "a chunk that is a list": lambda index: index.update(chunks=[[]]),
    "no classes": lambda index: index.update(classes=[]),
    "classes of numbers": lambda index: index.update(classes=[1, 2]),
    "a time that is a path": lambda index: index.update(updated_at="../../../home/me"),
    "a time that is a number": lambda index: index.update(updated_at=5),
}


@pytest.mark.parametrize("what", BAD)
def test_an_index_of_another_format_is_rejected_before_a_reader_exists(
    what: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litdata.StreamingDataset, "__init__", lambda *args, **kwargs: pytest.fail("a reader was made"))
    change(shards, BAD[what])
    with pytest.raises(ValueError, match=r"train/index\.json is not an index"):
        stream(shards)


@pytest.mark.parametrize("what", ["pickle", "a spec that imports", "a path upwards", "encryption"])
def test_an_index_that_is_read_anew_is_checked_anew(what: str, shards: Path) -> None:
    data = stream(shards)  # this index was right
    loader = data.train_dataloader()
    change(shards, BAD[what])
    with pytest.raises(ValueError, match=r"read|not that|called|number|does not describe"):
        next(iter(loader))
    with pytest.raises(ValueError, match=r"read|not that|called|number|does not describe"):
        data.source("train").item(0)


def test_the_index_that_is_written_is_right(shards: Path) -> None:
    for split in ("train", "val"):
        check_index(json.loads((shards / split / "index.json").read_text()))
    data = stream(shards)
    assert sum(len(batch[0]) for batch in data.val_dataloader()) == 6


def test_a_label_without_a_class_is_named(shards: Path) -> None:
    for split in ("train", "val"):
        change(shards, lambda index: index.update(classes=["ant", "bee"]), split)  # of three
    with pytest.raises(RuntimeError, match=r"val.*label 2 is not one of the 2 classes"):
        list(stream(shards).val_dataloader())


def test_classes_in_another_order_are_mapped(shards: Path) -> None:
    names = ["cow", "ant", "bee"]
    old, new = stream(shards).source("val"), stream(shards, classes=names).source("val")
    for i in range(len(old)):
        assert ["ant", "bee", "cow"][old.item(i)[1]] == names[new.item(i)[1]]
    batches = stream(shards, classes=names).val_dataloader()
    assert [label for batch in batches for label in batch[1].tolist()] == [1, 1, 2, 2, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# What killed processes left


def test_what_a_killed_process_left_is_removed_and_named(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left, alive = tmp_path / f"out.incomplete-{DEAD}", tmp_path / "out.incomplete-1"
    for folder in (left, alive):
        (folder / "train").mkdir(parents=True)
    with caplog.at_level("INFO"):
        shard(str(written / "images"), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.incomplete-1"]  # process 1 always lives
    assert any(left.name in message for message in caplog.messages)


@pytest.mark.parametrize("overwrite", [False, True])
def test_shards_whose_replacement_was_killed_are_not_lost(overwrite: bool, shards: Path, written: Path) -> None:
    shards.rename(shards.with_name(f"out.replaced-{DEAD}"))  # the moment between two renames
    if overwrite:
        shard(str(written / "images"), str(shards), overwrite=True)
    else:
        with pytest.raises(FileExistsError, match="--overwrite"):
            shard(str(written / "images"), str(shards))
    assert len(stream(shards).source("train")) == 12
    assert [path.name for path in shards.parent.iterdir()] == ["out"]
