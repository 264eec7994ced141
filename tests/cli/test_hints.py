"""Options of other tools raise an error that names the right option, and resuming needs one flag."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.cli import COSINE, FIT, checkpoint, cli, done, results, workplace

from lit_tricks.cli.hints import HINTS
from lit_tricks.utils.config_files import find_config


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


TYPED = {
    "--lr": "--model.optimizer.lr",
    "--learning-rate": "--model.optimizer.lr",
    "--learning_rate": "--model.optimizer.lr",
    "--model.lr": "--model.optimizer.lr",
    "--wd": "--model.optimizer.weight_decay",
    "--epochs": "--trainer.max_epochs",
    "--max-epochs": "--trainer.max_epochs",
    "--trainer.epochs": "--trainer.max_epochs",
    "--batch-size": "--data.batch_size",
    "-b": "--data.batch_size",
    "--device": "--trainer.devices",
    "--gpus": "--trainer.devices",
    "--trainer.gpus": "--trainer.devices",
    "--tricks": "--trainer.callbacks+=",
    "--top_k": "lit-tricks predict --top-k",
    "--amp": "--trainer.precision 16-mixed",
    "--fp16": "--trainer.precision 16-mixed",
    "--workers": "--data.num_workers",
    "--seed": "--seed_everything",
    "--resume": "--ckpt_path",
    "--pretrained": "--model.weights",
    "--ema": "--config tricks/ema",
}


@pytest.mark.parametrize("flag", TYPED)
def test_a_habit_is_answered_with_the_option(flag: str) -> None:
    for words in ((flag, "1"), (f"{flag}=1",)):
        outcome = cli(*FIT, *words)
        assert (outcome.code, outcome.out) == (2, "")
        assert TYPED[flag] in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert not Path("runs").exists()


def test_a_network_and_a_folder_are_no_classes() -> None:
    assert "did you mean --model.model resnet50?" in cli(*FIT, "--model", "resnet50").err
    assert "did you mean --model.model resnet?" in cli(*FIT, "--model=resnet").err
    Path("photos").mkdir()
    assert "did you mean --data ImageFolder --data.root photos?" in cli("fit", "--data", "photos").err


def test_every_hint_is_an_option_or_a_configuration() -> None:
    out = done("fit", "--help").out
    for hint in set(HINTS.values()):
        flag, _, value = hint.partition(" ")
        if flag == "--config":
            assert not value or find_config(value)
        elif flag.startswith(("--model.", "--data.")):
            continue  # arguments of classes, which the next test sets
        else:
            assert flag.removesuffix("=") in out, hint


def test_hints_can_be_taken() -> None:
    words = ("--model.optimizer.lr=0.3", "--model.optimizer.weight_decay=0.1", "--model.layer_decay=0.9")
    words += ("--data.batch_size=32", "--data.num_workers=0", "--model.model_args.drop_rate=0.1")
    config = yaml.safe_load(done(*FIT, *words, "--trainer.precision=bf16-mixed", "--print_config").out)
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.3


@pytest.mark.slow
def test_an_argument_of_data_is_no_habit() -> None:
    """Also where its name without the dot is one."""
    for flag in ("--data.root=nowhere", "--data.batch_size=4", "--data.image_size=16"):
        assert "there is no argument" not in cli(*FIT, "--data=ImageFolder", "--data.root=nowhere", flag).err


OWN = """
from lightning.pytorch import LightningModule

class Own(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
"""


def test_an_argument_of_a_module_of_the_user_is_no_habit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    words = ("--model=own_module.Own", "--model.lr=0.5", "--data=Digits", "--print_config")
    assert "lr: 0.5" in done("fit", *words).out


# One flag to resume


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT, *COSINE, "--trainer.callbacks+=EMA", "--trainer.max_epochs=2", "--data.batch_size=48")
    return folder / "runs" / "tiny" / "v0"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["checkpoints/last.ckpt", ""])
def test_a_checkpoint_alone_resumes_with_the_settings_of_its_run(trained: Path, path: str) -> None:
    done("fit", f"--ckpt_path={trained / path}", "--trainer.max_epochs=3", "--trainer.callbacks.EMA.decay=0.5")
    run = Path("runs/tiny/v0")
    before, after = (yaml.safe_load((each / "config.yaml").read_text()) for each in (trained, run))
    assert after["data"] == before["data"]
    assert after["model"] == before["model"]
    names = [[each["class_path"] for each in config["trainer"]["callbacks"]] for config in (before, after)]
    assert names[0] == names[1]
    assert after["trainer"]["callbacks"][-1]["init_args"]["decay"] == 0.5
    assert (after["trainer"]["max_epochs"], after["name"]) == (3, "tiny")
    assert checkpoint(run / "checkpoints/last.ckpt")["epoch"] == 2
    assert (run / "checkpoints/best.ckpt").is_file()
    assert results(run)["averaged"]["test"]


@pytest.mark.slow
def test_a_configuration_beside_the_checkpoint_has_its_own_settings(trained: Path) -> None:
    done(*FIT, f"--ckpt_path={trained}", "--trainer.max_epochs=3")
    config = yaml.safe_load(Path("runs/tiny/v0/config.yaml").read_text())
    assert config["trainer"]["callbacks"] is None
    assert config["data"]["init_args"]["batch_size"] == 64


@pytest.mark.slow
def test_a_checkpoint_outside_of_a_run_brings_model_and_data(trained: Path, folder: Path) -> None:
    (folder / "mine.ckpt").write_bytes((trained / "checkpoints/last.ckpt").read_bytes())
    quiet = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=2")
    done("fit", "--ckpt_path=mine.ckpt", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", *quiet)
    config = yaml.safe_load(Path("runs/run/v0/config.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == 48
    assert re.search("Classifier$", config["model"]["class_path"])
