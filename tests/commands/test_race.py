"""A race: its decisions against simulated runs, and its runs on the digits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.cli import CELLS, cli, done, workplace
from helpers.races import decisions
from scipy import stats

from lit_tricks import callbacks
from lit_tricks.commands.racing.budget import Budget
from lit_tricks.commands.racing.decisions import (
    Comparison,
    Outcome,
    OutOfBudget,
    Settings,
    Trial,
    Verdict,
    critical_values,
    decide,
)
from lit_tricks.commands.racing.race import EXCLUSIVE, _exclusive, _finite

Score = Callable[[Trial], float]

# ---------------------------------------------------------------------------------------------------------------------
# Decisions


def play(score: Score, candidates: list[list[str]], most: int = 10_000, **settings: Any) -> tuple[Verdict, list[Trial]]:
    """Run a race on a function that gives scores; after so many trials the budget is over."""
    verdict, made = Verdict(), []
    race = decide(candidates, settings.pop("exclusive", []), Settings(**({"equal_cost": False} | settings)), verdict)
    asked = next(race)
    while True:
        made += [trial for trial in asked if trial not in made]
        try:
            if len(made) > most:
                asked = race.throw(OutOfBudget())
            asked = race.send({trial: Outcome(score(trial), 10.0) for trial in asked})
        except StopIteration:
            return verdict, made


def gains(values: dict[str, float], noise: float = 0.1) -> Score:
    """Scores of known gains, with noise that seed and stack decide."""

    def score(trial: Trial) -> float:
        generator = np.random.default_rng([trial.seed, *map(ord, "".join(sorted(trial.tricks)))])
        return 90 + sum(values[name] for name in trial.tricks) + generator.normal(0, noise)

    return score


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_critical_values_spend_alpha_on_fresh_paths(alpha: float) -> None:
    looks = (3, 4, 5, 6, 8)
    values = critical_values(alpha, looks)
    paths = np.random.default_rng(1).standard_normal((100_000, 8))
    crossed = np.zeros(len(paths), dtype=bool)
    for look in looks:
        crossed |= stats.ttest_1samp(paths[:, :look], 0, axis=1).statistic >= values[look]
    assert crossed.mean() == pytest.approx(alpha, rel=0.12)


def test_critical_value_of_a_single_look_is_students_t() -> None:
    assert critical_values(0.05, (8,))[8] == pytest.approx(stats.t.ppf(0.95, 7), rel=0.01)


def test_race_keeps_gains_in_order_of_size_and_drops_losses() -> None:
    verdict, made = play(gains({"a": 0.5, "b": 1.5, "c": -1.0, "d": 0.0}), [["a"], ["b"], ["c"], ["d"]])
    assert verdict.kept == ("b", "a")
    assert [found.kept for found in verdict.rounds] == ["b", "a", ""]
    assert len(made) == len(set(made))


def test_a_test_uses_no_seed_of_the_screening() -> None:
    _, made = play(gains({"a": 1.0, "b": 0.0}), [["a"], ["b"]])
    first = Settings().first_test_seed
    assert {trial.seed for trial in made if trial.tricks == ("a",)} == {*range(first), *range(first, first + 3)}


def test_at_most_one_alternative_is_kept() -> None:
    score = gains({"a": 1.0, "b": 0.9, "c": 0.8})
    assert play(score, [["a", "b"], ["c"]])[0].kept == ("a", "c")
    assert play(score, [["a"], ["b"], ["c"]], exclusive=[frozenset({"a", "c"})])[0].kept == ("a", "b")


@pytest.mark.parametrize("failing", [0, 5])
def test_failed_runs_are_losses_and_are_named(failing: int) -> None:
    score = gains({"a": 2.0, "b": 1.0})
    verdict, _ = play(
        lambda trial: math.nan if "a" in trial.tricks and trial.seed == failing else score(trial), [["a"], ["b"]]
    )
    assert verdict.kept == ("b",)
    assert "failed" in verdict.excluded["a"]


def test_a_seed_without_reference_is_no_pair() -> None:
    score = gains({"a": 1.0})
    verdict, _ = play(lambda trial: math.nan if not trial.tricks and trial.seed == 1 else score(trial), [["a"]])
    assert len(verdict.rounds[0].screened[0].differences) == 3
    assert verdict.kept == ("a",)


@pytest.mark.parametrize("most", [1, 4, 9, 14])
def test_the_budget_ends_a_race_with_what_was_decided(most: int) -> None:
    verdict, _ = play(gains({"a": 1.0, "b": 0.8}), [["a"], ["b"]], most=most)
    assert verdict.out_of_budget
    assert verdict.kept in ((), ("a",))


@pytest.mark.parametrize(
    ("cost", "own", "base"), [(1.2, 1.0, 1.2), (0.5, 2.0, 1.0), (1.03, 1.0, 1.0)], ids=["dear", "cheap", "alike"]
)
def test_equal_cost_lets_the_cheaper_side_train_for_longer(cost: float, own: float, base: float) -> None:
    verdict, made = Verdict(), []
    race = decide([["a"]], [], Settings(), verdict)
    asked = next(race)
    while True:
        made += asked
        seconds = {(): 10.0, ("a",): 10.0 * cost}
        try:
            asked = race.send({t: Outcome(90 + len(t.tricks), seconds[t.tricks] * t.length) for t in asked})
        except StopIteration:
            break
    assert {trial.length for trial in made if trial.seed < 2} == {1.0}  # costs are not known yet
    tested = [trial for trial in made if trial.seed >= 2]
    assert {(len(trial.tricks), trial.length) for trial in tested if len(trial.tricks) < 2} == {(1, own), (0, base)}
    assert verdict.kept == ("a",)


def test_short_runs_screen_and_full_runs_decide() -> None:
    _, made = play(gains({"a": 1.0, "b": 0.0}), [["a"], ["b"]], short=0.3)
    assert {trial.length for trial in made if trial.seed < 4} == {0.3}
    assert {trial.length for trial in made if trial.seed >= 4} == {1.0}


def test_a_gain_below_min_gain_is_excluded_for_good() -> None:
    verdict, _ = play(gains({"a": 0.01, "b": 0.0}, noise=0.05), [["a"], ["b"]], min_gain=1.0)
    assert verdict.kept == ()


def test_arms_without_gain_are_kept_in_at_most_alpha_of_the_races() -> None:
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        made: dict[Trial, float] = {}
        verdict, _ = play(lambda trial: made.setdefault(trial, generator.normal()), [[name] for name in "abcdef"])  # noqa: B023
        wrong += bool(verdict.kept)
    assert wrong <= stats.binom.ppf(0.999, 300, 0.05)


def test_mean_of_a_failed_comparison_is_no_number_to_choose() -> None:
    assert Comparison("a", "test", [-math.inf, 1.0]).mean == -math.inf
    assert math.isnan(Comparison("a", "test").mean)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    ("text", "seconds", "runs"),
    [("2h", 7200, math.inf), ("1.5m", 90, math.inf), ("40", math.inf, 40), ("3 s", 3, math.inf)],
)
def test_budget_is_read(text: str, seconds: float, runs: float) -> None:
    budget = Budget.parse(text)
    assert (budget.seconds, budget.runs) == (seconds, runs)


@pytest.mark.parametrize("text", ["", "0", "-1h", "soon", "2d", "nan"])
def test_budget_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="budget="):
        Budget.parse(text)


def test_number_that_is_not_finite_becomes_null() -> None:
    assert _finite({"a": [math.nan, -math.inf, 1.5]}) == {"a": [None, None, 1.5]}


def test_exclusive_tricks_exist() -> None:
    assert frozenset().union(*EXCLUSIVE) <= set(callbacks.__all__)


def test_exclusive_tricks_are_found_by_their_classes(tmp_path: Path) -> None:
    mine = tmp_path / "average.yaml"
    mine.write_text("trainer: {callbacks+: [{class_path: lit_tricks.callbacks.EMA, init_args: {decay: 0.9}}]}")
    assert frozenset({str(mine), "tricks/swa"}) in _exclusive([str(mine), "tricks/swa", "tricks/mixup"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(*CELLS)
    with workplace(tmp_path):
        yield tmp_path


RACE = ("race", "--config", "tiny.yaml", "--candidates", "tricks/zero_gamma")


@pytest.mark.parametrize(
    ("words", "token"),
    [
        (("race", "--config", "tiny.yaml", "--candidates", "tiny.yaml", "--budget", "9"), "part of the base"),
        ((*RACE, "tricks/zero_gamma", "--budget", "9"), "twice"),
        ((*RACE, "--budget", "never"), "budget="),
        ((*RACE, "--budget", "9", "--short", "0"), "short="),
        ((*RACE, "--budget", "9", "--max-seeds", "2"), "max_seeds="),
        ((*RACE, "--budget", "9", "--min-gain", "-1"), "min_gain="),
        ((*RACE, "--budget", "9", "--jobs", "0"), "jobs="),
        ((*RACE[:-1], "tricks/emma", "--budget", "9"), "tricks/ema"),
        ((*RACE, "--budget", "0.1s"), "below one run"),
        ((*RACE, "--budget", "9", "--", "--model.model_args.depth=19"), "base does not run"),
        ((*RACE, "--budget", "9", "--", "--trainer.limit_val_batches=0"), "no score"),
    ],
)
def test_bad_input_is_one_line_that_names_it(folder: Path, words: tuple[str, ...], token: str) -> None:
    outcome = cli(*words)
    assert outcome.code in (1, 2)
    [line] = [line for line in outcome.err.splitlines() if line.startswith("lit-tricks: error")]
    assert token in line


def test_unknown_length_is_named(folder: Path) -> None:
    content = yaml.safe_load(Path("tiny.yaml").read_text())
    del content["trainer"]["max_epochs"]
    Path("tiny.yaml").write_text(yaml.safe_dump(content))
    assert "--trainer.max_epochs" in cli(*RACE, "--budget", "9").err


# ---------------------------------------------------------------------------------------------------------------------
# A race on the digits


def test_a_race_leaves_a_recipe_and_a_report_and_continues(folder: Path) -> None:
    words = (*RACE, "tricks/xavier_init", "--score", "per-epoch", "--max-seeds", "3")
    done(*words, "--budget", "30")
    first = json.loads(Path("race/race.json").read_text())
    assert 12 < first["runs"] <= 30
    cells = sorted(path.name for path in Path("race/runs").iterdir() if path.is_dir())
    for name in ("recipe.yaml", "race.md", "race.csv", "race.png", "report.html"):
        assert (Path("race") / name).stat().st_size > 100
    done("fit", "--config", "race/recipe.yaml", "--print_config")
    Path("race/report.html").unlink()
    done("report", "race")
    assert Path("race/report.html").is_file()

    # stopped between two runs: the lost run is made again, the decisions are the same
    clock = json.loads(Path("race/clock.json").read_text())
    lost = cells[-1]
    shutil.rmtree(Path("race/runs") / lost)
    del clock["runs"][lost]
    Path("race/clock.json").write_text(json.dumps(clock))
    done(*words, "--budget", "30")
    again = json.loads(Path("race/race.json").read_text())
    assert decisions(again) == decisions(first)

    assert "holds another race" in cli(*RACE, "--budget", "12").err
