"""Checkpoints that do not belong to the data, are damaged, odd, or made by someone who means no good."""

from __future__ import annotations

import inspect
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.boxes import write_coco
from helpers.cli import FIT, checkpoint, cli, done, results, workplace, write_image_folder
from helpers.fits import log_lines
from helpers.masks import write_folder
from helpers.segmenters import trainer as quiet_trainer
from torch import nn

from lit_tricks import Classifier, Detector, KnowledgeDistillation, Segmenter
from lit_tricks.commands import average, export, fixres, resolution
from lit_tricks.commands.checkpoints import data_of, module_of, run_settings
from lit_tricks.data import CocoDetection, ImageFolder, SegmentationFolder, Streaming
from lit_tricks.utils.checkpoint_files import check_archive, read_checkpoint
from lit_tricks.utils.class_names import require_same_classes

CLASSES = ("ant", "bee", "cat", "dog")
DATA = ("--data", "ImageFolder", "--data.image_size", "16", "--data.batch_size", "4", "--data.num_workers", "0")
SMALL: dict[str, Any] = {"model_args": {"depth": 18, "width": 0.03125, "small_input": True}, "input_size": (3, 16, 16)}
SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of four classes, and the run of a model that was trained on them."""
    folder = tmp_path_factory.mktemp("origin")
    with workplace(folder):
        shutil.copytree(write_image_folder(Path("images"), CLASSES) / "val", "images/test")
        done(*FIT, *DATA, "--data.root", "images", "--name", "good")
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, to work in: ``best.ckpt`` and ``images``."""
    shutil.copytree(origin / "images", tmp_path / "images")
    for name in ("best", "last"):
        shutil.copy(origin / "runs/good/v0/checkpoints" / f"{name}.ckpt", tmp_path / f"{name}.ckpt")
    with workplace(tmp_path):
        yield tmp_path


def rename(root: Path, old: str, new: str) -> None:
    for split in root.iterdir():
        (split / old).rename(split / new)


def change(source: str, target: str, **changes: Any) -> str:
    """Save a checkpoint with other parts; ``...`` leaves a part out."""
    content = checkpoint(source) | changes
    torch.save({key: value for key, value in content.items() if value is not ...}, target)
    return target


def images(root: Path = Path("images"), **arguments: Any) -> ImageFolder:
    return ImageFolder(str(root), image_size=16, batch_size=4, num_workers=0, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Names of classes

COMMANDS = {
    "test": ("test", "--config", "tiny.yaml", *DATA, "--ckpt_path", "best.ckpt"),
    "validate": ("validate", "--config", "tiny.yaml", *DATA, "--ckpt_path", "best.ckpt"),
    "fit": (*FIT, *DATA, "--ckpt_path", "last.ckpt", "--trainer.max_epochs", "2"),
    "fixres": ("fixres", "--ckpt", "best.ckpt", "--test_size", "24", "--output", "fixed.ckpt", *DATA),
    "resolution": ("resolution", "--ckpt", "best.ckpt", "--sizes", "16", *DATA),
    "average": ("average", "best.ckpt", "last.ckpt", "--output", "soup.ckpt", *DATA),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_renamed_class_folder_is_an_error_of_every_command(command: str, place: Path) -> None:
    rename(place / "images", "ant", "wasp")
    outcome = cli(*COMMANDS[command], "--data.root", "images")
    assert outcome.code == 1
    assert "only in the checkpoint: ant; only in the data: wasp" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(place.glob("fixed.ckpt")) + list(place.glob("soup.ckpt"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_class_that_is_missing_is_named(command: str, place: Path) -> None:
    for split in (place / "images").iterdir():
        shutil.rmtree(split / "cat")
    outcome = cli(*COMMANDS[command], "--data.root", "images")
    assert outcome.code == 1
    assert "only in the checkpoint: cat" in outcome.err
    assert "architecture" not in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "fit", "resolution"])
def test_the_same_classes_in_another_order_are_mapped_when_asked_for(command: str, place: Path) -> None:
    content = checkpoint("best.ckpt")
    hparams = content["hyper_parameters"] | {"class_names": ["dog", "cat", "bee", "ant"]}
    for name in ("best.ckpt", "last.ckpt"):
        change(name, name, hyper_parameters=hparams)
    words = (*COMMANDS[command], "--data.root", "images")
    outcome = cli(*words)
    assert outcome.code == 1
    assert "another order" in outcome.err
    order = outcome.err.partition("classes=")[2].partition("]")[0] + "]"
    done(*words, f"--data.classes={order}")


def test_with_the_classes_mapped_each_label_is_that_of_its_name(place: Path) -> None:
    order = ["dog", "cat", "bee", "ant"]
    for split in ("train", "val"):
        expected, found = (images(classes=names).source(split) for names in (None, order))
        for i in range(len(expected)):
            assert CLASSES[expected[i][1]] == order[found[i][1]]
    with pytest.raises(ValueError, match="only in classes: wasp; only in the data: dog"):
        images(classes=["wasp", "cat", "bee", "ant"])
    with pytest.raises(ValueError, match=r"ant.* twice"):
        images(classes=["ant", "ant", "bee", "cat"])


def test_the_trainer_in_python_compares_classes(place: Path) -> None:
    rename(place / "images", "ant", "wasp")
    model = Classifier.load_from_checkpoint("best.ckpt", weights_only=True)
    for run in ("test", "validate"):
        with pytest.raises(ValueError, match="only in the model: ant; only in the data: wasp"):
            getattr(quiet_trainer(), run)(model, datamodule=images())
    fresh = Classifier("resnet", 4, class_names=images().classes, optimizer=SGD, **SMALL)
    with pytest.raises(ValueError, match="only in the checkpoint: ant; only in the data: wasp"):
        quiet_trainer().fit(fresh, images(), ckpt_path="last.ckpt", weights_only=True)
    unnamed = Classifier("resnet", 4, optimizer=SGD, **SMALL)  # nothing is known, nothing is compared
    quiet_trainer(limit_val_batches=1).validate(unnamed, datamodule=images())


def test_predictions_keep_the_names_of_the_model_with_a_warning(place: Path) -> None:
    rename(place / "images", "ant", "wasp")
    model = Classifier.load_from_checkpoint("best.ckpt", weights_only=True)
    with log_lines() as records:
        quiet_trainer().predict(model, datamodule=images(predict_dir="images/val"))
    assert any("only in the model: ant; only in the data: wasp" in record.getMessage() for record in records)


@pytest.mark.slow
def test_a_teacher_of_other_classes_is_rejected(place: Path) -> None:
    for names, message in ((["ant", "bee", "cat", "wasp"], "only in the teacher: dog"), (CLASSES[::-1], "order")):
        student = Classifier("resnet", 4, class_names=list(names), optimizer=SGD, **SMALL)
        with pytest.raises(ValueError, match=message):
            quiet_trainer(callbacks=[KnowledgeDistillation("best.ckpt")]).fit(student, images(classes=None))
    student = Classifier("resnet", 4, optimizer=SGD, **SMALL)  # its classes are those of the data
    rename(place / "images", "ant", "wasp")
    with pytest.raises(ValueError, match="only in the teacher: ant"):
        quiet_trainer(callbacks=[KnowledgeDistillation("best.ckpt")]).fit(student, images())


def test_checkpoints_of_other_classes_are_not_averaged(place: Path) -> None:
    content = checkpoint("best.ckpt")
    change("best.ckpt", "other.ckpt", hyper_parameters=content["hyper_parameters"] | {"class_names": list("abcd")})
    with pytest.raises(ValueError, match=r"only in best\.ckpt: ant, bee, cat, dog; only in other\.ckpt: a, b, c, d"):
        average(["best.ckpt", "other.ckpt"], "soup.ckpt")


@pytest.mark.parametrize("command", [resolution, export])
def test_weights_are_not_filled_into_a_module_of_other_classes(command: Callable[..., Any], place: Path) -> None:
    module = Classifier("resnet", 4, class_names=list("abcd"), optimizer=SGD, **SMALL)
    words: dict[str, Any] = {"module": module}
    words |= {"checkpoint": "best.ckpt", "format": "safetensors"} if command is export else {"ckpt": "best.ckpt"}
    with pytest.raises(ValueError, match="only in the checkpoint: ant, bee, cat, dog; only in the module: a, b, c, d"):
        command(**words)


def test_a_segmenter_compares_classes_and_maps_labels(tmp_path: Path) -> None:
    root = write_folder(tmp_path)  # ground, red, green, blue
    tiny: dict[str, Any] = {"model_args": SMALL["model_args"], "input_size": (3, 8, 8), "optimizer": SGD}
    data = partial(SegmentationFolder, str(root), crop_size=8, batch_size=1, num_workers=0)
    order = ["blue", "green", "red", "ground"]
    model = Segmenter(num_classes=4, class_names=order, **tiny)
    with pytest.raises(ValueError, match="another order"):
        quiet_trainer().validate(model, datamodule=data())
    mapped = data(classes=order)
    quiet_trainer(limit_val_batches=1).validate(model, datamodule=mapped)
    for old, new in zip(data().source("val"), mapped.source("val"), strict=True):
        assert torch.equal(torch.where(old[1] == 255, 255, 3 - old[1]), new[1])
    (root / "classes.txt").write_text("ground\nred\ngreen\nyellow\n")
    with pytest.raises(ValueError, match="only in the model: blue; only in the data: yellow"):
        quiet_trainer().validate(model, datamodule=data())


def test_a_detector_compares_classes_and_maps_labels(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    root = write_coco(tmp_path)  # ant, bee
    data = partial(CocoDetection, str(root), batch_size=1, num_workers=0)
    assert data().classes == ["ant", "bee"]
    swapped: Any = data(classes=["bee", "ant"])
    for old, new in zip(data().source("val"), swapped.source("val"), strict=True):
        assert torch.equal(3 - old[1]["labels"], new[1]["labels"])
    with pytest.raises(ValueError, match="only in classes: cow; only in the data: bee"):
        data(classes=["ant", "cow"])
    model = Detector(num_classes=2, class_names=["ant", "cow"], backbone_args={"depth": 18, "width": 0.125})
    with pytest.raises(ValueError, match="only in the model: cow; only in the data: bee"):
        quiet_trainer().validate(model, datamodule=data())


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (["a", "b"], ["a", "c"], r"only in the checkpoint: b; only in the data: c"),
        (["a", "b", "c"], ["a", "b"], r"only in the checkpoint: c\."),
        (["a", "b"], ["b", "a"], r'order: label 0 is \'a\' .* and \'b\' .*classes=\["a", "b"\]'),
        ([str(i) for i in range(40)], [str(i) for i in range(41)], "only in the data: 40"),
        ([f"a{i}" for i in range(9)], ["b"], "only in the checkpoint: a0, a1, a2, a3, a4 and 4 more"),
    ],
)
def test_require_same_classes_names_the_differences(left: list[str], right: list[str], message: str) -> None:
    def named(names: list[str]) -> dict[str, Any]:
        return {"hyper_parameters": {"class_names": names}}

    with pytest.raises(ValueError, match=message):
        require_same_classes(named(left), named(right), "the checkpoint", "the data")
    require_same_classes(named(left), named(list(left)), "the checkpoint", "the data")
    require_same_classes(named(left), {"hyper_parameters": {}}, "the checkpoint", "the data")
    require_same_classes(named(left), None, "the checkpoint", "the data")


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def flip(path: Path, part: str = "data/7") -> Path:
    """Flip a bit in the middle of a part of the archive."""
    with zipfile.ZipFile(path) as archive:
        [info] = [each for each in archive.infolist() if each.filename.endswith(part)]
    content = bytearray(path.read_bytes())
    at = info.header_offset
    start = at + 30 + int.from_bytes(content[at + 26 : at + 28], "little")
    start += int.from_bytes(content[at + 28 : at + 30], "little")
    content[start + info.file_size // 2] ^= 1
    path.write_bytes(content)
    return path


READERS: dict[str, tuple[str, ...]] = COMMANDS | {
    "predict": ("predict", "--ckpt_path", "best.ckpt", "--images", "images/val"),
    "card": ("card", "best.ckpt"),
    "export": ("export", "best.ckpt", "--format", "safetensors"),
}


@pytest.mark.parametrize("command", READERS)
def test_a_flipped_bit_is_noticed_by_every_command(command: str, place: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        flip(Path(name))
    outcome = cli(*READERS[command], *(("--data.root", "images") if command == "average" else ()))
    assert outcome.code == 1
    assert "damaged" in outcome.err
    assert "data/7" in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_flipped_bit_is_noticed_in_a_teacher_and_in_weights_to_start_from(place: Path) -> None:
    flip(Path("best.ckpt"))
    student = Classifier("resnet", 4, class_names=list(CLASSES), optimizer=SGD, **SMALL)
    with pytest.raises(RuntimeError, match=r"damaged.*data/7"):
        quiet_trainer(callbacks=[KnowledgeDistillation("best.ckpt")]).fit(student, images())
    with pytest.raises(RuntimeError, match=r"damaged.*data/7"):
        Classifier("resnet", 4, weights="best.ckpt", **SMALL)


@pytest.mark.parametrize("part", ["data.pkl", "byteorder", "data/0", "data/20"])
def test_the_damaged_part_is_named(part: str, place: Path) -> None:
    with pytest.raises(ValueError, match=f"damaged.*{part}"):
        read_checkpoint(flip(Path("best.ckpt"), part))


@pytest.mark.parametrize("size", [0, 10, 1000, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_no_checkpoint(size: float, place: Path) -> None:
    path = Path("best.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(size if size >= 1 else size * len(content))])
    with pytest.raises(ValueError, match=r"best\.ckpt is (not a checkpoint|damaged)"):
        read_checkpoint(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": {"w": torch.ones(3)}}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(content, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)  # as before torch 1.6
    for name in ("a.ckpt", "b.ckpt"):
        check_archive(tmp_path / name)
        assert torch.equal(read_checkpoint(tmp_path / name)["state_dict"]["w"], torch.ones(3))


def test_a_compressed_part_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "a.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "a.ckpt") as source,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    with pytest.raises(ValueError, match="damaged"):
        check_archive(tmp_path / "bomb.ckpt")


# ---------------------------------------------------------------------------------------------------------------------
# Odd, but whole

ODD: dict[str, dict[str, Any]] = {
    "a list of hyper-parameters": {"hyper_parameters": [1]},
    "a number for hyper-parameters": {"hyper_parameters": 3},
    "numbers as names of hyper-parameters": {"hyper_parameters": {1: 2}},
    "a list of settings of the data": {"datamodule_hyper_parameters": ["root"]},
    "version 5": {"pytorch-lightning_version": 5},
    "a version of words": {"pytorch-lightning_version": "newest"},
    "no version": {"pytorch-lightning_version": ...},
    "no weights": {"state_dict": ...},
    "a list of weights": {"state_dict": [torch.zeros(1)]},
    "callbacks in a list": {"callbacks": []},
    "an epoch of words": {"epoch": "last"},
    "loops in a list": {"loops": []},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("command", ["test", "fit", "card", "export", "resolution"])
def test_an_odd_checkpoint_is_one_clear_line(command: str, odd: str, place: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        change(name, name, **ODD[odd])
    outcome = cli(*READERS[command])
    assert outcome.code == 1
    assert "is not a checkpoint of Lightning, or damaged" in outcome.err
    assert outcome.err.count("\n") == 1
    assert "--debug" not in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"loops": {}}, {"loops": ...}, {"optimizer_states": ...}, {"optimizer_states": []}, {"lr_schedulers": ...}],
    ids=["loops", "no loops", "no optimizers", "optimizers", "no schedulers"],
)
def test_a_checkpoint_without_the_state_of_a_run_is_not_continued(changes: dict[str, Any], place: Path) -> None:
    change("last.ckpt", "last.ckpt", **changes)
    outcome = cli(*COMMANDS["fit"], "--data.root", "images")
    assert outcome.code == 1
    assert "--model.weights" in outcome.err
    assert outcome.err.count("\n") == 1
    change("best.ckpt", "best.ckpt", **changes)  # its weights are whole
    done("export", "best.ckpt", "--format", "safetensors")


def test_pickled_objects_are_one_clear_line(place: Path) -> None:
    torch.save({"state_dict": {"w": Path("x")}, "pytorch-lightning_version": "2.6.0"}, "pickled.ckpt")
    for words in (("card", "pickled.ckpt"), ("export", "pickled.ckpt", "--format", "onnx")):
        outcome = cli(*words)
        assert outcome.code == 1
        assert "holds pickled objects" in outcome.err
        assert outcome.err.count("\n") == 1
    student = Classifier("resnet", 4, optimizer=SGD, **SMALL)
    with pytest.raises(RuntimeError, match="holds pickled objects") as caught:
        quiet_trainer(callbacks=[KnowledgeDistillation("pickled.ckpt")]).fit(student, images())
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint may choose


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once code of a stranger was run: the module ``evilmod`` makes it."""
    mark = tmp_path / "PWNED"
    (tmp_path / "modules").mkdir()
    code = (
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from lit_tricks import Classifier as X\nfrom lit_tricks.data import Digits as D\n"
    )
    (tmp_path / "modules" / "evilmod.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    yield mark
    sys.modules.pop("evilmod", None)


def with_settings(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        content = checkpoint(name)
        change(
            name,
            name,
            hyper_parameters=content["hyper_parameters"] | (model or {}),
            datamodule_hyper_parameters=content["datamodule_hyper_parameters"] | (data or {}),
        )


TRUSTED_BY_NOBODY: dict[str, dict[str, Any]] = {
    "the module": {"model": {"_class_path": "evilmod.X"}},
    "the network": {"model": {"model": {"class_path": "evilmod.X", "init_args": {}}}},
    "the optimizer": {"model": {"optimizer": {"class_path": "evilmod.X"}}},
    "the optimizer, by a string": {"model": {"optimizer": "evilmod.X"}},
    "deep inside": {"model": {"model_args": {"block": [{"class_path": "evilmod.X"}]}}},
    "the data": {"data": {"_class_path": "evilmod.D"}},
}


@pytest.mark.parametrize("what", TRUSTED_BY_NOBODY)
@pytest.mark.parametrize("command", ["test", "predict", "export", "resolution"])
def test_a_checkpoint_imports_nothing(command: str, what: str, place: Path, marked: Path) -> None:
    with_settings(**TRUSTED_BY_NOBODY[what])
    words = {"resolution": ("resolution", "--ckpt", "best.ckpt", "--sizes", "16")}.get(command, READERS[command])
    words = ("test", "--ckpt_path", "best.ckpt") if command == "test" else words
    outcome = cli(*words)
    assert not marked.exists()
    assert "evilmod" not in sys.modules
    assert outcome.code == 1
    assert "--import evilmod" in outcome.err


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.hub.load",
        "pathlib.Path",
        5,
        None,
        "",
        ".",
        "no_module.X",
    ],
)
def test_what_is_no_class_of_ours_is_not_called(name: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("called"))
    content = checkpoint("best.ckpt")
    data = {"_class_path": name, "args": ["touch", "PWNED"]}
    change("best.ckpt", "evil.ckpt", datamodule_hyper_parameters=data)
    for call in (
        lambda: resolution(ckpt="evil.ckpt", sizes=["8", "16"]),
        lambda: fixres(ckpt="evil.ckpt", test_size=16, output="x.ckpt"),
        lambda: data_of(Path("evil.ckpt")),
    ):
        if name:  # nothing is named otherwise
            with pytest.raises(ValueError, match=r"evil\.ckpt names"):
                call()
    hparams = content["hyper_parameters"] | {"_class_path": name}
    change("best.ckpt", "evil.ckpt", hyper_parameters=hparams)
    with pytest.raises(ValueError, match=r"evil\.ckpt (names|does not name)"):
        module_of(Path("evil.ckpt"))
    hparams = content["hyper_parameters"] | {"optimizer": {"class_path": name, "init_args": {}}}
    change("best.ckpt", "evil.ckpt", hyper_parameters=hparams)
    if isinstance(name, str) and "." in name and name != ".":
        with pytest.raises(ValueError, match=r"evil\.ckpt names"):
            module_of(Path("evil.ckpt"))
    assert not Path("PWNED").exists()


def test_a_class_that_is_imported_already_is_taken(place: Path) -> None:
    class Own(Classifier):
        pass

    module = ModuleType("own_module")
    Own.__module__, Own.__qualname__ = "own_module", "Own"
    module.Own = Own  # type: ignore[attr-defined]
    with_settings(model={"_class_path": "own_module.Own"})
    with pytest.raises(ValueError, match="--import own_module"):
        module_of(Path("best.ckpt"))
    sys.modules["own_module"] = module
    try:
        assert type(module_of(Path("best.ckpt"))) is Own
    finally:
        del sys.modules["own_module"]


@pytest.mark.slow
def test_a_module_is_imported_when_the_user_asks_for_it(place: Path, marked: Path) -> None:
    with_settings(model={"_class_path": "evilmod.X"})
    done("test", "--import", "evilmod", "--ckpt_path", "best.ckpt", "--trainer.accelerator=cpu")
    assert marked.exists()
    outcome = cli("test", "--import=no_such_module", "--ckpt_path", "best.ckpt")
    assert outcome.code == 1
    assert "--import no_such_module" in outcome.err


def test_what_the_user_names_too_is_trusted(place: Path) -> None:
    with_settings(model={"optimizer": {"class_path": "some_module.Optimizer"}})
    settings = run_settings(Path("best.ckpt"), "test", trusted={"some_module.Optimizer"})
    assert settings["model"]["init_args"]["optimizer"]["class_path"] == "some_module.Optimizer"


REMOTE = ("s3://attacker/shards", "gs://attacker/shards", "https://attacker/x")


@pytest.mark.slow
@pytest.mark.parametrize("root", REMOTE)
def test_data_elsewhere_is_not_loaded_unasked(root: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_tricks.data.shards.index._remote_index", lambda url: pytest.fail("loaded"))
    with_settings(data={"_class_path": "lit_tricks.data.Streaming", "root": root})
    for words in (
        ("test", "--ckpt_path", "best.ckpt"),
        ("validate", "--ckpt_path", "best.ckpt"),
        ("resolution", "--ckpt", "best.ckpt"),
    ):
        outcome = cli(*words)
        assert outcome.code == 1
        assert f"--data.root {root}" in outcome.err
    with pytest.raises(ValueError, match=root):
        data_of(Path("best.ckpt"))
    assert run_settings(Path("best.ckpt"), "test", trusted={root})["data"]["init_args"]["root"] == root
    pytest.importorskip("litdata")
    if root.startswith("https"):
        return  # no place for shards
    content = checkpoint("best.ckpt")
    settings, known = content["datamodule_hyper_parameters"], inspect.signature(Streaming).parameters
    for name in [name for name in settings if name not in known and not name.startswith("_")]:
        del settings[name]  # an argument of ImageFolder that Streaming does not have
    torch.save(content, "best.ckpt")
    done("predict", "--ckpt_path", "best.ckpt", "--images", "images/val", "--trainer.accelerator=cpu")


# ---------------------------------------------------------------------------------------------------------------------
# A network that is given by its class path


class Net(nn.Module):
    """A user's network."""

    def __init__(self, width: int = 4, num_classes: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width), nn.Linear(width, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.slow
def test_card_and_export_of_a_network_of_the_user(place: Path) -> None:
    network = f"{{class_path: {Net.__module__}.Net, init_args: {{width: 5}}}}"
    Path("own.yaml").write_text(
        f"model: {{class_path: Classifier, init_args: {{model: {network}, model_args: null}}}}\n"
    )
    done(*FIT, "--config", "own.yaml", *DATA, "--data.root", "images", "--name", "own")
    run = Path("runs/own/v0")
    assert results(run)["raw"]["val"]
    best = str(run / "checkpoints" / "best.ckpt")
    done("card", best)
    text = (run / "README.md").read_text()
    assert "# Net-images" in text
    assert "width=5" in text
    done("export", best, "--format", "safetensors")
    assert (run / "checkpoints" / "best.safetensors").is_file()
    outcome = cli("export", best, "--format", "timm")
    assert outcome.code == 1
    assert "timm builds models by name" in outcome.err
