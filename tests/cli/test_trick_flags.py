"""One trick of a stack by its name: in flags, over several configurations, in sweeps and in ablations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.cli import FIT, cells_in_this_process, cli, done, workplace
from helpers.sweep import agent_commands

from lit_tricks.utils.trick_flags import apply_to_rows, behind_configs

STACK = """
trainer:
  callbacks:
    - class_path: WarmupCosine
      init_args: {warmup_epochs: 2}
    - class_path: lit_tricks.callbacks.mixup.MixUp
      init_args: {alpha: 0.4}
    - NoBiasDecay
    - class_path: lit_tricks.EMA
      init_args: {decay: 0.98}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        Path("stack.yaml").write_text(STACK)
        yield tmp_path


def tricks(*words: str) -> dict[str, dict[str, Any]]:
    """The callbacks of a fit with these words, by name, with their arguments."""
    config = yaml.safe_load(done(*FIT, *words, "--print_config").out)
    return {
        each["class_path"].rpartition(".")[2]: each.get("init_args", {})
        for each in config["trainer"]["callbacks"] or []
    }


BY_NAME = ("--config=stack.yaml",)


@pytest.mark.parametrize(
    ("words", "name", "argument", "value"),
    [
        (("--trainer.callbacks.WarmupCosine.warmup_epochs", "1"), "WarmupCosine", "warmup_epochs", 1),
        (("--trainer.callbacks.WarmupCosine.warmup_epochs=1",), "WarmupCosine", "warmup_epochs", 1),
        (("--trainer.callbacks.MixUp.init_args.alpha=1",), "MixUp", "alpha", 1),
        (("--trainer.callbacks.lit_tricks.MixUp.alpha=1e-1",), "MixUp", "alpha", 0.1),
        (("--trainer.callbacks.lit_tricks.callbacks.mixup.MixUp.alpha=1",), "MixUp", "alpha", 1),
        (("--trainer.callbacks.NoBiasDecay.skip=[norm]",), "NoBiasDecay", "skip", ["norm"]),
        (("--trainer.callbacks.EMA.validate=both",), "EMA", "validate", "both"),
        (("--trainer.callbacks.EMA.decay=null",), "EMA", "decay", None),
    ],
)
def test_a_trick_is_changed_where_it_stands(words: tuple[str, ...], name: str, argument: str, value: Any) -> None:
    before, after = tricks(*BY_NAME), tricks(*BY_NAME, *words)
    assert list(after) == list(before) == ["WarmupCosine", "MixUp", "NoBiasDecay", "EMA"]
    assert after[name].pop(argument) == value != before[name].pop(argument)
    assert after == before


@pytest.mark.slow
def test_a_trick_is_taken_out() -> None:
    assert list(tricks(*BY_NAME, "--trainer.callbacks-=MixUp")) == ["WarmupCosine", "NoBiasDecay", "EMA"]
    left = ("--trainer.callbacks-", "lit_tricks.EMA", "--trainer.callbacks-=WarmupCosine", "--trainer.callbacks-=MixUp")
    assert list(tricks(*BY_NAME, *left)) == ["NoBiasDecay"]
    assert tricks("--trainer.callbacks=EMA", "--trainer.callbacks-=EMA") == {}


def test_over_several_configurations_and_appended_tricks() -> None:
    words = ("--config", "tricks/label_smoothing", "--trainer.callbacks+=DropPath", "--trainer.callbacks.rate=0.2")
    named = ("--trainer.callbacks.LabelSmoothing.smoothing=0.3", "--trainer.callbacks.EMA.decay=0.5")
    found = tricks(*BY_NAME, *words, *named, "--trainer.callbacks.DropPath.rate=0.4", "--trainer.callbacks-=MixUp")
    assert list(found) == ["WarmupCosine", "NoBiasDecay", "EMA", "LabelSmoothing", "DropPath"]
    assert (found["LabelSmoothing"]["smoothing"], found["EMA"]["decay"], found["DropPath"]["rate"]) == (0.3, 0.5, 0.4)


def test_a_flag_may_stand_before_the_configuration_that_adds_its_trick() -> None:
    words = ("--trainer.callbacks.EMA.decay", "0.5", "--trainer.callbacks-=MixUp", "--config", "stack.yaml")
    found = tricks(*words)
    assert (list(found), found["EMA"]["decay"]) == (["WarmupCosine", "NoBiasDecay", "EMA"], 0.5)


def test_a_trick_can_be_replaced() -> None:
    words = ("--trainer.callbacks-=EMA", "--trainer.callbacks+=EMA", "--trainer.callbacks.half_life=2")
    found = tricks(*BY_NAME, *words)
    assert (found["EMA"]["decay"], found["EMA"]["half_life"]) == (None, 2)


def test_another_callback_by_its_name() -> None:
    words = (
        "--trainer.callbacks+=ModelCheckpoint",
        "--config=tricks/swa",
        "--trainer.callbacks.ModelCheckpoint.save_top_k=3",
    )
    assert tricks(*words)["ModelCheckpoint"]["save_top_k"] == 3


def test_the_form_without_a_name_tells_which_trick_it_meant() -> None:
    outcome = done(*FIT, *BY_NAME, "--trainer.callbacks.decay=0.5", "--print_config")
    assert "--trainer.callbacks.decay is about EMA, the last of the callbacks" in outcome.log


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--trainer.callbacks.warmup_epochs=1",),
            "EMA, the last .*did you mean --trainer.callbacks.WarmupCosine.warmup_epochs",
        ),
        (("--trainer.callbacks.decays=1",), "EMA, the last .*no argument 'decays'; did you mean 'decay'"),
        (("--trainer.callbacks.MixUp.alfa=1",), "MixUp has no argument 'alfa'; did you mean 'alpha'"),
        (("--trainer.callbacks.MixUp.alpha=much",), r"--trainer\.callbacks\.MixUp\.alpha: 'much' is not float"),
        (("--trainer.callbacks.MixUp.alpha=-1",), "alpha"),
        (("--trainer.callbacks.MixUp=1",), "which argument.*MixUp has alpha"),
        (("--trainer.callbacks.Mixup.alpha=1",), "Mixup is not among .*did you mean 'MixUp'"),
        (("--trainer.callbacks.SWA.lr=1",), r"SWA is not among .*Add it with --trainer\.callbacks\+=SWA"),
        (("--trainer.callbacks-=SWA",), "SWA is not among .*WarmupCosine, MixUp, NoBiasDecay, EMA"),
        (("--trainer.callbacks-=Mixup",), "did you mean 'MixUp'"),
        (("--trainer.callbacks-",), "expected one argument"),
        (("--trainer.callbacks-=",), "give the name of a callback.*WarmupCosine, MixUp, NoBiasDecay, EMA"),
        (("--trainer.callbacks.ema.decay=0.9",), r"did you mean --trainer\.callbacks\.EMA\.decay"),
        (("--trainer.callbacks.mixup.init_args.alpha=1",), r"did you mean --trainer\.callbacks\.MixUp\."),
        (("--trainer.callbacks+=EMA", "--trainer.callbacks.EMA.decay=0.1"), "EMA is in the list of callbacks 2 times"),
        (("--trainer.callbacks=null", "--trainer.callbacks.EMA.decay=0.1"), "EMA is not among .*as there are none"),
        (("--trainer.callbacks=null", "--trainer.callbacks.decay=0.1"), "there is no callback yet"),
    ],
)
def test_errors_name_the_trick_and_the_remedy(words: tuple[str, ...], message: str) -> None:
    outcome = cli(*FIT, *BY_NAME, *words)
    assert outcome.code in (1, 2)
    assert re.search(message, outcome.err), outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not Path("runs").exists()


@pytest.mark.slow
def test_other_commands_take_them_too() -> None:
    words = ("--trainer.callbacks.WarmupCosine.warmup_epochs=0", "--trainer.callbacks-=EMA", "--out=x.png")
    done("data", "preview", *FIT[1:], *BY_NAME, *words)
    assert Path("x.png").is_file()


# Without a parser


def test_only_flags_with_names_move_behind_configurations() -> None:
    words = ["fit", "--trainer.callbacks.EMA.decay", "1", "--trainer.callbacks.decay=2", "-c", "a.yaml", "--model.lr=1"]
    assert behind_configs(words) == [
        "fit", "--trainer.callbacks.decay=2", "-c", "a.yaml", "--trainer.callbacks.EMA.decay", "1", "--model.lr=1"
    ]  # fmt: skip
    assert behind_configs(["fit", "--trainer.callbacks-=EMA"]) == ["fit", "--trainer.callbacks-=EMA"]


def test_rows_with_a_trick_are_changed_and_others_are_left_alone() -> None:
    def row(*callbacks: Any) -> dict[str, Any]:
        return {"trainer": {"callbacks+": list(callbacks)}}

    mixup = {"class_path": "MixUp", "init_args": {"alpha": 0.2}}
    rows = [{}, row("EMA"), row("EMA", mixup)]
    words = ["--trainer.callbacks.MixUp.alpha", "1e-1", "--trainer.max_epochs=3", "--trainer.callbacks-=EMA"]
    assert apply_to_rows([*words, "--trainer.callbacks.SWA.lr=1"], rows) == [
        "--trainer.max_epochs=3",
        "--trainer.callbacks.SWA.lr=1",
    ]
    assert rows == [{}, row(), row({"class_path": "MixUp", "init_args": {"alpha": 0.1}})]
    assert mixup["init_args"] == {"alpha": 0.2}, "the caller's settings are changed"


# Sweeps and ablations

GRID = ("ablate", "--config=tiny.yaml", "--config=base.yaml", "--stack", "tricks/mixup", "tricks/ema", "--seeds", "0")
CHANGES = ("--trainer.callbacks.MixUp.alpha", "0.7", "--trainer.callbacks.WarmupCosine.warmup_epochs=0")


@pytest.fixture
def base() -> None:
    Path("base.yaml").write_text("trainer: {callbacks: [WarmupCosine]}")


def alphas(configs: list[dict[str, Any]]) -> list[list[Any]]:
    return [
        [each["init_args"]["alpha"] for each in config["trainer"]["callbacks"] if each["class_path"].endswith(".MixUp")]
        for config in configs
    ]


@pytest.mark.slow
def test_an_ablation_changes_a_trick_in_the_rows_that_have_it(base: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cells_in_this_process(monkeypatch)
    done(*GRID, "--", *CHANGES)
    files = [Path(f"ablation/runs/{name}-seed0/v0/config.yaml") for name in ("baseline", "with-mixup", "with-ema")]
    configs = [yaml.safe_load(file.read_text()) for file in files]
    assert alphas(configs) == [[], [0.7], [0.7]]
    warmups = [config["trainer"]["callbacks"][0]["init_args"]["warmup_epochs"] for config in configs]
    assert warmups == [0, 0, 0]


@pytest.mark.slow
def test_an_ablation_as_a_sweep_has_the_change_in_its_rows(base: None) -> None:
    done(*GRID, "--as-sweep=sweep.yaml", "--", *CHANGES)
    rows = yaml.safe_load(Path("sweep.yaml").read_text())["parameters"]["row"]["values"]
    found = [json.loads(row).get("trainer", {}).get("callbacks+", []) for row in rows]
    assert [[each["init_args"]["alpha"] for each in row[:1]] for row in found] == [[], [0.7], [0.7]]
    configs = []
    for command, *_ in agent_commands(Path("sweep.yaml").resolve()):
        configs.append(yaml.safe_load(done(*command[2:], "--print_config").out))
    assert alphas(configs) == [[], [0.7], [0.7]]
    assert [config["trainer"]["callbacks"][0]["init_args"]["warmup_epochs"] for config in configs] == [0, 0, 0]
