"""``lit-tricks calibrate``: the checkpoint and its files, exports of it, and what is rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import FIT, QUIET, checkpoint, cli, done, results, workplace
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_tricks import Classifier
from lit_tricks.commands import average, calibrate, export
from lit_tricks.commands.predicting.loading import load
from lit_tricks.data import Digits
from lit_tricks.functional import calibration_scores, fit_temperature, tta_views

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_diagram_has_both_curves() -> None:
    pixels = np.asarray(Image.open("calibrated.png").convert("RGB")).reshape(-1, 3)
    colors = {tuple(color) for color in pixels.tolist()}
    assert len(colors) > 20
    assert len(pixels) > 100_000


@pytest.mark.slow
def test_vector_reports_the_changed_predictions() -> None:
    calibrate(ckpt=BEST, output="vector.ckpt", kind="vector")
    (before, _), (after, _) = logits_of(BEST), logits_of("vector.ckpt")
    result = json.loads(Path("vector.json").read_text())
    assert len(result["temperatures"]) == len(result["offsets"]) == 10
    assert abs(result["changed"] - int((after.argmax(1) != before.argmax(1)).sum())) <= 1


@pytest.mark.slow
def test_same_images_that_chose_the_checkpoint_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    calibrate(ckpt=BEST, output="again.ckpt")
    assert "val/top1 of the same images chose" in caplog.text
    caplog.clear()
    calibrate(ckpt=BEST, output="again.ckpt", data=Digits(split_seed=1), overwrite=True)
    assert "chose" not in caplog.text
    calibrate(ckpt="again.ckpt", output="twice.ckpt")
    assert "is calibrated already" in caplog.text
    calibrate(ckpt=BEST, output="again.ckpt", data=Digits(batch_size=90, num_workers=0), overwrite=True)
    assert "val/top1 of the same images chose" in caplog.text


@pytest.mark.slow
def test_validation_that_chose_an_average_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As ``lit-tricks average`` with --greedy, or with several lengths, writes it."""
    average([BEST, "runs/tiny/v0/checkpoints/last.ckpt"], "soup.ckpt", greedy=True, data=Digits(num_workers=0))
    calibrate(ckpt="soup.ckpt", output="of_soup.ckpt")
    assert "val/top1 of the same images chose soup.ckpt" in caplog.text


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_results_of_a_fit_name_the_calibrated_split() -> None:
    """The validation row is from before the calibration, so that the two rows are not compared."""
    outcome = cli(*FIT, "--config=tricks/temperature_scaling", "--name=marked")
    assert outcome.code == 0, outcome
    assert "test (calibrated)" in outcome.out
    assert "val (calibrated)" not in outcome.out
    assert results("runs/marked/v0")["calibrated"] == ["test"]
    assert "| test (calibrated) |" in Path("runs/marked/v0/report.md").read_text()


@pytest.mark.slow
def test_views_of_the_run_are_calibrated() -> None:
    """The reference is the mean of softmaxes over the views, by hand."""
    Path("tta/checkpoints").mkdir(parents=True)
    shutil.copy(BEST, "tta/checkpoints/best.ckpt")
    views = "{class_path: lit_tricks.TestTimeAugment, init_args: {scales: [1.0, 1.25]}}"
    Path("tta/config.yaml").write_text(f"trainer: {{callbacks: [{{class_path: lit_tricks.EMA}}, {views}]}}")
    calibrate(ckpt="tta/checkpoints/best.ckpt", output="tta.ckpt")
    done("calibrate", "--ckpt", "tta/checkpoints/best.ckpt", "-o", "one.ckpt", "--test_time_augment", "none")
    words = ("--test_time_augment", "TestTimeAugment", "--test_time_augment.crops", "5")
    done("calibrate", "--ckpt", BEST, "-o", "five.ckpt", *words)
    results = [json.loads(Path(f"{name}.json").read_text()) for name in ("tta", "one", "five")]
    assert [result["views"] for result in results] == [4, 1, 10]
    model = Classifier.load_from_checkpoint(BEST, map_location="cpu", weights_only=True).eval()
    data = Digits(batch_size=1000)
    data.setup("validate")
    [(images, labels)] = list(data.val_dataloader())
    with torch.no_grad():
        logits = torch.stack([model(view) for view in tta_views(images, True, 1, [1.0, 1.25])]).double()
    temperature = results[0]["temperatures"][0]
    assert temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-3)
    nll = -(logits / temperature).softmax(2).mean(0)[torch.arange(len(labels)), labels].log().mean()
    assert results[0]["after"]["nll"] == pytest.approx(float(nll), rel=1e-4)


NET = """
import torch
from torch import nn
from torch.nn import functional as F


class Cosine(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 3 * F.linear(F.normalize(images.flatten(1)), F.normalize(self.fc.weight))
"""


@pytest.mark.slow
def test_network_without_a_layer_that_scales_is_loaded_by_all_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer has the temperature: in predictions, tests and exports. Formats without it are rejected."""
    Path("cosine_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    config = Path("tiny.yaml").read_text().replace("model_args: {", "model: {class_path: cosine_net.Cosine} #")
    Path("cosine.yaml").write_text(config)
    done("fit", "--config", "cosine.yaml", "--name=cosine")
    best = "runs/cosine/v0/checkpoints/best.ckpt"
    done("calibrate", "--ckpt", best, "-o", "cosine.ckpt")
    (before, labels), (after, _) = logits_of(best), logits_of("cosine.ckpt")
    temperature = fit_temperature(before, labels)
    assert abs(temperature - 1) > 0.05
    torch.testing.assert_close(after, before / temperature, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.argmax(1), before.argmax(1))
    result = json.loads(Path("cosine.json").read_text())
    assert (result["layers"], result["is_buffer"]) == (["logit_scaling"], True)
    data = Digits(batch_size=1000)
    data.setup("validate")
    [(images, _)] = list(data.val_dataloader())
    model, _ = load("cosine.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(model.predict_step(images), (before / temperature).softmax(1), rtol=1e-3, atol=1e-5)
    export("cosine.ckpt", format="torch-export", output="cosine.pt2")
    torch.testing.assert_close(torch.export.load("cosine.pt2").module()(images), after)
    for form in ("timm", "safetensors"):
        with pytest.raises(ValueError, match="has only the network: choose --format onnx"):
            export("cosine.ckpt", format=form, output="x")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    [scores] = trainer.validate(model, data, ckpt_path="cosine.ckpt", verbose=False, weights_only=True)
    assert scores["val/loss"] == pytest.approx(float(F.cross_entropy(before / temperature, labels)), rel=1e-4)
