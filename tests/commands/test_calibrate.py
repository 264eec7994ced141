"""``lit-tricks calibrate``: the checkpoint and its files, exports of it, and what is rejected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import FIT, QUIET, checkpoint, cli, done, results, workplace
from PIL import Image
from torch import Tensor

from lit_tricks import Classifier
from lit_tricks.commands import calibrate, export
from lit_tricks.data import Digits
from lit_tricks.functional import calibration_scores, fit_temperature

BEST = "runs/tiny/v0/checkpoints/best.ckpt"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny network, trained on the digits with EMA, and calibrated."""
    with workplace(tmp_path_factory.mktemp("run")) as path:
        done(*FIT, "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5")
        done("calibrate", "--ckpt", "runs/tiny/v0", "-o", "calibrated.ckpt")
        yield path


def logits_of(path: str) -> tuple[Tensor, Tensor]:
    """Return the logits of the validation images, and their labels."""
    model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    data = Digits(batch_size=1000)
    data.setup("validate")
    [(images, labels)] = list(data.val_dataloader())
    with torch.no_grad():
        return model(images), labels


def test_weights_are_scaled_and_the_arg_max_stays() -> None:
    (before, labels), (after, _) = logits_of(BEST), logits_of("calibrated.ckpt")
    temperature = fit_temperature(before, labels)
    torch.testing.assert_close(after, before / temperature, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.argmax(1), before.argmax(1))
    result = json.loads(Path("calibrated.json").read_text())
    assert result["temperatures"] == [pytest.approx(temperature, rel=1e-4)]
    assert (result["samples"], result["changed"], result["layers"]) == (len(labels), 0, ["model.fc"])
    for which, logits in (("before", before), ("after", after)):
        for name, value in calibration_scores(logits, labels)._asdict().items():
            assert result[which][name] == pytest.approx(value, abs=1e-4), (which, name)
    assert result["after"]["nll"] < result["before"]["nll"]


def test_checkpoint_keeps_all_but_the_state_of_the_run() -> None:
    old, new = checkpoint(BEST), checkpoint("calibrated.ckpt")
    assert set(old) - set(new) == {"callbacks", "loops", "lr_schedulers", "optimizer_states", "optimizers"}
    assert new["hyper_parameters"] == old["hyper_parameters"]
    assert new["calibration"]["weights"] == "averaged"
    changed = {name for name, value in old["state_dict"].items() if not torch.equal(value, new["state_dict"][name])}
    assert changed == {"model.fc.weight", "model.fc.bias"}
    outcome = cli("fit", "--ckpt_path", "calibrated.ckpt")
    assert outcome.code == 1
    assert "no state of a run to continue" in outcome.err


def test_it_is_tested_and_exported_as_any_checkpoint() -> None:
    tops = [done("test", "--ckpt_path", path, *QUIET).out for path in (BEST, "calibrated.ckpt")]
    accuracies = [line.split("│")[3] for out in tops for line in out.splitlines() if "test" in line]
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert "averaged weights" in tops[1]
    export("calibrated.ckpt", format="torch-export", output="calibrated.pt2")
    network = torch.export.load("calibrated.pt2").module()
    image = torch.rand(1, 1, 8, 8)
    model = Classifier.load_from_checkpoint("calibrated.ckpt", map_location="cpu", weights_only=True).eval()
    torch.testing.assert_close(network(image), model(image))


def test_diagram_has_both_curves() -> None:
    pixels = np.asarray(Image.open("calibrated.png").convert("RGB")).reshape(-1, 3)
    colors = {tuple(color) for color in pixels.tolist()}
    assert len(colors) > 20
    assert len(pixels) > 100_000


def test_vector_reports_the_changed_predictions() -> None:
    calibrate(ckpt=BEST, output="vector.ckpt", kind="vector")
    (before, _), (after, _) = logits_of(BEST), logits_of("vector.ckpt")
    result = json.loads(Path("vector.json").read_text())
    assert len(result["temperatures"]) == len(result["offsets"]) == 10
    assert abs(result["changed"] - int((after.argmax(1) != before.argmax(1)).sum())) <= 1


def test_same_images_that_chose_the_checkpoint_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    calibrate(ckpt=BEST, output="again.ckpt")
    assert "val/top1 of the same images chose" in caplog.text
    caplog.clear()
    calibrate(ckpt=BEST, output="again.ckpt", data=Digits(split_seed=1), overwrite=True)
    assert "chose" not in caplog.text
    calibrate(ckpt="again.ckpt", output="twice.ckpt")
    assert "is calibrated already" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ckpt", BEST, "-o", "calibrated.ckpt"), "calibrated.ckpt exists"),
        (("--ckpt", BEST, "-o", "no/such.ckpt"), "lies in a folder that does not exist"),
        (("--ckpt", BEST, "-o", "some.png"), "end its name with .ckpt"),
        (("--ckpt", BEST, "-o", BEST, "--overwrite"), "choose another name"),
        (("--ckpt", "none.ckpt", "-o", "some.ckpt"), "there is no such file"),
        (("--ckpt", BEST, "-o", "some.ckpt", "--classifier", "fc"), "no such module"),
        (("--ckpt", BEST, "-o", "some.ckpt", "--kind", "matrix"), "kind"),
        (("--ckpt", BEST), "-o"),
    ],
)
def test_wrong_arguments_are_one_line(words: tuple[str, ...], message: str) -> None:
    outcome = cli("calibrate", *words)
    assert outcome.code
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_results_of_a_fit_name_the_calibrated_split() -> None:
    """The validation row is from before the calibration, so that the two rows are not compared."""
    outcome = cli(*FIT, "--config=tricks/temperature_scaling", "--name=marked")
    assert outcome.code == 0, outcome
    assert "test (calibrated)" in outcome.out
    assert "val (calibrated)" not in outcome.out
    assert results("runs/marked/v0")["calibrated"] == ["test"]
    assert "| test (calibrated) |" in Path("runs/marked/v0/report.md").read_text()
