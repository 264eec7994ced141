"""Bad input: one message that names the culprit and the remedy, an exit code that is not 0, and nothing left behind."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import FIT, QUIET, cli, done, workplace, write_image_folder
from lightning.pytorch import Trainer

from lit_tricks import Classifier
from lit_tricks.data import Digits


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that there is nothing wrong with."""
    with workplace(tmp_path_factory.mktemp("good")) as folder:
        done(*FIT)
    return str(folder / "runs/tiny/v0/checkpoints/last.ckpt")


def rejected(message: str, *words: str) -> None:
    """Run a command that must fail: with one line, which matches the whole message, and no run folder."""
    outcome = cli(*words)
    assert re.fullmatch(rf"lit-tricks: error: {message}\n", outcome.err), outcome
    assert outcome.code in (1, 2)
    assert outcome.out == ""
    assert not Path("runs").exists()


COSINE = ("--trainer.callbacks+=WarmupCosine",)

FLAGS = {
    "path of a configuration": (
        ("fit", "--config=nowhere/x.yaml"),
        r"--config nowhere/x\.yaml: there is no such file; there are base, data/ade20k_segmentation, data/cifar10, .*",
    ),
    "name of a configuration": (
        ("fit", "--config", "quickstrt"),
        "--config quickstrt: there is no such file; did you mean 'quickstart'?",
    ),
    "name of a stacked configuration": (
        (*FIT, "--config=tricks/warmup_cosin"),
        "--config tricks/warmup_cosin: there is no such file; did you mean 'tricks/warmup_cosine'?",
    ),
    "trick of the quickstart": (
        ("fit", "--config=quickstart", "--config=tricks/ema"),
        r"EMA .*twice.*--print_config.*",
    ),
    "command": (("fitt",), "there is no command 'fitt'; did you mean 'fit'?"),
    "strange command": (
        ("bake",),
        r"there is no command 'bake'; there are fit, validate, test, .*ablate, .*show\.",
    ),
    "no command of a group": (
        ("data",),
        r"choose a command: data bench, data check, data preview.*\. `lit-tricks data --help` explains them\.",
    ),
    "command of a group": (("data", "prevew"), "there is no command 'prevew'; did you mean 'preview'?"),
    "no command": ((), "choose a command, such as fit; `lit-tricks --help` lists the commands."),
    "no data": (("fit",), r"fit needs --data, or .*--config quickstart\."),
    "argument of no data": (("fit", "--data.root=photos"), r"--data\.root is an argument .*--data ImageFolder\."),
    "name without an option": (
        ("fit", "quickstart"),
        r"'quickstart' is not an option; did you mean --config quickstart?",
    ),
    "word without an option": ((*FIT, "extra"), r"'extra' is not an option\. Options start with --\."),
    "short form of an option": (("fit", "--conf", "quickstart"), r"there is no argument '--conf'; .*--config?"),
    "missing argument of a command": (("export", "x"), r"export needs --format\. `lit-tricks export --help` .*"),
    "missing arguments of a command": (("predict",), r"predict needs IMAGES and --ckpt\. .*"),
    "missing output of a command": (("average", "x"), r"average needs --output\. .*"),
    "no data to test": (("test",), r"test needs --data, or --ckpt_path.*"),
    "trick": (
        (*FIT, "--trainer.callbacks+=WarmupCosin"),
        "--trainer.callbacks: 'WarmupCosin' is unknown; did you mean 'WarmupCosine'?",
    ),
    "trick by its path": (
        (*FIT, "--trainer.callbacks+=lit_tricks.WarmupCosin"),
        r"--trainer.callbacks: 'lit_tricks\.WarmupCosin' is unknown; did you mean 'WarmupCosine'?",
    ),
    "no trick": ((*FIT, "--trainer.callbacks+=torch.nn.Linear"), r".*'torch\.nn\.Linear' is no Callback\."),
    "package of a trick": ((*FIT, "--trainer.callbacks+=tricks_lit.X"), r".*'tricks_lit\.X' is unknown\."),
    "argument of a trick": (
        (*FIT, *COSINE, "--trainer.callbacks.warmup_epoch=1"),
        ".*WarmupCosine, the last .*'warmup_epoch'; did you mean 'warmup_epochs'?",
    ),
    "argument of a trick in earlier versions": (
        (*FIT, "--trainer.callbacks+=MixUp", "--trainer.callbacks.MixUp.off_epochs=1"),
        ".*MixUp has no argument 'off_epochs'; did you mean 'end'?",
    ),
    "type of a trick's argument": (
        (*FIT, *COSINE, "--trainer.callbacks.warmup_epochs=five"),
        r"--trainer\.callbacks\.warmup_epochs: 'five' is not float\.",
    ),
    "range of a trick's argument": (
        (*FIT, *COSINE, "--trainer.callbacks.warmup_epochs=-1"),
        r"WarmupCosine\(warmup_epochs=-1\.0\): .*",
    ),
    "argument without its trick": (
        (*FIT, "--trainer.callbacks.warmup_epochs=1"),
        r".*there is no callback yet.*",
    ),
    "missing argument of a callback": (
        (*FIT, "--trainer.callbacks+=EarlyStopping"),
        r"--trainer\.callbacks: EarlyStopping needs monitor\.",
    ),
    "two schedules": (
        (*FIT, *COSINE, "--trainer.callbacks+=WarmupStep"),
        r"WarmupCosine and WarmupStep .*: remove one.*",
    ),
    "data": (("fit", "--data=Digit"), "--data: 'Digit' is unknown; did you mean 'Digits'?"),
    "argument of the data": (
        (*FIT, "--data.batch_sise=3"),
        "Digits has no argument 'batch_sise'; did you mean 'batch_size'?",
    ),
    "type of the data's argument": ((*FIT, "--data.batch_size=3.5"), r"--data\.batch_size: '3\.5' is not int\."),
    "range of the data's argument": (
        (*FIT, "--data.num_workers=-1"),
        r'Digits\(num_workers=-1\): .*"auto"\.',
    ),
    "missing argument of the data": (("fit", "--data=ImageFolder"), r"--data: ImageFolder needs root\."),
    "batch larger than the data": (
        (*FIT, "--data.batch_size=1258"),
        "batch_size=1258 is larger than the 1257 training images, .*: use a batch_size of at most 1257, .*",
    ),
    "model class": ((*FIT, "--model=Clasifier"), "--model: 'Clasifier' is unknown; did you mean 'Classifier'?"),
    "no model class": ((*FIT, "--model=Digits"), ".*'Digits' is .*"),
    "argument of the model class": (
        (*FIT, "--model.modl=resnet"),
        "Classifier has no argument 'modl'; did you mean 'model'?",
    ),
    "timm model": (
        (*FIT, "--model.model=resnet5o"),
        "name='resnet5o' is neither 'resnet', 'small_vgg' nor a model of timm; did you mean 'resnet50' .*",
    ),
    "argument of the model": (
        (*FIT, "--model.model_args.dept=18"),
        "'dept' is no argument of model 'resnet'; did you mean 'depth'?",
    ),
    "value of the model's argument": (
        (*FIT, "--model.model_args.depth=19"),
        r"resnet\(depth=19\): .*18, 34, 50, 101, 152.*",
    ),
    "classes other than those of the data": (
        (*FIT, "--model.num_classes=3"),
        r"--model\.num_classes=3 .*has 10. Leave it out.*",
    ),
    "missing weights": ((*FIT, "--model.weights=nowhere.pth"), "weights='nowhere.pth': no such file .*"),
    "optimizer": ((*FIT, "--model.optimizer=SDG"), "--model.optimizer: 'SDG' is unknown; did you mean 'SGD'?"),
    "no optimizer": ((*FIT, "--model.optimizer=torch.nn.Linear"), r".*'torch\.nn\.Linear' is no Optimizer\."),
    "argument of the optimizer": (
        (*FIT, "--model.optimizer=SGD", "--model.optimizer.momentun=0.9"),
        "SGD has no argument 'momentun'; did you mean 'momentum'?",
    ),
    "type of the optimizer's argument": (
        (*FIT, "--model.optimizer.lr=fast"),
        r"--model\.optimizer\.lr: 'fast' is not float\.",
    ),
    "range of the optimizer's argument": ((*FIT, "--model.optimizer.lr=-1"), r"Invalid learning rate: -1\.0"),
    "argument of the Trainer": (
        (*FIT, "--trainer.max_epocs=1"),
        r"there is no argument 'trainer\.max_epocs'; did you mean 'trainer\.max_epochs'?",
    ),
    "type of the Trainer's argument": (
        (*FIT, "--trainer.max_epochs=two"),
        r"--trainer\.max_epochs: 'two' is not int or null\.",
    ),
    "section": ((*FIT, "--trainr.max_epochs=1"), r".*'trainr\.max_epochs'; did you mean 'trainer\.max_epochs'?"),
    "logger": ((*FIT, "--trainer.logger=WandbLoger"), ".*'WandbLoger' is unknown; did you mean 'WandbLogger'?"),
    "seed": ((*FIT, "--seed_everything=lucky"), r"--seed_everything: 'lucky' is not bool or int\."),
    "missing value": ((*FIT, "--trainer.max_epochs"), "argument --trainer.max_epochs: expected one argument"),
    "checkpoint": ((*FIT, "--ckpt_path=nowhere.ckpt"), r"--ckpt_path nowhere\.ckpt: there is no such file\. .*"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flag_explains_itself(case: str) -> None:
    words, message = FLAGS[case]
    rejected(message.replace("?", r"\?"), *words)


YAML = {
    "syntax": ("trainer:\n  max_epochs: [1,\n", r"--config bad\.yaml, line \d, is not YAML: .*\."),
    "bytes": ("\udcff\udcfe", r"--config bad\.yaml is not YAML: .*"),
    "text": ("quickstart", r"--config bad\.yaml holds no settings, but 'quickstart'\."),
    "nothing": ("# all of it\n", r"--config bad\.yaml holds no settings, but None\."),
    "section": ("trainr: {max_epochs: 1}", r"there is no argument 'trainr\.max_epochs'; did you mean 'trainer\..*"),
    "trick": ("trainer: {callbacks+: [{class_path: EMMA}]}", ".*'EMMA' is unknown.*"),
    "trick by its path": ("trainer: {callbacks+: [{class_path: lit_tricks.X}]}", r".*'lit_tricks\.X' is unknown\."),
    "no trick": ("trainer: {callbacks+: [{class_path: torch.nn.Linear}]}", r".*'torch\.nn\.Linear' is no Callback\."),
    "argument of a trick": (
        "trainer: {callbacks+: [{class_path: WarmupCosine, init_args: {warmup: 1}}]}",
        r"WarmupCosine has no argument 'warmup'; did you mean 'warmup_epochs'\?",
    ),
    "type of a trick's argument": (
        "trainer: {callbacks+: [{class_path: WarmupStep, init_args: {milestones: [one]}}]}",
        r"--trainer\.callbacks\.milestones: 'one' is not int\.",
    ),
    "range of a trick's argument": (
        "trainer: {callbacks+: [{class_path: WarmupStep, init_args: {gamma: 2}}]}",
        r"WarmupStep\(gamma=2\.0\): .*",
    ),
    "data": ("data: {class_path: Digit}", r"--data: 'Digit' is unknown; did you mean 'Digits'\?"),
    "missing argument of the data": ("data: {class_path: ImageFolder}", r"--data: ImageFolder needs root\."),
    "type of the data's argument": (
        "data: {class_path: Digits, init_args: {batch_size: big}}",
        r"--data\.batch_size: 'big' is not int\.",
    ),
    "model class": ("model: {class_path: Clasifier}", r"--model: 'Clasifier' is unknown; did you mean 'Classifier'\?"),
    "argument of the model class": (
        "model: {class_path: Classifier, init_args: {modl: resnet}}",
        r"Classifier has no argument 'modl'; did you mean 'model'\?",
    ),
    "timm model": ("model: {init_args: {model: inception_v2}}", "name='inception_v2' is neither .*inception_v3.*"),
    "argument of the model": (
        "model: {init_args: {model_args: {widht: 1}}}",
        r"'widht' is no argument of model 'resnet'; did you mean 'width' or 'weights'\?",
    ),
    "classes other than those of the data": (
        "model: {init_args: {class_names: [a, b]}}",
        r"--model\.class_names=\['a', 'b'\] disagrees with the data, which has \['0', .*",
    ),
    "optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.SDG}}}",
        r"--model\.optimizer: 'torch\.optim\.SDG' is unknown; did you mean 'SGD'\?",
    ),
    "argument of the optimizer": (
        "model: {init_args: {optimizer: {class_path: SGD, init_args: {momentun: 1}}}}",
        r"SGD has no argument 'momentun'; did you mean 'momentum'\?",
    ),
    "type of the optimizer's argument": (
        "model: {init_args: {optimizer: {class_path: SGD, init_args: {lr: fast}}}}",
        r"--model\.optimizer\.lr: 'fast' is not float\.",
    ),
    "argument of the Trainer": (
        "trainer: {max_epocs: 1}",
        r"there is no argument 'trainer\.max_epocs'; did you mean 'trainer\.max_epochs'\?",
    ),
    "type of the Trainer's argument": (
        "trainer: {max_epochs: two}",
        r"--trainer\.max_epochs: 'two' is not int or null\.",
    ),
    "logger": (
        "trainer: {logger: {class_path: WandbLoger}}",
        ".*'WandbLoger' is unknown; did you mean 'WandbLogger'.*",
    ),
}


@pytest.mark.parametrize("case", YAML)
def test_wrong_configuration_explains_itself(case: str) -> None:
    text, message = YAML[case]
    Path("bad.yaml").write_text(text, errors="surrogateescape")
    rejected(message, *FIT, "--config=bad.yaml")


# Images

IMAGES = ("--data=ImageFolder", "--data.root=images", "--data.image_size=16", "--data.batch_size=4")


@pytest.mark.slow
def test_wrong_image_folder_explains_itself() -> None:
    rejected(r"root='images' is not a folder; expected are ROOT/train/CLASS/\*\.jpg .*", *FIT, *IMAGES)
    Path("images").mkdir()
    rejected(r"no folder 'train' in root='images'; expected are .*", *FIT, *IMAGES)
    write_image_folder(Path("images"))
    Path("images/val/ant").rename("images/val/Ant")
    rejected(r"the class folders of train and val in root='images' differ: .*only in val: Ant", *FIT, *IMAGES)
    Path("images/val/Ant").rename("images/val/ant")
    Path("images/train/dog").mkdir()
    Path("images/val/dog").mkdir()
    rejected(r"no image in 1 of the 4 class folders of 'images/train': dog; .*", *FIT, *IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "workers", "kind"),
    [("train", 0, "truncated"), ("val", 2, "truncated"), ("train", 2, "text"), ("val", 0, "text")],
)
def test_broken_images_are_named(split: str, workers: int, kind: str) -> None:
    root = write_image_folder(Path("images"))
    for path in (root / split).glob("*/*.jpg"):  # all of them, whichever comes first
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if kind == "truncated" else b"not an image")
    message = rf"cannot read the image 'images/{split}/\w+/\d\.jpg' \(.+\): replace the file or remove it"
    rejected(message, *FIT, *IMAGES, f"--data.num_workers={workers}", "--trainer.num_sanity_val_steps=1")


# Checkpoints


class Evil:
    """An object in a checkpoint that runs code if it is unpickled without care."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def files(good: str) -> Iterator[Path]:
    content = torch.load(good, weights_only=True)
    whole = Path(good).read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("text.ckpt").write_text("epoch: 3")
    Path("empty.ckpt").write_bytes(b"")
    Path("pickle.ckpt").write_bytes(pickle.dumps(Evil()))
    torch.save(content | {"evil": Evil()}, "evil.ckpt")
    torch.save(content["state_dict"], "weights.ckpt")
    torch.save([1, 2], "list.ckpt")
    return Path().glob("*.ckpt")


@pytest.mark.slow
def test_files_that_are_no_checkpoint(good: str) -> None:
    paths = sorted(files(good))
    assert len(paths) == 7
    Path("images").mkdir()
    commands = ((*FIT, "--trainer.max_epochs=2"), ("test",), ("predict", "--images=images"))
    for number, path in enumerate(paths):
        message = rf"--ckpt_path {path} is not a checkpoint of Lightning.*"
        for words in commands if path.name == "evil.ckpt" else commands[number % 3 :][:1]:
            rejected(message, *words, f"--ckpt_path={path}", *QUIET)
    assert not Path("executed").exists()
    assert not Path("predictions.csv").exists()
    pickle.loads(Path("pickle.ckpt").read_bytes())
    assert Path("executed").exists()  # the bait works


@pytest.mark.slow
def test_a_checkpoint_of_other_classes(good: str) -> None:
    write_image_folder(Path("images"))
    outcome = cli(*FIT, *IMAGES, "--data.num_workers=0", f"--ckpt_path={good}", "--trainer.max_epochs=2")
    assert outcome.code == 1
    assert re.fullmatch("lit-tricks: error: .*only in the checkpoint: 0, 1, .*in the data: ant, .*\n", outcome.err)
    with pytest.raises(ValueError, match=r"num_classes=7 .*10 classes"):
        Trainer(max_epochs=1, accelerator="cpu", logger=False).fit(Classifier(num_classes=7), Digits())


# Places that cannot be written


def test_a_file_is_in_the_way_of_the_runs() -> None:
    Path("taken").write_text("mine")
    for place in ("taken", "taken/deeper"):
        message = rf"the run folder {place}/tiny/v0 cannot be made \(.+\): .*--trainer\.default_root_dir\."
        rejected(message, *FIT, f"--trainer.default_root_dir={place}")
    assert Path("taken").read_text() == "mine"


def test_no_permission_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", reject)  # a read-only folder is no obstacle where the tests run as root
    rejected(r"the run folder runs/tiny/v0 cannot be made \(Permission denied\): choose another .*", *FIT)


@pytest.mark.slow
def test_a_failed_run_leaves_the_others_alone(good: str) -> None:
    done(*FIT)
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert cli(*FIT, "--data.batch_size=5000").code == 1
    assert cli(*FIT, "--name=other", "--data.batch_size=5000").code == 1
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
    assert [str(path) for path in Path("runs").glob("*/*")] == ["runs/tiny/v0"]


# The details, for those who ask


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="1257 training images"):
        cli(*FIT, "--data.batch_size=5000", "--debug")
    assert not Path("runs").exists()
    assert cli("fit", "--debug", "--help").code == 0


def test_errors_that_do_not_explain_themselves_name_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digits, "_load", lambda self, split: {}["lost"])
    rejected(r"KeyError: 'lost' \(--debug shows where\)", *FIT)
