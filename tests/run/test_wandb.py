"""Weights & Biases, the real package without a login: what a run file holds, and that nothing asks or waits."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from helpers import warm
from helpers.cli import COSINE, FIT, built, cells_in_this_process, checkpoint, cli, done, metrics, results, workplace
from helpers.fits import differences
from helpers.wandb import Tracked, stranger
from lightning.pytorch.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_tricks.run.reading.predictions import Predictions
from lit_tricks.run.wandb_run import VaryingOnly

TRACKED = (*FIT, "--config=loggers/wandb")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "home").mkdir()
    stranger(monkeypatch, tmp_path / "home")
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[None]:
    """End the process that wandb starts for all of its runs."""
    yield
    wandb.teardown()


def track(*words: str) -> None:
    """Fit with W&B, which has its say on stderr."""
    outcome = cli(*TRACKED, *words)
    assert outcome.code == 0, outcome
    assert "error" not in outcome.err


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a finished run of two epochs."""
    home = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stranger(monkeypatch, home)
        with workplace(home):
            track(*COSINE, "--trainer.max_epochs=2")
        yield home / "runs" / "tiny" / "v0"


@pytest.mark.slow
def test_without_a_login_it_is_offline_in_the_folder_of_the_run(first: Path) -> None:
    assert Tracked(first).folder.name.startswith("offline-run-")
    assert {path.name for path in first.iterdir()} == {
        "checkpoints", "config.yaml", "hparams.yaml", "metrics.csv",
        "predictions.npz", "report.md", "results.json", "tricks.json", "wandb",
    }  # fmt: skip
    assert not list(first.parents[2].glob("wandb"))


def test_the_configuration_and_the_tricks_are_there(first: Path) -> None:
    run = Tracked(first)
    assert (run.run.project, run.run.display_name) == ("lit-tricks", "tiny-v0")
    assert run.config["tricks"] == json.loads((first / "tricks.json").read_text())
    assert run.config["tricks"]["WarmupCosine"]["effect"].startswith("0 -> 0.1 in 2 steps")
    config = yaml.safe_load((first / "config.yaml").read_text())
    for key in ("seed_everything", "model", "data", "name"):
        assert run.config["config"][key] == config[key]
    assert run.config["config"]["trainer"]["max_epochs"] == 2
    assert run.config["config"]["trainer"]["callbacks"] == config["trainer"]["callbacks"]


def test_a_picture_of_the_first_batch_is_there_once(first: Path) -> None:
    steps = [row["trainer/global_step"] for row in Tracked(first).history if any("data/preview" in key for key in row)]
    assert steps == [0]
    [file] = Tracked(first).folder.glob("files/media/images/data/preview*.png")
    assert file.stat().st_size > 10_000


def test_the_history_is_that_of_metrics_csv(first: Path) -> None:
    shown: dict[tuple[float, str], float] = {}
    for row in Tracked(first).history:
        if any(key.endswith("/path") for key in row):
            continue  # tables
        step = row["trainer/global_step"]
        row = {key: value for key, value in row.items() if not key.startswith("data/preview")}  # a picture
        shown |= {(step, key): value for key, value in row.items() if "/" in key or key.startswith("lr")}
    rows = metrics(first)
    written = {(row["step"], key): row[key] for row in rows for key in row if key not in ("epoch", "step")}
    assert {key for _, key in written} >= {
        "lr-SGD",
        "train/loss_step",
        "train/top1",
        "val/loss",
        "val/top1",
        "test/ece",
    }
    assert {key: value for key, value in shown.items() if key[1] != "trainer/global_step"} == pytest.approx(written)


def table_of(run: Tracked, name: str) -> dict[str, Any]:
    """Content of a table that was logged once."""
    [row] = [row for row in run.history if f"{name}/path" in row]
    content: dict[str, Any] = json.loads((run.folder / "files" / row[f"{name}/path"]).read_text())
    return content


def test_the_confusion_matrix_is_a_chart_of_wandb(first: Path) -> None:
    run = Tracked(first)
    assert "wandb/confusion_matrix/v1" in json.dumps([str(record) for record in run.records])
    content = table_of(run, "test/confusion_table")
    assert content["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert len(content["data"]) == 100
    assert sum(row[2] for row in content["data"]) == len(Predictions.read(first / "predictions.npz").label)


def test_predictions_and_most_wrong_images_are_tables(first: Path) -> None:
    run, found = Tracked(first), Predictions.read(first / "predictions.npz")
    content = table_of(run, "test/predictions")
    assert content["columns"][:4] == ["image", "label", "predicted", "right"]
    assert [row[0] for row in content["data"]] == found.index.tolist()
    right = sum(row[3] for row in content["data"]) / len(content["data"])
    assert right == pytest.approx(results(first)["raw"]["test"]["top1"])
    worst = table_of(run, "test/most_wrong")
    assert len(worst["data"]) == len(list(found.wrong())) > 0
    artifacts = [record.artifact for record in run.records if record.HasField("artifact")]
    [kept] = [artifact for artifact in artifacts if "most_wrong" in artifact.name]
    pictures = [entry.path for entry in kept.manifest.contents if entry.path.endswith(".png")]
    assert len(pictures) == len(worst["data"])


def test_the_summary_keeps_the_best(first: Path) -> None:
    metrics_of = {r.metric.name: r.metric for r in Tracked(first).records if r.HasField("metric") and r.metric.name}
    assert metrics_of["val/top1"].summary.max
    assert metrics_of["val/loss"].summary.min
    assert metrics_of["val/ece"].summary.min


@pytest.mark.slow
def test_constants_are_in_the_summary_and_have_no_curve() -> None:
    """A learning rate that starts to vary has a curve from then on."""
    Path("late.yaml").write_text("trainer: {callbacks+: [{class_path: WarmupStep, init_args: {milestones: [2]}}]}")
    tricks = ("--config=tricks/no_bias_decay", "--config=tricks/channels_last", "--config=late.yaml")
    track(*tricks, "--trainer.callbacks.WarmupStep.warmup_epochs=0", "--trainer.max_epochs=3")
    run = Tracked(Path("runs/tiny/v0"))
    logged = {key for row in run.history for key in row}
    assert not [key for key in logged if key.startswith(("no_bias_decay", "channels_last"))]
    written = metrics("runs/tiny/v0")
    for name in ("no_bias_decay/share", "channels_last/filters"):
        assert {run.summary[name]} == {row[name] for row in written if name in row}
    rates = {key for key in logged if key.startswith("lr-")}
    assert "lr-SGD/decay" in rates
    assert not [rate for rate in rates if "/pg" in rate]
    curve = {row["trainer/global_step"]: row["lr-SGD/decay"] for row in run.history if "lr-SGD/decay" in row}
    assert curve == pytest.approx({3: 0.1, 4: 0.01, 5: 0.01})


@pytest.mark.slow
def test_a_constant_learning_rate_is_in_the_summary() -> None:
    track()
    run = Tracked(Path("runs/tiny/v0"))
    assert run.summary["lr-SGD"] == pytest.approx(0.1)
    assert not any("lr-SGD" in row for row in run.history)


def test_only_quantities_of_tricks_are_withheld() -> None:
    """Quantities that a module logs stay in the charts, even if they are constant."""
    logged: list[tuple[dict[str, float], int | None]] = []
    summary: dict[str, float] = {}
    log = VaryingOnly(lambda metrics, step: logged.append((dict(metrics), step)), summary)
    for step, decay in enumerate((0.9, 0.9, 0.5)):
        log({"ema/decay": decay, "theirs/weight": 1.0, "lr": 0.1, "epoch": 0}, step)
    log({"mixup/lambda": 1.0, "epoch": 0}, 3)
    rest = {"theirs/weight": 1.0, "lr": 0.1, "epoch": 0}
    assert logged == [(rest, 0), (rest, 1), ({"ema/decay": 0.9}, 1), ({"ema/decay": 0.5, **rest}, 2)]
    assert summary == {"ema/decay": 0.9, "mixup/lambda": 1.0}


@pytest.mark.slow
def test_wandb_gets_no_setting_that_it_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B warns of the setting ``anonymous``, which Lightning always passes on."""
    for words, given in (((), False), (("--trainer.logger.anonymous=true",), True)):
        [logger] = [
            each for each in built(monkeypatch, *TRACKED, *words).trainer.loggers if isinstance(each, WandbLogger)
        ]
        assert ("anonymous" in logger._wandb_init) == given


def test_settings_are_there_once(first: Path) -> None:
    assert {key for key in Tracked(first).config if not key.startswith("_")} == {"config", "tricks"}


@pytest.mark.slow
def test_learning_rates_go_by_the_names_of_their_groups() -> None:
    track("--config=tricks/no_bias_decay", *COSINE)
    logged = {key for row in Tracked(Path("runs/tiny/v0")).history for key in row if key.startswith("lr-")}
    assert logged == {"lr-SGD/decay", "lr-SGD/no_decay"}


def test_metrics_of_an_epoch_are_drawn_against_it(first: Path) -> None:
    """And those of a step against the step, as Lightning has it."""
    run = Tracked(first)
    defined = [record.metric for record in run.records if record.HasField("metric")]
    axes = {metric.name: metric.step_metric for metric in defined if metric.name}
    assert [(metric.glob_name, metric.step_metric) for metric in defined if metric.glob_name] == [
        ("*", "trainer/global_step")
    ]
    logged = {key for row in run.history for key in row if "/" in key or key.startswith("lr")} - {"trainer/global_step"}
    of_steps = {"train/loss_step", "lr-SGD"}
    assert logged >= of_steps
    media = ("data/preview/", "test/confusion", "test/predictions", "test/most_wrong")
    logged = {name for name in logged if not name.startswith(media)}
    assert {name for name in logged if axes.get(name) == "epoch"} == logged - of_steps
    assert {row["epoch"] for row in run.history if "val/top1" in row} == {0, 1}


@pytest.mark.slow
def test_group_tags_artifact_and_histograms_when_asked(folder: Path) -> None:
    """With tricks that swap weights and run batches of their own, which no histogram disturbs."""
    tricks = ("--config=tricks/ema", "--config=tricks/precise_bn", "--config=tricks/mixup")
    requested = ("--trainer.logger.group=ours", "--trainer.logger.tags=[small,fast]", "--trainer.logger.notes=why")
    track(*tricks, *requested, "--trainer.logger.log_model=true", "--watch=all", "--trainer.max_epochs=2")
    run = Tracked(Path("runs/tiny/v0"))
    assert (run.run.run_group, list(run.run.tags), run.run.notes) == ("ours", ["small", "fast"], "why")
    logged = {key for row in run.history for key in row}
    assert logged >= {"ema/decay", "mixup/lambda", "precise_bn/shift"}
    assert {key.partition("/")[0] for key in logged} >= {"gradients", "parameters"}
    kept = [record.artifact for record in run.records if record.HasField("artifact")]
    (artifact,) = [each for each in kept if each.type == "model"]
    assert (artifact.type, sorted(artifact.aliases)) == ("model", ["best", "latest"])
    (entry,) = artifact.manifest.contents
    assert Path(entry.local_path).read_bytes() == Path("runs/tiny/v0/checkpoints/best.ckpt").read_bytes()
    done(*FIT, *tricks, "--trainer.max_epochs=2", "--name=plain")
    watched, plain = (checkpoint(f"runs/{name}/v0/checkpoints/last.ckpt") for name in ("tiny", "plain"))
    assert not differences(watched["state_dict"], plain["state_dict"])


def test_an_unasked_run_has_no_artifact(first: Path) -> None:
    kinds = {record.artifact.type for record in Tracked(first).records if record.HasField("artifact")}
    assert kinds == {"run_table"}, "only tables are kept without being requested"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*FIT, "--watch=all"), "--watch all is for Weights & Biases: add --config loggers/wandb, or leave it out."),
        ((*TRACKED, "--watch=everything"), "--watch"),
    ],
)
def test_watch_says_what_it_needs(words: tuple[str, ...], message: str) -> None:
    outcome = cli(*words)
    assert outcome.code
    assert message in outcome.err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_an_ablation_is_a_group_with_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells_in_this_process(monkeypatch)
    wandb.teardown()  # it reads the environment once, and the group is there
    words = ("ablate", "--config=tiny.yaml", "--config=loggers/wandb", "--stack", "tricks/ema", "--seeds", "0")
    outcome = cli(*words, "--out", "which")
    wandb.teardown()
    assert outcome.code == 0, outcome
    cells = [Tracked(Path(f"which/runs/{name}-seed0/v0")).run for name in ("baseline", "with-ema")]
    assert [cell.display_name for cell in cells] == ["baseline-seed0-v0", "with-ema-seed0-v0"]
    summary = Tracked(Path("which"))
    assert (summary.run.display_name, summary.run.job_type) == ("which", "ablation")
    assert {run.run_group for run in (*cells, summary.run)} == {"which"}
    assert {run.project for run in (*cells, summary.run)} == {"lit-tricks"}
    (table,) = [row["ablation/path"] for row in summary.history if "ablation/path" in row]
    content = json.loads((summary.folder / "files" / table).read_text())
    rows = [line for line in Path("which/ablation.md").read_text().splitlines() if "|" in line]
    lines = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [content["columns"], *content["data"]] == [lines[0], *lines[2:]]
    assert any("plot/path" in row for row in summary.history)


@pytest.mark.slow
def test_a_race_is_a_group_with_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells_in_this_process(monkeypatch)
    wandb.teardown()  # it reads the environment once, and the group is there
    words = ("race", "--config=tiny.yaml", "--config=loggers/wandb", "--candidates", "tricks/zero_gamma")
    outcome = cli(*words, "--budget", "9", "--out", "fastest")
    wandb.teardown()
    assert outcome.code == 0, outcome
    runs = [Tracked(path).run for path in sorted(Path("fastest/runs").glob("*/v0"))]
    assert {"base-seed0-v0", "base+zero_gamma-seed0-v0"} <= {run.display_name for run in runs}
    summary = Tracked(Path("fastest"))
    assert (summary.run.display_name, summary.run.job_type) == ("fastest", "race")
    assert {run.run_group for run in (*runs, summary.run)} == {"fastest"}
    (table,) = [row["race/path"] for row in summary.history if "race/path" in row]
    content = json.loads((summary.folder / "files" / table).read_text())
    assert [row[:3] for row in content["data"]] == [["1", "screening", "zero_gamma"]]


def test_a_run_ends_with_its_command(first: Path) -> None:
    assert Tracked(first).exits == [0]
    assert wandb.run is None


def test_a_second_run_is_another_one(first: Path) -> None:
    track()
    track()
    one, other = Tracked(Path("runs/tiny/v0")), Tracked(Path("runs/tiny/v1"))
    assert len({one.run.run_id, other.run.run_id, Tracked(first).run.run_id}) == 3
    assert [run.run.display_name for run in (one, other)] == ["tiny-v0", "tiny-v1"]


def test_a_resumed_run_goes_on_in_the_same_one(first: Path) -> None:
    track(*COSINE, "--trainer.max_epochs=3", f"--ckpt_path={first}/checkpoints/last.ckpt")
    before, after = Tracked(first), Tracked(Path("runs/tiny/v0"))
    assert after.run.run_id == before.run.run_id
    steps = [row["trainer/global_step"] for row in after.history if "train/loss_step" in row]
    assert steps == [4, 5]
    track(f"--model.weights={first}/checkpoints/last.ckpt")  # a new beginning
    assert Tracked(Path("runs/tiny/v1")).run.run_id != before.run.run_id


@pytest.mark.slow
def test_a_repeated_configuration_is_another_run(first: Path) -> None:
    track(f"--ckpt_path={first}/checkpoints/last.ckpt", "--trainer.max_epochs=3")
    config = "runs/tiny/v0/config.yaml"
    assert yaml.safe_load(Path(config).read_text())["trainer"]["logger"]["init_args"]["offline"] is False
    files = sorted(Path("runs/tiny/v0").rglob("*"))
    outcome = cli("fit", "--config", config, "--ckpt_path=null")
    assert outcome.code == 0, outcome
    assert sorted(Path("runs/tiny/v0").rglob("*")) == files
    again = Tracked(Path("runs/tiny/v1"))
    assert again.run.run_id != Tracked(first).run.run_id
    assert again.run.display_name == "tiny-v1"


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the loggers that are made."""
    seen: list[dict[str, Any]] = []
    init = WandbLogger.__init__

    def note(self: WandbLogger, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(WandbLogger, "__init__", functools.wraps(init)(note))
    return seen


def test_logger_settings_are_kept(monkeypatch: pytest.MonkeyPatch, requested: list[dict[str, Any]]) -> None:
    words = ("--trainer.logger.name=mine", "--trainer.logger.project=ours", "--trainer.logger.save_dir=there")
    built(monkeypatch, *TRACKED, *words)
    assert [requested[0][key] for key in ("name", "project", "save_dir", "mode")] == [
        "mine",
        "ours",
        "there",
        "offline",
    ]


@pytest.mark.parametrize(
    ("place", "content", "variables", "offline"),
    [
        (None, "", {}, True),
        (None, "", {"WANDB_API_KEY": "0" * 40}, False),
        (None, "", {"WANDB_MODE": "online"}, False),
        ("home/.netrc", "machine api.wandb.ai login user password x", {}, False),
        ("home/_netrc", "machine api.wandb.ai login user password x", {}, False),
        ("keys", "machine api.wandb.ai login user password x", {"NETRC": "keys"}, False),
        (
            "home/.netrc",
            "machine ours.example login user password x",
            {"WANDB_BASE_URL": "https://ours.example"},
            False,
        ),
        ("home/.netrc", "machine github.com login user password x", {}, True),
        ("home/.netrc", "not a netrc at all", {}, True),
    ],
)
def test_a_login_is_found(
    monkeypatch: pytest.MonkeyPatch,
    requested: list[dict[str, Any]],
    place: str | None,
    content: str,
    variables: dict[str, str],
    offline: bool,
) -> None:
    if place:
        Path(place).write_text(content)
        Path(place).chmod(0o600)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    built(monkeypatch, *TRACKED)
    assert [arguments["mode"] == "offline" for arguments in requested] == [offline]


def test_wandb_beside_another_logger(
    monkeypatch: pytest.MonkeyPatch, requested: list[dict[str, Any]], folder: Path
) -> None:
    Path("both.yaml").write_text(
        "trainer: {logger: [{class_path: WandbLogger}, {class_path: TensorBoardLogger, init_args: {save_dir: .}}]}"
    )
    made = built(monkeypatch, *FIT, "--config=both.yaml")
    kinds = [type(logger).__name__ for logger in made.trainer.loggers]
    assert kinds == ["CSVLogger", "WandbLogger", "TensorBoardLogger"]
    assert requested[0]["save_dir"] == str(folder.resolve() / "runs" / "tiny" / "v0")


@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")  # Lightning says that it joins in
def test_the_run_of_a_caller_goes_on() -> None:
    with wandb.init(mode="offline", dir=".") as mine:
        track()
        assert wandb.run is mine
    assert wandb.run is None


def test_nothing_is_asked_and_nothing_waits(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("WANDB_SILENT")
    process = warm.run(["-m", "lit_tricks", *TRACKED], folder)
    assert process.returncode == 0, process.stderr
    assert "wandb: no login found, so the run is tracked offline; `wandb sync` uploads it later." in process.stderr
    for word in ("Traceback", "Warning", "Enter", "choice"):
        assert word not in process.stdout + process.stderr
    assert Tracked(Path("runs/tiny/v0")).exits == [0]


@pytest.mark.slow
def test_one_of_two_processes_tracks_and_writes(folder: Path) -> None:
    """The second process is started with the same words, and makes nothing of its own."""
    words = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=2")
    process = warm.run(["-m", "lit_tricks", *TRACKED, *COSINE, *words], folder)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in Path("runs").iterdir()] == ["tiny"]
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["v0"]
    assert {path.name for path in Path("runs/tiny/v0").iterdir()} == {
        "checkpoints", "config.yaml", "curves.png", "hparams.yaml", "metrics.csv",
        "predictions.npz", "report.md", "results.json", "tricks.json", "wandb",
    }  # fmt: skip
    with np.load("runs/tiny/v0/predictions.npz") as predictions:
        assert len(predictions["label"]) == 2 * 64  # of the batch of each process
    assert results("runs/tiny/v0")["peak_memory"] > 1e5
    assert len(list(Path().rglob("*.wandb"))) == 1
    run = Tracked(Path("runs/tiny/v0"))
    assert run.exits == [0]
    assert run.config["config"]["trainer"]["strategy"] == "ddp"
    assert run.config["tricks"] == json.loads(Path("runs/tiny/v0/tricks.json").read_text())
    assert [row["trainer/global_step"] for row in run.history if "train/loss_step" in row] == [0, 1, 2, 3]
    assert [row["epoch"] for row in run.history if "val/top1" in row] == [0, 1]
    assert sum("test/top1" in row for row in run.history) == 1


def test_wandb_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track()
    wandb.teardown()
    assert not list(Path().rglob("*run-*"))
    assert metrics("runs/tiny/v0")


def test_tensorboard_has_all_rows_of_metrics_csv() -> None:
    done(*FIT, *COSINE, "--config=loggers/tensorboard")
    (folder,) = Path("runs/tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    shown = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    rows = metrics("runs/tiny/v0")
    written = {(row["step"], key): row[key] for row in rows for key in row if key not in ("epoch", "step")}
    assert {key: value for key, value in shown.items() if key in written} == pytest.approx(written)
    assert {key for _, key in written} >= {"lr-SGD", "train/loss_step", "val/top1", "test/top5"}
