"""Sweeps of W&B, of configs/sweeps and of ``ablate --as-sweep``: the commands of an agent, and their runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import wandb
import yaml
from helpers.cli import QUIET, cli, done, workplace
from helpers.sweep import agent_commands
from helpers.wandb import Tracked, stranger

from lit_tricks.utils.config_files import CONFIGS

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
# W&B reads the parameters from a file that it does not close
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*sweep-sweep0:ResourceWarning")
GRID = ("ablate", "--config", "tiny.yaml", "--stack", "tricks/label_smoothing", "mine.yaml", "--seeds", "3", "4")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    stranger(monkeypatch, tmp_path)
    with workplace(tmp_path):
        (tmp_path / "mine.yaml").write_text("trainer: {callbacks+: [{class_path: EMA, init_args: {decay: 0.9}}]}")
        yield tmp_path


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[None]:
    """End the process that wandb starts for all of its runs."""
    yield
    wandb.teardown()


def printed(command: list[str]) -> dict[str, Any]:
    """The configuration that a command of an agent comes to."""
    assert command[:3] == ["/usr/bin/env", "lit-tricks", "fit"]
    config: dict[str, Any] = yaml.safe_load(done(*command[2:], "--print_config").out)
    return config


def trained(command: list[str], environment: dict[str, str], run: Path) -> Tracked:
    """Return what an agent's command logs to W&B in its environment."""
    wandb.teardown()  # it reads the environment once
    with mock.patch.dict(os.environ, environment):
        outcome = cli(*command[2:])
    assert outcome.code == 0, outcome
    return Tracked(run)


@pytest.mark.slow
def test_an_ablation_as_a_sweep_is_the_same_grid(folder: Path) -> None:
    Path("more.yaml").write_text("trainer: {log_every_n_steps: 3}")
    more = ("--config=more.yaml", "--config", "optimizers/adamw", "--trainer.max_epochs=7")
    done(*GRID, "--as-sweep", "sweep.yaml", "--", *more)
    assert not Path("ablation").exists()
    assert str(CONFIGS) not in Path("sweep.yaml").read_text()
    for name in ("tiny.yaml", "mine.yaml", "more.yaml"):  # on another machine they are not there
        (folder / name).unlink()
    found = []
    for command, _, parameters in agent_commands(folder / "sweep.yaml"):
        config = printed(command)
        assert config["trainer"]["logger"]["class_path"].endswith(".WandbLogger")
        assert config["trainer"]["log_every_n_steps"] == 3
        assert config["model"]["init_args"]["model_args"]["width"] == 0.03125
        assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"
        tricks = {trick["class_path"].rpartition(".")[2]: trick for trick in config["trainer"]["callbacks"] or []}
        if "EMA" in tricks:
            assert tricks["EMA"]["init_args"]["decay"] == 0.9
        assert config["seed_everything"] == parameters["seed_everything"]
        found.append((list(tricks), config["seed_everything"], config["trainer"]["max_epochs"]))
    rows: list[list[str]] = [[], ["LabelSmoothing"], ["LabelSmoothing", "EMA"]]
    assert found == [(row, seed, 7) for row in rows for seed in (3, 4)]


@pytest.mark.slow
def test_an_agent_trains_an_ablation(folder: Path) -> None:
    done(*GRID[:-1], "--as-sweep", "sweep.yaml")
    command, environment, parameters = agent_commands(folder / "sweep.yaml")[-1]
    run = trained(command, environment, folder / "runs" / "ablation" / "v0")
    assert (run.run.run_id, run.run.sweep_id) == ("agent2", "sweep0")
    assert run.config["row"] == parameters["row"]
    assert [*run.config["tricks"]] == ["LabelSmoothing", "EMA"]
    assert run.config["config"]["trainer"]["max_epochs"] == 1  # the resolved configuration, not W&B's parameter
    assert any("val/top1" in row for row in run.history)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_of_ours_sets_what_it_says_and_trains(cifar: Path, sweep: Path) -> None:
    commands = agent_commands(sweep)
    values = yaml.safe_load(sweep.read_text())["parameters"]
    assert len(commands) == len({tuple(parameters.values()) for _, _, parameters in commands}) >= 8
    ends = [commands[0], commands[-1]]
    for command, _, parameters in ends:
        config = printed(command)
        optimizer = config["model"]["init_args"]["optimizer"]["init_args"]
        mixup = config["trainer"]["callbacks"][-1]
        assert mixup["class_path"].endswith(".MixUp")
        found = {
            "model.optimizer.lr": optimizer["lr"],
            "model.optimizer.weight_decay": optimizer["weight_decay"],
            "trainer.callbacks.MixUp.alpha": mixup["init_args"]["alpha"],
        }
        assert found == parameters
        assert found.keys() == values.keys()
    small = (f"--data.root={cifar}", "--data.batch_size=4", "--data.num_workers=0", "--data.val_size=10", *QUIET)
    small += ("--model.model_args.width=0.03125", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    command, environment, parameters = ends[1]
    run = trained([*command, *small, "--trainer.log_every_n_steps=1"], environment, Path("runs/cifar10_baseline/v0"))
    assert {name: run.config[name] for name in parameters} == parameters
    metric = yaml.safe_load(sweep.read_text())["metric"]["name"]
    assert any(metric in row for row in run.history), "nothing to compare the runs by"
