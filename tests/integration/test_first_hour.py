"""The first hour of a user: each job by its commands without a change."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from check_quickstart import check
from helpers.cli import FIT, built, cli, done, workplace
from PIL import Image
from sklearn.datasets import load_digits

import lit_tricks
from lit_tricks import WarmupCosine, callbacks, data
from lit_tricks.callbacks.base import Trick
from lit_tricks.cli.catalog import configs

TRAIN_AND_LOOK = """
lit-tricks fit --config quickstart
lit-tricks report runs/quickstart/v0
"""
CHANGE_A_RECIPE = """
lit-tricks fit --config quickstart --trainer.callbacks-=EMA --trainer.callbacks.WarmupCosine.warmup_epochs 1
"""
SERVE_IN_PYTHON = """
import lit_tricks

[(names, probabilities)] = lit_tricks.predict("runs/quickstart/v0", "digit.png")
"""
SERVE_WITHOUT = """
lit-tricks export runs/quickstart/v0 --format onnx -o digits.onnx
"""
FIND_OUT = """
lit-tricks list
lit-tricks list tricks
lit-tricks show EMA
lit-tricks completion bash
"""
# a process in which neither lit_tricks nor torch can be imported
ONNX_SERVER = """
import json, sys
for name in ("lit_tricks", "torch", "lightning"):
    sys.modules[name] = None
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("digits.onnx", providers=["CPUExecutionProvider"])
meta = session.get_modelmeta().custom_metadata_map
pixels = np.asarray(Image.open("digit.png").convert("L"), np.float32) / 255
mean, std = json.loads(meta["mean"]), json.loads(meta["std"])
images = ((pixels - np.float32(mean)) / np.float32(std))[None, None].astype(np.float32)
[logits] = session.run(None, {session.get_inputs()[0].name: images})
print(json.loads(meta["label_names"])[int(logits[0].argmax())])
"""
EXPORTED_SERVER = """
import sys
sys.modules["lit_tricks"] = None
import torch

program = torch.export.load("digits.pt2").module()
print(program(torch.zeros(3, 1, 8, 8)).shape[1])
"""


def commands(text: str) -> list[list[str]]:
    """Words of each command, without the name of the program."""
    return [shlex.split(line)[1:] for line in text.strip().splitlines()]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path, curves=True):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/quickstart/v0``, which learned something, and ``digit.png``, an image of a 3."""
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT, "--name=quickstart", "--model.model_args.width=0.125", "--trainer.limit_train_batches=1.0")
        digits = load_digits()
        pixels = digits.images[list(digits.target).index(3)] * 255 / 16
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / "digit.png")
    return folder


@pytest.mark.slow
def test_digits_and_the_report_in_two_commands() -> None:
    for words in commands(TRAIN_AND_LOOK):
        done(*words)
    check(Path("runs"))
    page = Path("runs/quickstart/v0/report.html").read_text()
    for part in ("Results", "Tricks", "Learning rate", "Confusion", "Calibration"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_a_recipe_is_changed_by_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    [before] = [built(monkeypatch, "fit", "--config", "quickstart").trainer.callbacks]
    [words] = commands(CHANGE_A_RECIPE)
    after = built(monkeypatch, *words).trainer.callbacks
    names = [[type(each).__name__ for each in stack if isinstance(each, Trick)] for stack in (before, after)]
    assert [name for name in names[0] if name != "EMA"] == names[1] != names[0]
    [schedule] = [each for each in after if isinstance(each, WarmupCosine)]
    assert schedule.warmup_epochs == 1


@pytest.mark.slow
def test_serving_in_python_takes_three_lines(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    found: dict[str, list[str]] = {}
    exec(compile(SERVE_IN_PYTHON, "serve", "exec"), found)
    assert len(SERVE_IN_PYTHON.strip().splitlines()) <= 3
    assert len(found["names"]) == len(found["probabilities"]) == 5
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "export.md").read_text("utf-8")
    assert SERVE_IN_PYTHON.strip() in guide


@pytest.mark.slow
def test_serving_without_the_library_takes_one_command(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    [words] = commands(SERVE_WITHOUT)
    done(*words)
    process = subprocess.run([sys.executable, "-c", ONNX_SERVER], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    [(names, _)] = lit_tricks.predict("runs/quickstart/v0", "digit.png")
    assert process.stdout.strip() == names[0]


@pytest.mark.slow
def test_an_exported_program_runs_where_the_library_is_not(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    done("export", "runs/quickstart/v0", "--format", "torch-export", "-o", "digits.pt2")
    process = subprocess.run([sys.executable, "-c", EXPORTED_SERVER], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout.strip()) == (0, "10"), process.stderr


def test_what_there_is_can_be_found_out() -> None:
    everything, tricks, card, script = (done(*words).out for words in commands(FIND_OUT))
    for name in (*callbacks.__all__, *data.__all__, *configs()):
        assert re.search(rf"^ +{re.escape(name)} ", everything, re.MULTILINE), name
    assert [line.split()[0] for line in tricks.splitlines()] == callbacks.__all__
    assert "decay" in card
    assert "--config tricks/ema" in card
    for name in ("fit", "--trainer.max_epochs", "tricks/ema", "WarmupCosine"):
        assert name in script


@pytest.mark.parametrize("name", ["ema", "EMA", "MIXUP", "mixup", "Cutmix", "cut-mix", "warmup_cosine", "imagefolder"])
def test_names_are_found_in_any_case(name: str) -> None:
    [kind] = {each for each in (*callbacks.__all__, *data.__all__) if each.lower() == re.sub("[-_]", "", name.lower())}
    assert done("show", name).out.startswith(f"{kind}(")


MISUSE = {
    "misspelt trick": ("--trainer.callbacks+=Mixupp", "did you mean 'MixUp'?"),
    "trick of another case": ("--trainer.callbacks+=mixup", "did you mean 'MixUp'?"),
    "configuration": ("--config=tricks/mixupp", "did you mean 'tricks/mixup'?"),
    "type": ("--trainer.max_epochs=ten", "'ten' is not int"),
    "absent trick taken out": ("--trainer.callbacks-=SWA", "SWA is not among the callbacks, which are WarmupCosine"),
    "trick in lower case": ("--trainer.callbacks.ema.decay=0.9", "did you mean --trainer.callbacks.EMA.decay?"),
    "flag of an absent trick": ("--trainer.callbacks.MixUp.alpha=1", "Add it with --trainer.callbacks+=MixUp"),
    "flag that no trick has": ("--trainer.callbacks.EMA.alpha=1", "EMA has no argument 'alpha'"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_a_mistake_is_answered_in_one_line(case: str) -> None:
    flag, message = MISUSE[case]
    outcome = cli("fit", "--config", "quickstart", flag)
    assert outcome.code in (1, 2)
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("runs").exists()


def test_an_added_trick_can_be_changed_in_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--trainer.callbacks+=EMA", "--trainer.callbacks.EMA.decay", "0.99", "--trainer.callbacks+=MixUp")
    made = built(monkeypatch, *FIT, *words)
    tricks = {type(each).__name__: each for each in made.trainer.callbacks if isinstance(each, Trick)}
    assert list(tricks) == ["EMA", "MixUp"]
    assert vars(tricks["EMA"])["decay"] == 0.99
    config = json.loads(json.dumps(made.config.fit.trainer.callbacks, default=str))
    assert len(config) == 2
