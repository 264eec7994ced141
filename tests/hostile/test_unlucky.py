"""Accidents without an attacker: editors, clusters, macOS, a killed process, a typing error."""

from __future__ import annotations

import json
import logging
import unicodedata
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from helpers.boxes import CLASSES, write_voc
from helpers.cli import cli, workplace, write_image_folder, write_images
from helpers.fits import make_trainer
from helpers.masks import write_ade, write_folder
from helpers.masks import write_voc as write_voc_masks

from lit_tricks import Classifier, commands
from lit_tricks.callbacks import LinearScaling, NoBiasDecay
from lit_tricks.commands.ablation.cells import Cell
from lit_tricks.commands.ablation.exclusive import alone_in
from lit_tricks.data import ADE20KSegmentation, Digits, ImageFolder, SegmentationFolder, VOCDetection, VOCSegmentation
from lit_tricks.models import layer_scales
from lit_tricks.utils.class_names import names_of, permutation, require_same_classes
from lit_tricks.utils.files import locked, read_text

BOM = b"\xef\xbb\xbf"

# ---------------------------------------------------------------------------------------------------------------------
# Text that an editor has saved with a mark, or in another encoding


def marked(path: Path) -> None:
    path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))


def test_classes_of_masks_with_a_mark(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    before = SegmentationFolder(str(root)).classes
    marked(root / "classes.txt")
    assert SegmentationFolder(str(root)).classes == before


def test_classes_of_ade20k_with_a_mark(tmp_path: Path) -> None:
    root = write_ade(tmp_path)
    rows = [f"{label}\tx\tx\tx\tname {label}" for label in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["head", *rows]) + "\n")
    before = ADE20KSegmentation(str(root)).classes
    marked(root / "objectInfo150.txt")
    assert ADE20KSegmentation(str(root)).classes == before


def test_lists_of_voc_with_a_mark(tmp_path: Path) -> None:
    root = write_voc_masks(tmp_path / "masks")
    marked(root / "ImageSets" / "Segmentation" / "train.txt")
    assert len(VOCSegmentation(str(root), crop_size=8, num_workers=0).source("train")) == 2
    root = write_voc(tmp_path / "boxes", ("VOC2007/trainval", "VOC2007/test"))
    marked(root / "VOC2007" / "ImageSets" / "Main" / "trainval.txt")
    boxes = VOCDetection(str(root), ["VOC2007/trainval"], ["VOC2007/test"], classes=CLASSES)
    assert len(boxes.source("train")) > 0


def test_the_list_of_validation_images_after_excel(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "root")
    (root / "val").rename(tmp_path / "other")

    def held_out() -> int:
        return len(ImageFolder(str(root), image_size=8, num_workers=0, val_fraction=0.25).source("val"))

    before = held_out()
    [table] = root.rglob("split_*.csv")
    marked(table)
    assert held_out() == before


@pytest.mark.parametrize("content", ["grün\n".encode("latin-1"), "a\nb".encode("utf-16"), b"\xff\xfe\x00"])
def test_text_in_another_encoding_names_the_file(content: bytes, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"classes\.txt.*UTF-8"):
        SegmentationFolder(str(root))


def test_text_without_a_mark_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("é\n".encode())
    assert read_text(tmp_path / "x") == "é\n"


BAD_YAML = {
    "another encoding": "# grün\ntrainer: {max_epochs: 1}\n".encode("latin-1"),
    "no YAML": b"trainer: {max_epochs: 1\n",
    "tabs": b"trainer:\n\tmax_epochs: 1\n",
    "a list": b"- 1\n",
    "nothing": b"",
    "aliases": "\n".join(
        ["a: &a [x, x]", *(f"{new}: &{new} [{', '.join(10 * [f'*{old}'])}]" for old, new in pairwise("abcdef"))]
    ).encode(),
}


@pytest.mark.parametrize("content", BAD_YAML)
@pytest.mark.parametrize("command", ["ablate", "race", "fit"])
def test_a_configuration_that_cannot_be_read_is_named_in_a_line(command: str, content: str, tmp_path: Path) -> None:
    words = {
        "ablate": ("ablate", "--config", "tiny.yaml", "--stack", "bad.yaml"),
        "race": ("race", "--config", "tiny.yaml", "--candidates", "bad.yaml", "--budget", "9"),
        "fit": ("fit", "--config", "tiny.yaml", "--config", "bad.yaml"),
    }[command]
    with workplace(tmp_path):
        (tmp_path / "bad.yaml").write_bytes(BAD_YAML[content])
        outcome = cli(*words)
        assert outcome.code == 1
        assert "bad.yaml" in outcome.err
        assert outcome.err.count("\n") == 1
        assert not list(tmp_path.glob("*/runs/*"))


# ---------------------------------------------------------------------------------------------------------------------
# Names of classes that look alike


COMPOSED = unicodedata.normalize("NFC", "é")
APART = unicodedata.normalize("NFD", "é")


def test_accents_of_macos_are_the_same_class() -> None:
    require_same_classes([COMPOSED, "z"], [APART, "z"], "the checkpoint", "the data")
    assert permutation([APART, "z"], ["z", COMPOSED]) == [1, 0]
    with pytest.raises(ValueError, match="another order"):
        require_same_classes([COMPOSED, "z"], ["z", APART], "the checkpoint", "the data")


def test_folders_whose_names_look_alike_are_an_error_that_says_so(tmp_path: Path) -> None:
    for split, name in (("train", COMPOSED), ("val", APART)):
        for each in (name, "z"):
            write_images(tmp_path / split / each, 1)
    with pytest.raises(ValueError, match="Unicode"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize(
    "names", [np.array(["ant", "bee"]), ("ant", "bee"), np.array(["ant", "bee"], dtype=object), ["ant", "bee"]]
)
def test_names_of_a_users_data_in_any_sequence(names: Any) -> None:
    class Data:
        classes = names

    assert names_of(Data()) == ["ant", "bee"]
    with pytest.raises(ValueError, match="only in the data: bee"):
        require_same_classes(["ant", "wasp"], Data(), "the checkpoint", "the data")


@pytest.mark.parametrize("names", [None, 3, "ant", [], np.zeros(0), {}, object()])
def test_what_is_no_list_of_names(names: Any) -> None:
    class Data:
        classes = names

    assert names_of(Data()) is None


# ---------------------------------------------------------------------------------------------------------------------
# A cluster whose file system has no locks


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)


def test_without_locks_a_folder_is_used_with_a_warning(
    without_locks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lit_tricks"), alone_in(tmp_path, "ablate"):
        pass
    assert "locks" in caplog.text


def test_without_locks_images_are_decoded_once_more(
    without_locks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_TRICKS_CACHE", str(tmp_path / "cache"))
    data = ImageFolder(str(write_image_folder(tmp_path / "root")), image_size=8, num_workers=0, cache="disk")
    assert len(list(data.val_dataloader())) == 1


def test_a_lock_ends_with_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "x"):
        raise KeyError
    with locked(tmp_path / "x", timeout=0), pytest.raises(TimeoutError), locked(tmp_path / "x", timeout=0):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Results that are whole, and wrong


WRONG_RESULTS = [
    {"raw": 3},
    {"raw": {"test": []}},
    {"raw": {"test": {"top1": "abc"}}},
    {"raw": {"test": {"top1": [1]}}},
    {"averaged": {"test": None}},
    {"seconds": "long"},
    {"peak_memory": {}},
    {"raw": {"test": {"top1": True}}},
]


@pytest.mark.parametrize("results", WRONG_RESULTS, ids=str)
def test_results_of_a_wrong_type_finish_no_cell(results: Any, tmp_path: Path) -> None:
    cell = Cell("baseline", 0, tmp_path / "cell", [])
    (cell.folder / "v0").mkdir(parents=True)
    (cell.folder / "v0" / "results.json").write_text(json.dumps(results))
    assert cell.finished is None
    (cell.folder / "v0" / "results.json").write_text('{"raw": {"test": {"top1": null}}, "seconds": 1}')
    assert cell.finished is not None


# ---------------------------------------------------------------------------------------------------------------------
# Commands in Python take paths


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with workplace(folder):
        assert cli("fit", "--config", "tiny.yaml", "--name", "run").code == 0
        write_images(folder / "photos", 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", [str, Path])
def test_commands_take_strings_and_paths(kind: Any, trained: Path, tmp_path: Path) -> None:
    checkpoints = trained / "runs" / "run" / "v0" / "checkpoints"
    best, last = kind(checkpoints / "best.ckpt"), kind(checkpoints / "last.ckpt")
    with workplace(tmp_path):
        run_all(best, last, kind, trained, tmp_path)


def run_all(best: Any, last: Any, kind: Any, trained: Path, tmp_path: Path) -> None:
    assert commands.average([best, last], output=kind(tmp_path / "a.ckpt")).is_file()
    assert commands.card(best, output=kind(tmp_path / "c.md")).is_file()
    assert commands.export(best, format="safetensors", output=kind(tmp_path / "m.safetensors")).is_file()
    assert commands.report([kind(trained / "runs" / "run" / "v0")]).is_file()
    assert commands.resolution(ckpt=best, sizes=["8", "16"], out=kind(tmp_path / "sizes")).is_dir()


ODD_TENSORS: dict[str, Any] = {
    "sparse": torch.eye(3).to_sparse(),
    "complex": torch.ones(3, dtype=torch.complex64),
    "8 bits": torch.ones(3).to(torch.float8_e4m3fn),
    "unsigned": torch.ones(3, dtype=torch.uint16),
    "nothing": None,
    "text": "x",
    "without values": torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("what", ODD_TENSORS)
@pytest.mark.parametrize("command", ["test", "average", "predict", "card"])
def test_an_odd_entry_of_the_weights_is_one_clear_line(command: str, what: str, trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "runs/run/v0/checkpoints/best.ckpt", weights_only=True)
    with workplace(tmp_path):
        for name in ("x.ckpt", "y.ckpt"):
            torch.save(content | {"state_dict": content["state_dict"] | {"model.extra": ODD_TENSORS[what]}}, name)
        outcome = cli(*{
            "test": ("test", "--ckpt_path=x.ckpt"),
            "average": ("average", "x.ckpt", "y.ckpt", "--output=z.ckpt"),
            "predict": ("predict", "--ckpt=x.ckpt", str(trained / "photos")),
            "card": ("card", "x.ckpt", "--output=c.md"),
        }[command])  # fmt: skip
        assert outcome.code in (0, 1)
        assert outcome.err.count("\n") <= 1
        assert "debug" not in outcome.err, outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# Two settings of the learning rate at once


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_layer_decay_and_linear_scaling_multiply(place: int) -> None:
    small: dict[str, Any] = {"depth": 18, "width": 1 / 32, "small_input": True}
    sgd = partial(torch.optim.SGD, lr=0.1, weight_decay=1e-3)
    module = Classifier("resnet", 10, small, input_size=(1, 8, 8), optimizer=sgd, layer_decay=0.5)
    tricks = [LinearScaling(base_batch_size=64, batch_size=16), NoBiasDecay()][:: 1 - 2 * place]
    trainer = make_trainer(*tricks, max_steps=1, limit_val_batches=0, logger=False)
    trainer.fit(module, datamodule=Digits(batch_size=16))
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {names[p]: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    scales = layer_scales(module.model, 0.5)
    for name, parameter in module.named_parameters():
        assert found[name] == pytest.approx(0.1 * 16 / 64 * scales.get(parameter, 1.0), rel=1e-12), name
