"""Losses and weights that are not finite: one warning, or a stop; valid JSON; one message in all commands."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import FIT, QUIET, checkpoint, cli, done, workplace, write_images
from helpers.fits import make_trainer
from helpers.modules import image_and_label, lightning, module_class, train_loader
from torch import Tensor, nn

from lit_tricks.callbacks import EMA, SWA, KnowledgeDistillation
from lit_tricks.commands import average
from lit_tricks.models import load_weights
from lit_tricks.run.finite_loss import FiniteLoss
from lit_tricks.run.saving import BestCheckpoint
from lit_tricks.utils.finite import all_finite, first_not_finite, first_not_finite_in, to_json

pl = lightning()
VALUES = (math.nan, math.inf, -math.inf)
SGD = ("--model.optimizer=SGD", "--model.optimizer.lr=1e30")
MESSAGE = "the weights are not finite: "


# ---------------------------------------------------------------------------------------------------------------------
# The loss


class Losing(module_class("lightning")):  # type: ignore[misc]
    """Has a loss of a certain value in some steps."""

    def __init__(self, losses: dict[int, float], form: str = "tensor", manual: bool = False) -> None:
        super().__init__(manual=manual)
        self.losses, self.form, self.step = losses, form, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.step += 1
        if not self.automatic_optimization:
            super().training_step(batch, batch_idx)
            if self.step in self.losses:
                with torch.no_grad():
                    self.net[1].bias[0] = self.losses[self.step]
            return None
        loss = super().training_step(batch, batch_idx)
        loss = loss * 0 + self.losses[self.step] if self.step in self.losses else loss
        return {"loss": loss, "more": 1} if self.form == "dict" else loss


def fitted(module: Any, *callbacks: Any, **kwargs: Any) -> list[str]:
    """Warnings of a fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(*callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **kwargs}).fit(module, train_loader())
    return [str(warning.message) for warning in caught if "on_nan" in str(warning.message)]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("form", ["tensor", "dict"])
@pytest.mark.parametrize("steps", [(1,), (3,), (3, 5), (8,)])
def test_the_first_step_with_a_loss_that_is_not_finite_is_named_once(value, form, steps):
    [warning] = fitted(Losing(dict.fromkeys(steps, value), form), FiniteLoss())
    assert f"step {steps[0]} is {value:g}" in warning
    assert "learning rate" in warning


@pytest.mark.parametrize("trick", [EMA(0.5), SWA(0.1)], ids=["EMA", "SWA"])
def test_it_is_named_beside_an_average(trick):
    [warning] = fitted(Losing({3: math.nan}), deepcopy(trick), FiniteLoss())
    assert "step 3 is nan" in warning


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_run_stops_there(step):
    module = Losing({step: math.nan})
    with pytest.raises(RuntimeError, match=f"step {step} .*on_nan='stop'"):
        fitted(module, FiniteLoss("stop"))
    assert module.step == step


def test_accumulated_batches_are_seen_one_by_one():
    [warning] = fitted(Losing({2: math.nan}), FiniteLoss(), accumulate_grad_batches=4)
    assert "step 0 is nan" in warning  # no optimizer step is over


@pytest.mark.parametrize("on_nan", ["warn", "stop"])
def test_weights_are_seen_without_a_loss(on_nan):
    module = Losing({3: math.inf}, manual=True)
    if on_nan == "warn":
        [warning] = fitted(module, FiniteLoss())
        assert "is not finite after step 8" in warning
    else:
        with pytest.raises(RuntimeError, match="is not finite after step 8"):
            fitted(module, FiniteLoss("stop"))


def test_finite_runs_hear_nothing_and_a_second_fit_begins_anew():
    check = pickle.loads(pickle.dumps(FiniteLoss()))
    assert not fitted(Losing({}), check)
    assert fitted(Losing({2: math.nan}), check)
    assert fitted(Losing({2: math.nan}), deepcopy(check))


@pytest.mark.parametrize("value", [None, "", "nan", True, 0, [], "Stop"])
def test_rejects_another_choice(value):
    with pytest.raises(ValueError, match="on_nan="):
        FiniteLoss(value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("step", [1, 3, 8])
def test_the_step_is_named_on_a_gpu(step):
    [warning] = fitted(Losing({step: math.nan}), FiniteLoss(), accelerator="gpu", max_epochs=40)
    assert f"step {step} is nan" in warning


# ---------------------------------------------------------------------------------------------------------------------
# The best checkpoint, and JSON


class Scored(module_class("lightning")):  # type: ignore[misc]
    """Has a score in each validation, and may have weights that are not finite."""

    def __init__(self, scores: list[float], bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scores, self.bad = scores, bad

    def on_validation_start(self) -> None:
        if self.trainer.current_epoch in self.bad:
            with torch.no_grad():
                self.net[1].bias[0] = math.nan

    def on_validation_epoch_end(self) -> None:
        self.log("score", self.scores[self.trainer.current_epoch])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        image_and_label(batch)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(
    ("scores", "bad", "best"),
    [
        ([math.nan, 0.5, math.nan], (), 1),
        ([math.nan, math.nan, 0.5], (), 2),
        ([0.5, math.inf, -math.inf], (), 0),
        ([0.5, 0.5, 0.5], (1, 2), 0),
        ([0.1, 0.9, 0.5], (1, 2), 0),
        ([math.nan] * 3, (), None),
        ([0.5] * 3, (0, 1, 2), None),
    ],
)
def test_the_best_checkpoint_is_finite(mode, scores, bad, best, tmp_path):
    saver = BestCheckpoint(tmp_path / "saved", "best", monitor="score", mode=mode)
    make_trainer(saver, enable_checkpointing=True).fit(Scored(scores, bad), train_loader(), train_loader())
    if best is None:
        assert saver.best_model_path == ""
        assert not (tmp_path / "saved").exists()
        return
    content = torch.load(saver.best_model_path, weights_only=True)
    assert content["epoch"] == best
    assert first_not_finite(content["state_dict"]) is None


def test_the_best_checkpoint_without_a_score_is_finite(tmp_path):
    saver = BestCheckpoint(tmp_path / "saved", "best")
    make_trainer(saver, enable_checkpointing=True).fit(Scored([0.5] * 3, (1,)), train_loader(), train_loader())
    assert torch.load(saver.best_model_path, weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("value", [*VALUES, 1.5, 0, True, None, "NaN"])
def test_json_has_no_numbers_that_are_not_finite(value):
    def reject(token: str) -> None:
        raise AssertionError(token)

    nested = {"a": [value, {"b": (value,)}], "c": value}
    read = json.loads(to_json(nested, indent=2), parse_constant=reject)
    expected = None if isinstance(value, float) and not math.isfinite(value) else value
    assert read == {"a": [expected, {"b": [expected]}], "c": expected}


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT)
    return folder / "runs/tiny/v0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


def poisoned(trained: Path, value: float, name: str) -> Path:
    """A copy of the checkpoint with one value that is not finite."""
    content = checkpoint(trained / "checkpoints/best.ckpt")
    assert name in content["state_dict"]
    content["state_dict"][name].view(-1)[-1] = value
    path = Path("run/checkpoints/best.ckpt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    (path.parents[1] / "results.json").write_text((trained / "results.json").read_text())
    return path


COMMANDS: dict[str, tuple[str, ...]] = {
    "resume": (*FIT, "--ckpt_path", "CKPT", "--trainer.max_epochs=2"),
    "validate": ("validate", "--ckpt_path", "CKPT", *QUIET),
    "test": ("test", "--ckpt_path", "CKPT", *QUIET),
    "predict": ("predict", "--ckpt", "CKPT", "--images", "images", "--output", "out.csv"),
    "export safetensors": ("export", "CKPT", "--format", "safetensors", "-o", "out.safetensors"),
    "export timm": ("export", "CKPT", "--format", "timm", "-o", "out"),
    "export torch-export": ("export", "CKPT", "--format", "torch-export", "-o", "out.pt2"),
    "fixres": ("fixres", "--ckpt", "CKPT", "--test-size", "16", "-o", "out.ckpt"),
    "resolution": ("resolution", "--ckpt", "CKPT", "--sizes", "8", "--out", "out"),
    "average": ("average", "GOOD", "CKPT", "-o", "out.ckpt"),
    "average first": ("average", "CKPT", "GOOD", "-o", "out.ckpt"),
    "average with data": ("average", "GOOD", "CKPT", "-o", "out.ckpt", "--data", "Digits"),
    "card": ("card", "CKPT", "-o", "out.md"),
    "start from weights": (*FIT, "--model.weights", "CKPT"),
    "teacher": (*FIT, "--trainer.callbacks+=KnowledgeDistillation", "--trainer.callbacks.teacher", "CKPT"),
}
NAMES = ("model.layer1.0.bn2.weight", "model.fc.bias", "model.bn1.running_var")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_rejects_weights_that_are_not_finite_in_one_message(command, trained):
    write_images(Path("images"), 1)
    name = NAMES[len(command) % len(NAMES)]
    path = poisoned(trained, VALUES[len(command) % len(VALUES)], name)
    words = {"CKPT": str(path), "GOOD": str(trained / "checkpoints/best.ckpt")}
    outcome = cli(*(words.get(word, word) for word in COMMANDS[command]))
    assert outcome.code == 1, outcome
    assert MESSAGE in outcome.err
    assert name.removeprefix("model.") in outcome.err
    assert "lower learning rate" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(Path().glob("out*"))


@pytest.mark.slow
def test_a_report_tells_it_and_is_written(trained):
    path = poisoned(trained, math.nan, "model.fc.bias")
    outcome = cli("report", str(path.parents[1]))
    assert outcome.code == 0, outcome
    assert MESSAGE in outcome.log
    assert MESSAGE in Path("run/report.md").read_text()
    assert MESSAGE not in cli("report", str(trained), "--out", "other").log


@pytest.mark.slow
def test_a_run_that_diverges_warns_once_and_leaves_valid_files():
    outcome = _run(*FIT, *SGD, "--trainer.max_epochs=2")
    assert outcome.code == 0, outcome
    run = Path("runs/tiny/v0")
    read = json.loads((run / "results.json").read_text(), parse_constant=lambda token: pytest.fail(token))
    assert read["best_checkpoint"] == ""
    assert None in read["raw"]["val"].values()
    assert not (run / "checkpoints/best.ckpt").exists()
    json.loads((run / "tricks.json").read_text(), parse_constant=lambda token: pytest.fail(token))
    done("report", str(run))
    outcome = cli(*FIT, "--ckpt_path", str(run))
    assert (outcome.code, MESSAGE in outcome.err) == (1, True), outcome


def _run(*words: str) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = cli(*words)
    warned = [str(warning.message) for warning in caught if "on_nan" in str(warning.message)]
    assert len(warned) == 1, warned
    return outcome


@pytest.mark.slow
def test_a_run_that_diverges_stops_if_it_is_to():
    outcome = cli(*FIT, *SGD, "--on_nan", "stop")
    assert outcome.code == 1
    assert "on_nan" in outcome.err
    assert "step 2 " in outcome.err
    assert not Path("runs/tiny/v0/results.json").exists()
    outcome = cli(*FIT, "--on_nan", "later")
    assert outcome.code == 2
    assert "on_nan" in outcome.err


def test_buffers_that_are_not_finite_are_no_weights():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
            self.register_buffer("sentinel", torch.tensor([math.nan]))

    module = Masked()
    assert all_finite(module)
    assert first_not_finite_in(module) is None
    assert first_not_finite(module.state_dict(), dict(module.named_parameters())) is None
    assert first_not_finite({"mask": module.mask}) is None
    module.norm.running_mean[0] = math.inf
    assert not all_finite(module)
    assert first_not_finite_in(module) == first_not_finite(module.state_dict()) == "norm.running_mean"


def test_an_average_of_a_masked_module_is_made(tmp_path):
    states = []
    for number in range(2):
        state: dict[str, Tensor] = {"mask": torch.tensor([0.0, -math.inf]), "layer.weight": torch.ones(2) * number}
        content = {"pytorch-lightning_version": "2.6.0", "state_dict": state, "hyper_parameters": {}}
        torch.save(content, tmp_path / f"{number}.ckpt")
        states.append(str(tmp_path / f"{number}.ckpt"))
    average(states, str(tmp_path / "soup.ckpt"))
    soup = checkpoint(tmp_path / "soup.ckpt")["state_dict"]
    assert soup["layer.weight"].tolist() == [0.5, 0.5]
    assert soup["mask"].tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("value", VALUES)
def test_weights_and_teachers_in_python_too(value, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    bad = deepcopy(network)
    with torch.no_grad():
        bad[1].weight[0, 0] = value
    torch.save(bad.state_dict(), tmp_path / "bad.pth")
    with pytest.raises(RuntimeError, match=r"not finite: '1\.weight'"):
        load_weights(network, str(tmp_path / "bad.pth"))
    with pytest.raises(RuntimeError, match=r"not finite: '1\.weight'"):
        make_trainer(KnowledgeDistillation(bad)).fit(module_class("lightning")(), train_loader(), train_loader())
