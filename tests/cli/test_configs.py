"""The configurations: each one builds what it states, alone or stacked, from any folder, and from the wheel."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import pytest
import timm.optim
import torch
import yaml
from helpers import masks
from helpers.boxes import write_coco, write_voc
from helpers.cli import QUIET, built, cli, done, metrics, workplace, write_image_folder
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

import lit_tricks
from lit_tricks import Classifier, data
from lit_tricks.commands.data import shard
from lit_tricks.data.detection.voc import VOC_CLASSES
from lit_tricks.utils.config_files import CONFIGS

REPOSITORY = Path(__file__).parents[2]
NAMES = sorted(  # sweeps are no configurations of a run
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps"
)

# What a configuration is stacked on, by its folder; small, since nothing here is trained.
STACKS: dict[str, tuple[str, ...]] = {
    ".": ("--data=Digits",),
    "data": ("--config=models/resnet18_d_small", "--model.model_args.width=0.125"),
    "models": ("--config=data/digits",),
    "optimizers": ("--config=data/digits", "--config=models/resnet18_d_small", "--model.model_args.width=0.125"),
    "recipes": ("--trainer.precision=32-true",),  # no fp16 on the CPU
    "tricks": ("--config=data/digits", "--config=models/resnet18_d_small", "--model.model_args.width=0.125"),
    "loggers": ("--config=data/digits", "--config=models/resnet18_d_small", "--model.model_args.width=0.125"),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of all data sets that configurations name."""
    root = tmp_path_factory.mktemp("datasets")
    shard(str(write_image_folder(root / "imagenet")), str(root / "shards"))
    rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted(root.rglob("*.jpg"))]
    (root / "labels.csv").write_text("\n".join(["file,label", *rows]))
    write_coco(root / "coco")
    write_voc(root / "VOCdevkit", ("VOC2007/trainval", "VOC2012/trainval", "VOC2007/test"), VOC_CLASSES)
    return root


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, datasets: Path) -> Iterator[Path]:
    shutil.copytree(datasets, tmp_path, dirs_exist_ok=True)
    with workplace(tmp_path):
        yield tmp_path


def content(name: str) -> dict[str, Any]:
    mapping: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return mapping


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_builds_what_it_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    written = content(name)
    stack = () if Path(name).parent == Path() and "data" in written else STACKS[str(Path(name).parent)]
    made = built(monkeypatch, "fit", "--config", name, *stack)
    for key, part in (("model", made.model), ("data", made.datamodule)):
        if "class_path" in written.get(key, {}):
            assert type(part).__name__ == written[key]["class_path"]
            arguments = {k: v for k, v in written[key]["init_args"].items() if k != "optimizer"}
            assert {k: part.hparams[k] for k in arguments} == arguments
    trainer = written.get("trainer", {})
    for trick in trainer.get("callbacks", []) + trainer.get("callbacks+", []):
        kind = getattr(lit_tricks.callbacks, trick["class_path"], None)
        kind = kind or getattr(lightning.pytorch.callbacks, trick["class_path"])
        (callback,) = [callback for callback in made.trainer.callbacks if type(callback) is kind]
        assert {k: getattr(callback, k) for k in trick.get("init_args", {})} == trick.get("init_args", {})
    if "max_epochs" in trainer:
        assert made.trainer.max_epochs == trainer["max_epochs"]
    assert written.get("seed_everything", 0) == made.config.fit.seed_everything


def teacher_of_three_classes() -> Path:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model = Classifier("resnet", num_classes=3, model_args={"depth": 18, "width": 0.125})
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer.save_checkpoint("teacher.ckpt", weights_only=False)
    return Path("teacher.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("recipes/")])
def test_a_recipe_makes_two_steps(cifar: Path, name: str) -> None:
    small = ("--model.model_args.width=0.125", "--data.batch_size=4", "--data.num_workers=0")
    if name.endswith("faster_rcnn"):
        sizes = {"channels": 8, "head_width": 16, "min_size": 64, "max_size": 64}
        small = ("--model.backbone_args.width=0.125", "--data.batch_size=1", "--data.num_workers=0")
        small += tuple(f"--model.{key}={value}" for key, value in sizes.items())
    elif name.endswith("_fcn"):
        small += ("--data.crop_size=32", "--data.base_size=32", "--model.weights=null")
        if "voc" in name:
            small += (f"--data.root={masks.write_voc(Path('voc'))}", "--data.masks=SegmentationClass")
            small += ("--data.train_set=train", "--data.batch_size=2")
        else:
            small += (f"--data.root={masks.write_ade(Path('ade'))}", "--data.batch_size=2")
    elif name.startswith("recipes/imagenet"):
        small += ("--data.root=imagenet", "--data.image_size=32")
        if "KnowledgeDistillation" in (CONFIGS / f"{name}.yaml").read_text():  # its teacher would be downloaded
            small += (f"--trainer.callbacks.teacher={teacher_of_three_classes()}",)
    else:
        small += (f"--data.root={cifar}", "--data.val_size=10")
    done("fit", "--config", name, *small, *QUIET, "--trainer.precision=32-true", "--trainer.fast_dev_run=2")


def test_a_recipe_says_what_it_costs_and_reaches() -> None:
    for name in NAMES:
        if name.startswith("recipes/"):
            header = (CONFIGS / f"{name}.yaml").read_text().partition("seed_everything")[0]
            assert f"#   lit-tricks fit --config {name}" in header
            assert re.search(r"^# Expected: (top-1|mAP|mIoU)[^%]*\d+\.?\d* .*%", header, re.MULTILINE), name
            assert re.search(r"^# Cost: .*GPU hours?", header, re.MULTILINE), name


def test_every_trick_has_a_configuration() -> None:
    stacked = {
        trick["class_path"]
        for name in NAMES
        if name.startswith("tricks/")
        for trick in content(name)["trainer"]["callbacks+"]
    }
    assert stacked == set(lit_tricks.callbacks.__all__)


def test_every_data_module_has_a_configuration() -> None:
    found = {content(name)["data"]["class_path"] for name in NAMES if name.startswith("data/")}
    assert found == set(data.__all__)


# The command line fills what a new class has in common with the default one, so a configuration has to say all of it.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    "adam": (torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.05}),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.045, "alpha": 0.9, "eps": 1.0, "momentum": 0.9, "weight_decay": 1e-4},
    ),
    "lars": (timm.optim.Lars, {"lr": 4.8, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4}),
    "lamb": (timm.optim.Lamb, {"lr": 0.005, "betas": (0.9, 0.999), "weight_decay": 0.02}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.partition("/")[2] for name in NAMES if name.startswith("optimizers/")])
def test_an_optimizer_of_one_line_trains(name: str) -> None:
    kind, numbers = OPTIMIZERS[name]
    epochs = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=6")
    words = ("fit", "--config=tiny.yaml", f"--config=optimizers/{name}", *epochs, "--data.batch_size=200")
    done(*words)
    saved = torch.load("runs/tiny/v0/checkpoints/last.ckpt", weights_only=True)
    assert saved["optimizers"] == [kind.__name__]
    (group,) = saved["optimizer_states"][0]["param_groups"]
    found = {key: tuple(group[key]) if isinstance(group[key], list) else group[key] for key in numbers}
    assert found == numbers
    losses = [row["train/loss_epoch"] for row in metrics("runs/tiny/v0") if "train/loss_epoch" in row]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[1] != losses[0]


@pytest.mark.slow
def test_logger_configurations_add_their_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("wandb", WandbLogger), ("tensorboard", TensorBoardLogger)):
        made = built(monkeypatch, "fit", f"--config=loggers/{name}", *STACKS["loggers"])
        assert [type(logger).__name__ for logger in made.trainer.loggers] == ["CSVLogger", kind.__name__]


@pytest.mark.parametrize("name", ["data/digits", "data/digits.yaml", "configs/data/digits.yaml"])
def test_a_name_is_found_from_any_folder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = built(monkeypatch, "fit", "--config=tiny.yaml", "--config", name)
    assert made.datamodule.batch_size == 64


def test_a_file_goes_before_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("quickstart").write_text("trainer: {max_epochs: 77}")
    assert built(monkeypatch, "fit", "--config=tiny.yaml", "--config=quickstart").trainer.max_epochs == 77


@pytest.mark.slow
def test_later_configurations_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("fit", "--config=base", "--config=data/digits", "--config=models/resnet18_d_small")
    assert built(monkeypatch, *words).trainer.max_epochs == 120
    made = built(monkeypatch, *words, "--config=tiny.yaml", "--config=optimizers/adam", "--model.optimizer.lr=0.5")
    assert made.trainer.max_epochs == 1
    assert made.model.configure_optimizers().defaults["lr"] == 0.5


def commands() -> list[tuple[str, str]]:
    """The commands in the comments of the configurations."""
    return [
        (name, command)
        for name in NAMES
        for command in re.findall(r"^#\s+lit-tricks (.*)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
    ]


@pytest.mark.slow
def test_commands_in_the_comments_are_understood() -> None:
    assert {"base", "quickstart"} <= {name for name, _ in commands()}
    for _, command in commands():
        assert yaml.safe_load(done(*shlex.split(command), "--print_config").out)["data"]


@pytest.mark.slow
def test_flags_in_the_comments_exist() -> None:
    for name in NAMES:
        for flag, value in re.findall(r"(--[a-z][\w.]+) (\S+)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE):
            if not flag.startswith("--logdir"):
                data = ("ImageTable", "labels.csv") if flag == "--data.table" else ("ImageFolder", "imagenet")
                where = "table" if flag == "--data.table" else "root"
                words = (f"--data={data[0]}", f"--data.{where}={data[1]}", flag, value, "--print_config")
                assert cli("fit", *words).code == 0, (name, flag)


def test_the_wheel_brings_the_configurations(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    (path,) = wheel.WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path / "dist"), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        inside = {name.removeprefix("lit_tricks/configs/") for name in archive.namelist() if "/configs/" in name}
        assert inside == {f"{name}.yaml" for name in NAMES}
        archive.extractall(tmp_path / "site")
    spec = importlib.util.spec_from_file_location(
        "installed", tmp_path / "site" / "lit_tricks" / "utils" / "config_files.py"
    )
    assert spec
    assert spec.loader
    installed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(installed)
    found = installed.resolve_configs(["--config", "quickstart"])[1]
    assert found == [tmp_path / "site" / "lit_tricks" / "configs" / "quickstart.yaml"]
