"""The commands: what fit leaves, how a run continues, what validate and test make of a checkpoint, the help."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import warm
from helpers.cli import (
    COSINE,
    FIT,
    QUIET,
    TINY,
    Outcome,
    built,
    checkpoint,
    cli,
    done,
    logits_of,
    metrics,
    results,
    workplace,
    write_image_folder,
)
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from sklearn.metrics import accuracy_score, top_k_accuracy_score

import lit_tricks
from lit_tricks import Classifier, WarmupCosine, WarmupStep
from lit_tricks.data import CIFAR10, Digits
from lit_tricks.run.reading.predictions import Predictions

SUBCOMMANDS = ("fit", "validate", "test")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of three epochs, and next to it what it printed."""
    with workplace(tmp_path_factory.mktemp("trained"), curves=True) as folder:
        outcome = done(*FIT, *COSINE, "--trainer.max_epochs=3")
        (folder / "stdout").write_text(outcome.out)
    return folder / "runs" / "tiny" / "v0"


@pytest.fixture(scope="module")
def best(trained: Path) -> str:
    return str(trained / "checkpoints" / "best.ckpt")


def digits(split: str, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a split that is not shuffled."""
    data = Digits(batch_size=1000, **kwargs)
    images, labels = next(iter(getattr(data, f"{split}_dataloader")()))
    return images, labels


def evaluated(command: str, *words: str) -> dict[str, float]:
    """Metrics that a command writes; its table must have the same."""
    out = done(command, *words, "--out=found").out
    content = results("found")
    (metrics,) = [content[kind] for kind in ("raw", "averaged") if kind in content]
    ((split, values),) = metrics.items()
    row = next(line for line in out.splitlines() if f"│ {split} " in line)
    assert all(f"{value:.4f}" in row or f"{value:.2%}" in row for value in values.values())
    return {f"{split}/{name}": value for name, value in values.items()}


def expected(path: str, images: torch.Tensor, labels: torch.Tensor, split: str) -> dict[str, Any]:
    logits = logits_of(path, images).double()
    scores = logits.softmax(1).numpy()
    values = {
        f"{split}/loss": F.cross_entropy(logits, labels).item(),
        f"{split}/top1": accuracy_score(labels, scores.argmax(1)),
        f"{split}/top5": top_k_accuracy_score(labels, scores, k=5, labels=range(10)),
    }
    return {name: pytest.approx(value, abs=1e-5) for name, value in values.items()}


# What a fit leaves


@pytest.mark.slow
def test_a_run_leaves_all_of_its_folder(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    promised = {
        "config.yaml", "metrics.csv", "curves.png", "results.json", "report.md", "predictions.npz", "tricks.json"
    }  # fmt: skip
    assert files == promised | {"hparams.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    with Image.open(trained / "curves.png") as picture:
        picture.load()
        assert (picture.format, picture.width > 900) == ("PNG", True)  # three panels
    assert checkpoint(trained / "checkpoints" / "last.ckpt")["epoch"] == 2


def test_results_are_those_of_the_best_epoch_in_metrics_csv(trained: Path) -> None:
    rows = metrics(trained)
    accuracies = {row["epoch"]: row["val/top1"] for row in rows if "val/top1" in row}
    assert sorted(accuracies) == [0, 1, 2]
    epoch = max(accuracies, key=lambda epoch: accuracies[epoch])
    content = results(trained)
    assert content["best_checkpoint"] == "runs/tiny/v0/checkpoints/best.ckpt"
    assert content["epoch"] == epoch == checkpoint(trained / "checkpoints" / "best.ckpt")["epoch"]
    last = {"train": "loss_epoch", "val": "loss", "test": "loss"}
    for split, names in {"train": "loss top1", "val": "loss top1 top5 ece", "test": "loss top1 top5 ece"}.items():
        row = {k: v for row in rows for k, v in row.items() if split == "test" or row["epoch"] == epoch}
        assert content["raw"][split] == {
            name: row[f"{split}/{last[split] if name == 'loss' else name}"] for name in names.split()
        }
    assert content["raw"].keys() == {"train", "val", "test"}
    assert 0.1 < content["seconds"] < 60
    assert 0.1 < content["cpu_seconds"] < 60
    assert 0 <= content["peak_memory"] < 1e9  # 0: earlier runs of this process have left enough to use again


def test_the_numbers_are_those_of_the_best_checkpoint(trained: Path, best: str) -> None:
    for split in ("val", "test"):
        images, labels = digits(split)
        found = {f"{split}/{name}": value for name, value in results(trained)["raw"][split].items() if name != "ece"}
        assert found == expected(best, images[:64], labels[:64], split)


def test_the_table_at_the_end(trained: Path) -> None:
    out = (trained.parents[2] / "stdout").read_text()
    for split, values in results(trained)["raw"].items():
        row = next(line for line in out.splitlines() if f"│ {split} " in line)
        assert f"{values['loss']:.4f}" in row
        assert f"{values['top1']:.2%}" in row
    assert "raw weights" in out
    assert re.search(r"best checkpoint +runs/tiny/v0/checkpoints/best\.ckpt\n", out)
    assert re.search(r"curves +runs/tiny/v0/curves\.png\n", out)


def test_the_learning_rates_are_in_metrics_csv(trained: Path) -> None:
    rates = [row["lr-SGD"] for row in metrics(trained) if "lr-SGD" in row]
    cosine = [0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert rates == pytest.approx([0.05, 0.1, *cosine])


@pytest.mark.slow
def test_a_second_run_leaves_the_first_as_it_is() -> None:
    done(*FIT)
    first = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    done(*FIT, "--seed_everything=1")
    assert len(first) == 9
    assert {path: path.read_bytes() for path in first} == first
    one, other = (checkpoint(f"runs/tiny/v{i}/checkpoints/last.ckpt")["state_dict"] for i in (0, 1))
    assert not torch.equal(one["model.fc.weight"], other["model.fc.weight"])


@pytest.mark.slow
def test_the_configuration_of_a_run_repeats_it(trained: Path) -> None:
    done("fit", "--config", str(trained / "config.yaml"))
    again = Path("runs/tiny/v0")
    assert (again / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert (again / "config.yaml").read_bytes() == (trained / "config.yaml").read_bytes()
    one, other = (checkpoint(run / "checkpoints" / "last.ckpt") for run in (trained, again))
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "run"),
    [
        (("--config", "tiny.yaml"), "tiny/v0"),
        (("-c", "tiny.yaml", "--config=tricks/warmup_cosine"), "tiny/v0"),
        (("--config=tricks/warmup_cosine", "--config=tiny.yaml"), "warmup_cosine/v0"),
        (("--config=tiny.yaml", "--name", "mine"), "mine/v0"),
        (("--config=named.yaml",), "from-file/v0"),
        (("--data=Digits",), "run/v0"),
    ],
)
def test_name_of_a_run(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], run: str) -> None:
    Path("named.yaml").write_text(f"name: from-file\n{TINY}")
    built(monkeypatch, "fit", *words)
    assert [str(path) for path in Path("runs").glob("*/*")] == [f"runs/{run}"]


def test_number_of_a_run_is_the_first_above_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("v0", "v9", "v10", "vx", "old"):
        Path("elsewhere/tiny", name).mkdir(parents=True)
    built(monkeypatch, *FIT, "--trainer.default_root_dir=elsewhere")
    assert Path("elsewhere/tiny/v11").is_dir()


def test_a_trial_run_leaves_nothing() -> None:
    outcome = done(*FIT, "--trainer.fast_dev_run=1")
    assert "`Trainer.fit` stopped" in outcome.log
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_metrics_csv_needs_no_logger() -> None:
    done(*FIT, "--trainer.logger=false")
    assert results("runs/tiny/v0")["raw"]["test"]["loss"] > 0


@pytest.mark.slow
def test_a_run_without_checkpoints_or_validation() -> None:
    done(*FIT, "--trainer.enable_checkpointing=false")
    assert not Path("runs/tiny/v0/checkpoints").exists()
    content = results("runs/tiny/v0")
    assert (content["best_checkpoint"], content["raw"].keys()) == ("", {"train", "val"})
    done(*FIT, "--trainer.limit_val_batches=0")
    content = results("runs/tiny/v1")
    assert (content["best_checkpoint"], content["raw"].keys()) == (
        "runs/tiny/v1/checkpoints/best.ckpt",
        {"train", "test"},
    )


@pytest.mark.slow
def test_without_a_test_split_nothing_is_called_a_test(folder: Path) -> None:
    root = write_image_folder(folder / "images")
    words = (f"--data.root={root}", "--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0")
    # after such steps the second epoch is not the best
    epochs = ("--trainer.max_epochs=2", "--trainer.limit_val_batches=1.0", "--model.optimizer.lr=0.3")
    done(*FIT, "--data=ImageFolder", *words, *epochs)
    run = Path("runs/tiny/v0")
    assert (results(run)["epoch"], results(run)["raw"].keys()) == (0, {"train", "val"})
    assert not [key for row in metrics(run) for key in row if key.startswith("test")]
    found = Predictions.read(run / "predictions.npz")
    assert (found.split, found.weights) == ("val", "best")
    assert (found.predicted == found.label).mean() == pytest.approx(results(run)["raw"]["val"]["top1"])
    done("card", f"{run}/checkpoints/best.ckpt")
    done("report", str(run))
    for file in ("README.md", "report.md", "report.html"):
        assert not re.search(r"\| test\b|>test<|split: test|test images", (run / file).read_text()), file
    assert "split: val" in (run / "README.md").read_text()
    outcome = cli("test", f"--ckpt_path={run}/checkpoints/best.ckpt", *QUIET)
    assert outcome.code == 1
    assert re.fullmatch(r"lit-tricks: error: ImageFolder\(root=.*no test split.*validate.*\n", outcome.err)


@pytest.mark.slow
def test_averaged_weights_are_tested_and_reported_as_such() -> None:
    out = done(*FIT, "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5", "--trainer.max_epochs=2").out
    assert "averaged weights" in out
    content = results("runs/tiny/v0")
    images, labels = digits("test")
    found = {f"test/{name}": value for name, value in content["averaged"]["test"].items() if name != "ece"}
    assert found == expected(content["best_checkpoint"], images[:64], labels[:64], "test")


FOREIGN = """
import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F


class Theirs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def loss(self, batch):
        return F.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_a_foreign_module_is_trained_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("foreign.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(folder))
    content = yaml.safe_load(TINY) | {"model": {"class_path": "foreign.Theirs"}}
    Path("foreign.yaml").write_text(yaml.safe_dump(content))
    done("fit", "--config=foreign.yaml", "--trainer.max_epochs=2")
    losses = [row["val/loss"] for row in metrics("runs/foreign/v0") if "val/loss" in row]
    assert len(losses) == 2
    assert results("runs/foreign/v0")["raw"] == {"val": {"loss": losses[1]}}
    found = evaluated("validate", "--config=foreign.yaml", "--ckpt_path=runs/foreign/v0/checkpoints/last.ckpt")
    assert found == {"val/loss": pytest.approx(losses[1])}


# Continue a run

SAVES = """
trainer:
  max_epochs: 3
  limit_train_batches: 3
  callbacks+:
    - class_path: ModelCheckpoint
      init_args: {filename: "{step}", every_n_train_steps: 1, save_top_k: -1}
    - class_path: ModelCheckpoint
      init_args: {filename: "{epoch}", every_n_epochs: 1, save_top_k: -1, save_last: true}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of three epochs of three batches that was never interrupted, with checkpoints of every step."""
    with workplace(tmp_path_factory.mktemp("whole")) as folder:
        Path("saves.yaml").write_text(SAVES)
        done(*FIT, "--config=saves.yaml", *COSINE)
    return folder / "runs" / "tiny" / "v0"


def resume(run: Path, moment: str, *words: str) -> tuple[Path, Outcome]:
    """Continue a run from its checkpoint of a moment, in its own folder."""
    settings = (*FIT, *COSINE, "--trainer.max_epochs=3", "--trainer.limit_train_batches=3")
    place = ("--trainer.default_root_dir=resumed", f"--ckpt_path={run}/checkpoints/{moment}.ckpt")
    outcome = done(*settings, *place, *words)
    return Path("resumed/tiny/v0"), outcome


def values(run: Path, names: str) -> dict[tuple[float, str], float]:
    return {(row["step"], key): row[key] for row in metrics(run) for key in row if re.match(names, key)}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["epoch=0", "step=1", "step=3", "step=5"])
def test_a_resumed_run_ends_bit_by_bit_as_the_whole_one(whole: Path, moment: str) -> None:
    run, _ = resume(whole, moment)
    one, other = (checkpoint(run / "checkpoints" / "last.ckpt") for run in (whole, run))
    assert one["global_step"] == other["global_step"] == 9
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=0)
    optimizers = [content["optimizer_states"][0] for content in (one, other)]
    torch.testing.assert_close(optimizers[0]["state"], optimizers[1]["state"], rtol=0, atol=0)
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    # What is averaged over an epoch is there for whole epochs alone.
    names = "lr|train|val" if moment.startswith("epoch") else "lr|train/loss_step|val"
    before, after = values(whole, names), values(run, names)
    assert after == {key: value for key, value in before.items() if key[0] >= min(after)[0]}
    steps = [step for step, key in after if key == "train/loss_step"]
    assert steps == list(range({"epoch=0": 3, "epoch=1": 6}.get(moment) or int(moment[5:]), 9))


@pytest.mark.slow
def test_a_resumed_run_says_nothing_of_settings_that_are_the_same(whole: Path) -> None:
    _, outcome = resume(whole, "step=5")
    assert "Restored all states" in outcome.log
    assert "resumed with " not in outcome.log
    assert "seed of the resumed run" not in outcome.log


@pytest.mark.slow
def test_optimizer_settings_change_on_resume(whole: Path) -> None:
    run, outcome = resume(whole, "epoch=0", "--model.optimizer.weight_decay=0.01", "--model.optimizer.momentum=0.8")
    assert "resumed with momentum=0.8 (was 0.9), weight_decay=0.01 (was 0.0001)" in outcome.log
    (group,) = checkpoint(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.01)
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]
    assert (config["momentum"], config["weight_decay"]) == (0.8, 0.01)


@pytest.mark.slow
def test_the_learning_rate_changes_on_resume(whole: Path) -> None:
    run, _ = resume(whole, "epoch=0", "--model.optimizer.lr=0.05")
    before, after = values(whole, "lr"), values(run, "lr")
    assert after == pytest.approx({key: value / 2 for key, value in before.items() if key[0] >= 3})
    assert len(after) == 6


@pytest.mark.slow
def test_without_its_schedule_a_resumed_run_has_the_rate_of_the_optimizer(whole: Path) -> None:
    outcome = done(*FIT, "--trainer.max_epochs=3", f"--ckpt_path={whole}/checkpoints/epoch=1.ckpt")
    path = "runs/tiny/v0/checkpoints/last.ckpt"
    assert checkpoint(path)["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1
    assert "resumed with " not in outcome.log
    words = ("--trainer.max_epochs=4", f"--ckpt_path={path}", "--model.optimizer.lr=0.02")
    outcome = done(*FIT, *words)
    assert "resumed with lr=0.02 (was 0.1)" in outcome.log


@pytest.mark.slow
def test_the_schedule_and_the_length_change_on_resume(whole: Path) -> None:
    run, _ = resume(whole, "epoch=1", "--trainer.callbacks.min_lr=0.02", "--trainer.max_epochs=4")
    rates = [value for _, value in sorted(values(run, "lr").items())]
    assert rates == pytest.approx([0.02 + 0.04 * (1 + math.cos(math.pi * t / 9)) for t in range(3, 9)])
    assert checkpoint(run / "checkpoints" / "last.ckpt")["epoch"] == 3


@pytest.mark.slow
def test_the_data_change_on_resume_and_the_seed_does_not(whole: Path) -> None:
    run, outcome = resume(whole, "epoch=1", "--data.batch_size=1257", "--seed_everything=5")
    assert checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 7  # one batch in the last epoch
    assert "the data continues with the seed of the resumed run, 0" in outcome.log


def test_another_optimizer_on_resume_is_rejected(whole: Path) -> None:
    outcome = cli(*FIT, f"--ckpt_path={whole}/checkpoints/epoch=0.ckpt", "--model.optimizer=Adam")
    assert outcome.code == 1
    assert re.fullmatch(r"lit-tricks: error: .*SGD.*Adam.*--model\.weights.*\n", outcome.err)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["width=0.0625", "variant=A", "depth=34"])
def test_another_architecture_on_resume_is_rejected(best: str, change: str) -> None:
    for words in ((*FIT, "--trainer.max_epochs=9"), ("test", *QUIET)):
        outcome = cli(*words, f"--ckpt_path={best}", f"--model.model_args.{change}")
        assert outcome.code == 1
        assert re.fullmatch(r"lit-tricks: error: .*another architecture.*differ in 'model\.\w.*\n", outcome.err)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_interrupted_by_ctrl_c_it_can_be_resumed() -> None:
    words = (*FIT, *COSINE, "--trainer.max_epochs=100000")
    process = warm.start(["-m", "lit_tricks", *words], Path("out"), Path("err"))
    try:
        last = Path("runs/tiny/v0/checkpoints/last.ckpt")
        deadline = time.monotonic() + 200
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    err = Path("err").read_text()
    assert "Traceback" not in err
    assert "Detected KeyboardInterrupt" in err
    assert process.returncode > 0
    epoch = checkpoint(last)["epoch"]
    done(*FIT, *COSINE, f"--trainer.max_epochs={epoch + 2}", f"--ckpt_path={last}")
    assert [row["epoch"] for row in metrics("runs/tiny/v1") if "val/loss" in row] == [epoch + 1]


def test_interrupted_outside_of_the_training_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_tricks.cli.app.CSVLogger", interrupt)
    outcome = cli(*FIT)
    assert (outcome.code, outcome.err) == (130, "lit-tricks: interrupted\n")
    assert not Path("runs").exists()


# validate and test


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_brings_its_settings(best: str, command: str, split: str) -> None:
    found = evaluated(command, "--ckpt_path", best, *QUIET)
    assert found.pop(f"{split}/ece") >= 0
    assert found == expected(best, *digits(split), split)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_flags_win_over_the_settings_of_a_checkpoint(best: str) -> None:
    for words in (("--data.split_seed=1", "--ckpt_path", best), (f"--ckpt_path={best}", "--config=split.yaml")):
        Path("split.yaml").write_text("data: {init_args: {split_seed: 1}}")
        found = evaluated("test", *words, *QUIET)
        del found["test/ece"]
        assert found == expected(best, *digits("test", split_seed=1), "test")
    assert found != expected(best, *digits("test"), "test")


@pytest.mark.slow
def test_other_data_than_the_checkpoint_was_made_with(folder: Path) -> None:
    root = write_image_folder(folder / "images")
    words = ("--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0", "--trainer.callbacks=null")
    done(*FIT, "--data=ImageFolder", f"--data.root={root}", *words)
    root.rename(folder / "moved")
    outcome = cli("validate", "--ckpt_path=runs/tiny/v0/checkpoints/best.ckpt", *QUIET)
    assert outcome.code == 1
    assert f"root='{root}' is not a folder" in outcome.err
    found = evaluated("validate", "--ckpt_path=runs/tiny/v0/checkpoints/best.ckpt", "--data.root=moved", *QUIET)
    assert found.keys() == {"val/loss", "val/top1", "val/ece"}  # no top-5 of three classes


# Help, short names, stacking


@pytest.mark.slow
@pytest.mark.smoke
def test_the_installed_command() -> None:
    script = Path(sys.executable).with_name("lit-tricks")
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    process = subprocess.run([script, "fit", "--config=nowhere"], capture_output=True, text=True, env=environment)
    assert (process.returncode, process.stdout) == (1, "")
    imports = re.findall(r"^import time:.* ([\w.]+)$", process.stderr, re.MULTILINE)
    assert "timm.models" in imports
    assert "wandb.sdk" not in imports, "a run without W&B loads it"
    [error] = [line for line in process.stderr.splitlines() if not line.startswith("import time:")]
    assert re.fullmatch("lit-tricks: error: --config nowhere: there is no such file; .*", error)


def test_version_prints_the_version() -> None:
    assert done("--version").out == f"lit-tricks {lit_tricks.__version__}\n"


def test_help_of_the_commands() -> None:
    out = done("--help").out
    assert out.startswith("usage: lit-tricks [")
    for command in SUBCOMMANDS:
        assert re.search(rf"^    {command} +\w", out, re.MULTILINE)


@pytest.mark.slow
def test_short_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model=Classifier", "--model.optimizer=AdamW", "--trainer.callbacks+=WarmupStep")
    logger = ("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs")
    made = built(monkeypatch, "fit", "--data=CIFAR10", *words, "--trainer.callbacks.gamma=0.5", *logger)
    assert isinstance(made.datamodule, CIFAR10)
    assert isinstance(made.model, Classifier)
    assert isinstance(made.model.configure_optimizers(), torch.optim.AdamW)
    assert isinstance(made.trainer.loggers[1], TensorBoardLogger)
    (trick,) = [callback for callback in made.trainer.callbacks if isinstance(callback, WarmupStep)]
    assert trick.gamma == 0.5


@pytest.mark.slow
def test_configurations_and_flags_stack_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("more.yaml").write_text("trainer: {callbacks+: [{class_path: LearningRateMonitor}]}")
    words = ("--config", "tricks/warmup_cosine", "--config", "more.yaml", "--trainer.max_epochs=7")
    early = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss")
    made = built(monkeypatch, *FIT, *words, *early)
    kinds = [type(callback) for callback in made.trainer.callbacks]
    assert [kind for kind in kinds if kind in (WarmupCosine, LearningRateMonitor, EarlyStopping)] == [
        WarmupCosine,
        LearningRateMonitor,
        EarlyStopping,
    ]
    assert made.trainer.max_epochs == 7
    # a list without the plus replaces what was stacked
    Path("only.yaml").write_text("trainer: {callbacks: [{class_path: LearningRateMonitor}]}")
    made = built(monkeypatch, *FIT, *words, "--config=only.yaml")
    assert WarmupCosine not in [type(callback) for callback in made.trainer.callbacks]


@pytest.mark.slow
def test_a_printed_configuration_makes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*COSINE, "--model.optimizer.lr=0.3", "--data.batch_size=17")
    Path("printed.yaml").write_text(done(*FIT, *words, "--print_config").out)
    assert not Path("runs").exists()
    content = yaml.safe_load(Path("printed.yaml").read_text())
    assert content["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.3
    one = built(monkeypatch, *FIT, *words, "--name=same").config.fit
    other = built(monkeypatch, "fit", "--config=printed.yaml", "--name=same").config.fit
    del one["config"], other["config"]
    assert one == other


@pytest.mark.slow
def test_the_data_decide_classes_and_input_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(monkeypatch, *FIT).model
    assert (model.num_classes, model.class_names) == (10, [str(i) for i in range(10)])
    assert model.example_input_array.shape == (2, 1, 8, 8)
    built(monkeypatch, *FIT, "--model.num_classes=10")  # the right number is accepted
