"""``lit-tricks average``: its numbers, its file, what it rejects, and that it leaves nothing half."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rich.console
import rich.progress
import torch
from helpers.cli import FIT, QUIET, checkpoint, cli, done, logits_of, workplace
from helpers.fits import log_lines, make_trainer
from helpers.modules import datamodule_class, eval_loader, module_class, train_loader

from lit_tricks.commands import average
from lit_tricks.commands.checkpoint_average import mean_of
from lit_tricks.data import Digits

DATA = ("--data=Digits",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoints of three runs from the same weights, one of them with EMA."""
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        for words in (("--model.optimizer=SGD", "--model.optimizer.lr=0.02"), (), ("--trainer.callbacks+=EMA",)):
            done(*FIT, *words)
    return [str(folder / f"runs/tiny/v{number}/checkpoints/last.ckpt") for number in range(3)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


def state(path: Any) -> dict[str, torch.Tensor]:
    return dict(checkpoint(path)["state_dict"])


# ---------------------------------------------------------------------------------------------------------------------
# The average


def test_mean_is_that_of_float64():
    states = [
        {
            "half": torch.tensor([1.0, 60000.0], dtype=torch.float16),  # two of them are beyond what float16 has
            "wide": torch.tensor([1e8, value]),
            "count": torch.tensor(number),
            "mask": torch.tensor([number == 5]),
        }
        for number, value in ((5, 1.0), (7, 2.0), (9, 6.0))
    ]
    mean = mean_of(states)
    assert mean["half"].tolist() == [1.0, 60000.0 // 32 * 32]
    assert mean["wide"].tolist() == [1e8, 3.0]
    assert mean["count"] == 5
    assert mean["mask"].item() is True
    assert {name: value.dtype for name, value in mean.items()} == {name: v.dtype for name, v in states[0].items()}
    assert states[0]["wide"].tolist() == [1e8, 1.0]


@pytest.mark.slow
def test_uniform_average_of_the_command(trained):
    outcome = done("average", *trained, "-o", "x.ckpt")
    assert "statistics of BatchNorm are averaged, not re-estimated: give --data" in outcome.log
    assert f"x.ckpt: the average of {', '.join(trained)}" in outcome.log
    states = [state(path) for path in trained]
    for name, value in state("x.ckpt").items():
        expected = states[0][name]
        if value.is_floating_point():
            expected = torch.stack([each[name].double() for each in states]).mean(0).to(value.dtype)
        assert torch.equal(value, expected), name
    assert [path.name for path in Path().iterdir() if "ckpt" in path.name] == ["x.ckpt"]


@pytest.mark.slow
def test_averaged_checkpoint_loads_like_any_other(trained):
    done("average", *trained, "--output=x.ckpt", *DATA)
    content = checkpoint("x.ckpt")
    assert content["averaged_from"] == trained
    assert not {"callbacks", "optimizer_states", "lr_schedulers", "loops", "optimizers"} & content.keys()
    assert logits_of("x.ckpt", torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert "top1" in done("test", "--ckpt_path=x.ckpt", *QUIET, "--trainer.limit_test_batches=1").out


@pytest.mark.slow
def test_batchnorm_is_re_estimated_for_the_new_weights(trained):
    done("average", *trained, "-o", "without.ckpt")
    done("average", *trained, "-o", "with.ckpt", *DATA, "--data.batch_size=1257")
    data = Digits(batch_size=1257)
    data.setup("fit")
    [(images, _)] = data.train_dataloader()
    without, with_data = state("without.ckpt"), state("with.ckpt")
    changed = {name for name, value in with_data.items() if not torch.equal(value, without[name])}
    assert changed == {name for name in without if name.endswith(("running_mean", "running_var"))}
    first = next(name for name in with_data if with_data[name].dim() == 4)
    norm = next(name for name in with_data if name.endswith("running_mean")).removesuffix(".running_mean")
    seen = torch.nn.functional.conv2d(images.double(), with_data[first].double(), padding=1)
    for kind, expected in (("running_mean", seen.mean((0, 2, 3))), ("running_var", seen.var((0, 2, 3), correction=0))):
        torch.testing.assert_close(with_data[f"{norm}.{kind}"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--config=data/digits",), ("-c", "run.yaml"), DATA])
def test_data_comes_from_a_flag_or_from_the_configuration_of_a_run(words, trained):
    run = Path(trained[0]).parents[1] / "config.yaml"
    Path("run.yaml").write_text(run.read_text())
    outcome = done("average", *trained, "-o", "x.ckpt", *words, "--num_samples=100")
    assert "not re-estimated" not in outcome.log


@pytest.mark.slow
def test_averaged_weights_of_ema_are_taken(trained):
    done("average", trained[0], trained[2], "-o", "x.ckpt")
    name = "model.fc.weight"
    expected = (state(trained[0])[name].double() + state(trained[2])[name].double()) / 2
    assert checkpoint(trained[2])["callbacks"]["EMA"]["raw"]
    assert torch.equal(state("x.ckpt")[name], expected.float())


# ---------------------------------------------------------------------------------------------------------------------
# The greedy soup


class Scored(module_class("lightning")):  # type: ignore[misc]
    """Its metric is how near its first bias is to 1, so that soups can be worked out by hand."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.nn.init.constant_(self.net[1].bias, value)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/top1", 1 - (self.net[1].bias[0] - 1).abs())


def scored(*values: float) -> list[str]:
    paths = []
    for value in values:
        trainer, module = make_trainer(max_epochs=0), Scored(value)
        trainer.fit(module, train_loader(), eval_loader())
        paths.append(f"{value}.ckpt")
        trainer.save_checkpoint(paths[-1], weights_only=False)
    return paths


def data() -> Any:
    return datamodule_class("lightning")()


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ((0.0, 0.6, 1.5, 1.4), ["0.6.ckpt", "1.4.ckpt"]),  # in the order of single scores: 0.6, 1.4, 1.5, 0.0
        ((2.0, 1.0, 0.0), ["1.0.ckpt"]),  # the mean with either is worse, and with both it would be as good
        ((1.2, 1.1, 0.9), ["1.1.ckpt", "0.9.ckpt"]),
        ((1.5, 1.5001), ["1.5.ckpt"]),
    ],
)
def test_greedy_takes_what_does_not_make_it_worse(values, taken):
    paths = scored(*values)
    with log_lines() as records:
        average(paths, "x.ckpt", greedy=True, data=data(), module=Scored())
    assert checkpoint("x.ckpt")["averaged_from"] == taken
    expected = sum(float(path.removesuffix(".ckpt")) for path in taken) / len(taken)
    assert state("x.ckpt")["net.1.bias"][0] == pytest.approx(expected)
    lines = [record.getMessage() for record in records]
    assert len(lines) == len(paths) + 1
    assert re.match(rf"{taken[0]}: val/top1 [\d.]+, by itself$", lines[0])


def test_greedy_with_a_metric_that_should_be_small():
    average(scored(0.0, 2.5, 1.0), "x.ckpt", greedy=True, mode="min", data=data(), module=Scored())
    assert checkpoint("x.ckpt")["averaged_from"] == ["2.5.ckpt"]


@pytest.mark.slow
def test_greedy_soup_is_at_least_as_good_as_the_best(trained):
    outcome = done("average", *trained, "-o", "x.ckpt", "--greedy", *DATA, "--metric=val/loss", "--mode=min")
    assert outcome.log.count("by itself") == 3
    assert outcome.out == ""  # no progress bar where there is no terminal
    scores = [
        float(line.split("val/loss ")[1].split(",")[0]) for line in outcome.log.splitlines() if "by itself" in line
    ]
    chosen = checkpoint("x.ckpt")["averaged_from"]
    assert 1 <= len(chosen) <= 3
    assert scores[0] < 3


def test_greedy_names_the_metrics_that_there_are(trained):
    outcome = cli("average", *trained, "-o", "x.ckpt", "--greedy", *DATA, "--metric=val/acc")
    assert re.search(r"metric='val/acc' is not logged in validation; there are .*val/top1", outcome.err)
    assert outcome.code == 1
    assert not Path("x.ckpt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What it rejects


def rejected(message: str, *words: str) -> None:
    before = sorted(Path().iterdir())
    outcome = cli("average", *words)
    assert re.fullmatch(rf"lit-tricks: error: {message}\n", outcome.err), outcome
    assert outcome.code in (1, 2)
    assert sorted(Path().iterdir()) == before


def changed(path: str, **tensors: torch.Tensor | None) -> str:
    content = checkpoint(path)
    for name, tensor in tensors.items():
        if tensor is None:
            del content["state_dict"][name]
        else:
            content["state_dict"][name] = tensor
    torch.save(content, "changed.ckpt")
    return "changed.ckpt"


@pytest.mark.slow
def test_rejects_other_models(trained):
    good, weight = trained[0], "model.fc.weight"
    for name, tensors, message in (
        (
            "keys",
            {weight: None},
            f"changed.ckpt is of another model than .*: .*last.ckpt has '{weight}', and changed.*",
        ),
        (
            "more keys",
            {"more": torch.zeros(1)},
            "changed.ckpt is of another model than .*: changed.ckpt has 'more', .*",
        ),
        ("shapes", {weight: torch.zeros(3, 2)}, rf"changed.ckpt .*: '{weight}' is torch.float32 of shape \(3, 2\) .*"),
        ("types", {weight: torch.zeros(10, 16, dtype=torch.long)}, f"changed.ckpt .*: '{weight}' is torch.int64 .*"),
    ):
        rejected(message, good, changed(good, **tensors), "-o", "x.ckpt"), name
    content = checkpoint(good)
    content["hyper_parameters"]["model_args"]["variant"] = "A"  # the same keys and shapes as those of B
    torch.save(content, "changed.ckpt")
    rejected("changed.ckpt is of another model than .*: model_args is .*", good, "changed.ckpt", "-o", "x.ckpt")


@pytest.mark.slow
def test_average_wrong_files_explain_themselves(trained):
    good = trained[0]
    Path("text.ckpt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(1)}, "weights.ckpt")
    Path("cut.ckpt").write_bytes(Path(good).read_bytes()[:5000])
    rejected(r"nowhere.ckpt: there is no such file\. .*", good, "nowhere.ckpt", "-o", "x.ckpt")
    Path("empty").mkdir()
    rejected("empty: this folder has no checkpoint.*", good, "empty", "-o", "x.ckpt")
    del (content := checkpoint(good))["hyper_parameters"]
    torch.save(content, "a.ckpt")
    torch.save(content, "b.ckpt")
    rejected("a.ckpt does not name the module of its weights: set --module.", "a.ckpt", "b.ckpt", "-o", "x.ckpt", *DATA)
    for bad in ("text.ckpt", "weights.ckpt", "cut.ckpt"):
        rejected(rf"{bad} is not a checkpoint of Lightning, or damaged.*", good, bad, "-o", "x.ckpt")
    rejected("average needs two checkpoints or more, got one.", good, "-o", "x.ckpt")
    rejected("a checkpoint is given twice: .*", good, good, "-o", "x.ckpt")
    rejected("--output no/x.ckpt lies in a folder that does not exist: make it first.", *trained, "-o", "no/x.ckpt")


def test_wrong_arguments_are_rejected_by_name(trained):
    rejected(".*needs CHECKPOINTS and --output.*")
    rejected(".*needs --output.*", *trained)
    rejected("there is no argument 'gredy'; did you mean 'greedy'.", *trained, "-o", "x.ckpt", "--gredy")
    rejected("--greedy compares metrics of validation data: give --data, .*", *trained, "-o", "x.ckpt", "--greedy")
    rejected("--data: 'Digts' is unknown; did you mean 'Digits'.", *trained, "-o", "x.ckpt", "--data=Digts")
    rejected("--num_samples=0 is below 1; .*", *trained, "-o", "x.ckpt", "--num_samples=0")
    rejected("--config nowhere: there is no such file.*", *trained, "-o", "x.ckpt", "--config=nowhere")


def test_existing_file_is_not_overwritten(trained):
    Path("x.ckpt").write_text("precious")
    rejected(
        "--output x.ckpt exists: choose another name, or give --overwrite to replace it.", *trained, "-o", "x.ckpt"
    )
    assert Path("x.ckpt").read_text() == "precious"
    done("average", *trained, "-o", "x.ckpt", "--overwrite")
    assert state("x.ckpt")


@pytest.mark.parametrize(("error", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
def test_an_interrupted_write_leaves_nothing_half(error, code, trained, monkeypatch):
    def save(content: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    Path("x.ckpt").write_text("precious")
    before = sorted(Path().iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert cli("average", *trained, "-o", "x.ckpt", "--overwrite").code == code
    assert Path("x.ckpt").read_text() == "precious"
    assert sorted(Path().iterdir()) == before


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal(trained, monkeypatch):
    shown: list[tuple[str, float]] = []

    class Bar(rich.progress.Progress):
        def add_task(self, description: str, **kwargs: Any) -> Any:
            shown.append((description, kwargs["total"]))
            return super().add_task(description, **kwargs)

    command = sys.modules["lit_tricks.commands.progress"]
    monkeypatch.setattr(command, "Progress", Bar)
    monkeypatch.setattr(command, "Console", lambda **_: rich.console.Console(file=io.StringIO(), force_terminal=True))
    average(trained, "x.ckpt", data=Digits(), num_samples=200)
    average(trained, "y.ckpt", data=Digits(), num_samples=200, greedy=True)
    assert shown == [("BatchNorm", 200), ("greedy soup", 5)]


def test_average_help_explains_arguments():
    assert "average" in done("--help").out
    text = done("average", "--help").out
    for word in ("CHECKPOINTS", "-o, --output", "--greedy", "--data", "Wortsman"):
        assert word in text
