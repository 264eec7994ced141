"""A race: its decisions against simulated runs, and its runs on the digits."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from helpers.cli import cells_in_this_process, cli, done, results, workplace
from helpers.races import COSTS, decisions, fake_fits, read_race, run_race
from rich.console import Console
from scipy import stats

from lit_tricks import callbacks
from lit_tricks.callbacks.optim.schedule import Schedule
from lit_tricks.commands.ablation.cells import Cell
from lit_tricks.commands.racing.budget import Budget
from lit_tricks.commands.racing.decisions import (
    Comparison,
    Outcome,
    OutOfBudget,
    Round,
    Settings,
    Trial,
    Verdict,
    critical_values,
    decide,
)
from lit_tricks.commands.racing.race import EXCLUSIVE, _exclusive, _finite
from lit_tricks.commands.racing.runs import Runs
from lit_tricks.commands.racing.view import race_view
from lit_tricks.run.report.race_page import race_sections
from lit_tricks.utils.config_files import CONFIGS

Score = Callable[[Trial], float]

# ---------------------------------------------------------------------------------------------------------------------
# Decisions


def play(score: Score, candidates: list[list[str]], most: int = 10_000, **settings: Any) -> tuple[Verdict, list[Trial]]:
    """Run a race on a function that gives scores; after so many trials the budget is over."""
    verdict, made = Verdict(), []
    race = decide(candidates, settings.pop("exclusive", []), Settings(**({"equal_cost": False} | settings)), verdict)
    requested = next(race)
    while True:
        made += [trial for trial in requested if trial not in made]
        try:
            if len(made) > most:
                requested = race.throw(OutOfBudget())
            requested = race.send({trial: Outcome(score(trial), 10.0) for trial in requested})
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
    requested = next(race)
    while True:
        made += requested
        seconds = {(): 10.0, ("a",): 10.0 * cost}
        try:
            requested = race.send({t: Outcome(90 + len(t.tricks), seconds[t.tricks] * t.length) for t in requested})
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


def test_all_schedules_are_exclusive() -> None:
    schedules = {name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), Schedule)}
    assert schedules in EXCLUSIVE


def test_exclusive_tricks_are_found_by_their_classes(tmp_path: Path) -> None:
    mine = tmp_path / "average.yaml"
    mine.write_text("trainer: {callbacks+: [{class_path: lit_tricks.callbacks.EMA, init_args: {decay: 0.9}}]}")
    assert frozenset({str(mine), "tricks/swa"}) in _exclusive([str(mine), "tricks/swa", "tricks/mixup"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    cells_in_this_process(monkeypatch)
    with workplace(tmp_path):
        Path("empty.yaml").write_text("# nothing\n")
        Path("list.yaml").write_text("- trainer\n")
        yield tmp_path


RACE = ("race", "--config", "tiny.yaml", "--candidates", "tricks/zero_gamma")


@pytest.mark.parametrize(
    ("words", "token"),
    [
        (("race", "--config", "tiny.yaml", "--candidates", "tiny.yaml", "--budget", "9"), "part of the base"),
        (("race", "--config", "tiny.yaml", "--candidates", "--budget", "9"), "candidates"),
        (("race", "--config", "tiny.yaml", "--budget", "9"), "candidates"),
        (("race", "--config", "tiny.yaml", "--candidates", "empty.yaml", "--budget", "9"), "no settings"),
        (("race", "--config", "tiny.yaml", "--candidates", "list.yaml", "--budget", "9"), "list.yaml"),
        ((*RACE, "--budget", "9", "--engine", "ray", "--jobs", "2"), "jobs=2"),
        ((*RACE, "--budget", "9", "--gpus", "1"), "gpus=1"),
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
# Races whose runs take no time


def test_costs_are_cpu_times_and_the_budget_is_by_the_clock(folder: Path) -> None:
    run_race(
        folder / "race", fake_fits(seconds=50.0), budget="1h"
    )  # ema costs 20 % more CPU time, and no more by clock
    race = read_race(folder / "race")
    tests = {each["candidate"]: each for found in race["rounds"] for each in found["tested"]}
    assert race["kept"] == ["tricks/ema", "tricks/mixup"]
    assert [round(tests[name]["cost"], 3) for name in race["kept"]] == [1.2, 1.0]
    assert race["clock"] == "cpu_seconds"
    clock = json.loads(Path("race/clock.json").read_text())
    assert set(clock["runs"].values()) == {50.0}
    assert "base@1.2-seed4" in clock["runs"]
    assert race["confirmed"]["epochs"] == {"base": 12, "recipe": 10, "without ema": 12, "without mixup": 10}


def test_a_race_per_epoch_knows_no_cost(folder: Path) -> None:
    run_race(folder / "race", score="per-epoch")
    assert not [key for key in json.loads(Path("race/clock.json").read_text())["runs"] if "@" in key]
    assert set(read_race(folder / "race")["confirmed"]["epochs"].values()) == {10}


class Clock:
    """A clock that runs go by: the fake fits take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("lit_tricks.commands.racing.runs.time.monotonic", lambda: self.now)

    def engine(self, seconds: float, parallel: int = 1) -> Any:
        fits = fake_fits(seconds=seconds)

        def run(cells: Sequence[Cell]) -> Iterator[Cell]:
            for i in range(0, len(cells), parallel):
                self.now += seconds
                yield from fits(cells[i : i + parallel])

        return run


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("runs", [15, 30, 45, 60])
def test_no_run_starts_that_would_not_end_in_time(
    runs: int, parallel: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    run_race(folder / "race", clock.engine(100.0, parallel), parallel, budget=f"{runs * 100}s")
    race = read_race(folder / "race")
    assert clock.now == race["seconds"] <= runs * 100
    assert runs < 60 or race["kept"]
    if race["kept"]:
        assert len(race["confirmed"]["seeds"]) >= 3, "the reserve is for the confirmation"


@pytest.mark.parametrize("runs", [15, 30, 45, 60, 90])
def test_a_number_of_runs_is_not_exceeded_and_leaves_a_confirmation(runs: int, folder: Path) -> None:
    run_race(folder / "race", budget=str(runs))
    race = read_race(folder / "race")
    assert race["runs"] <= runs
    assert not race["kept"] or len(race["confirmed"]["seeds"]) >= 3


def test_the_verdict_names_what_the_budget_left_undecided(folder: Path) -> None:
    run_race(folder / "race", budget="16")
    text = " ".join(race_sections(read_race(folder / "race"))[0].text)
    assert "Undecided: ema." in text
    assert "larger budget" in text
    assert "the budget ended the race" in text


def test_a_finalist_behind_the_kept_one_is_not_tested(folder: Path) -> None:
    run_race(folder / "race", fake_fits(failing=["no run"]))
    [second] = [each for each in read_race(folder / "race")["rounds"][0]["screened"] if "not tested" in each["reason"]]
    assert (second["candidate"], second["state"]) == ("tricks/cutmix", "out")


def test_a_larger_budget_continues_a_race(folder: Path) -> None:
    run_race(folder / "race", budget="20")
    before = json.loads(Path("race/clock.json").read_text())["runs"]
    run_race(folder / "race", budget="90")
    run_race(folder / "whole", budget="90")
    assert decisions(read_race(folder / "race")) == decisions(read_race(folder / "whole"))
    assert before.keys() <= json.loads(Path("race/clock.json").read_text())["runs"].keys()


def test_candidates_that_always_fail_are_listed_and_tried_again(folder: Path) -> None:
    recipe = run_race(folder / "race", fake_fits(failing=[""]))
    race = read_race(folder / "race")
    assert (race["kept"], race["confirmed"], len(race["rounds"])) == ([], {}, 1)
    assert {each["state"] for each in race["rounds"][0]["screened"]} == {"failed"}
    assert {(each["stack"], each["reason"]) for each in race["failed"]} == {
        (f"base+{name}", "RuntimeError: it fails") for name in ("ema", "mixup", "cutmix", "no_bias_decay")
    }
    assert yaml.safe_load(recipe.read_text())["trainer"]["max_epochs"] == 10
    page = "\n".join(line for section in race_sections(race) for line in section.text)
    assert "every candidate failed" in page
    run_race(folder / "race")
    assert read_race(folder / "race")["kept"] == ["tricks/ema", "tricks/mixup"]


def test_a_recipe_that_never_ran_at_full_length_has_the_full_length(folder: Path) -> None:
    """A candidate that is cheaper is compared at more epochs."""
    with mock.patch.dict(COSTS, {"ema": 0.5}):
        recipe = run_race(folder / "race", candidates=["tricks/ema"], budget="20")
    assert not (folder / "race/runs/base+ema-seed4").exists()
    assert yaml.safe_load(recipe.read_text())["trainer"]["max_epochs"] == 10


def test_changed_files_of_a_race_are_named(folder: Path) -> None:
    run_race(folder / "race", budget="15")
    files = {path: path.read_bytes() for path in sorted(Path("race").rglob("*.json"))}
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text() + "# another\n")
    with pytest.raises(ValueError, match=r"content of tiny\.yaml.*--out"):
        run_race(folder / "race", budget="15")
    assert files == {path: path.read_bytes() for path in files}, "nothing is lost"


def test_a_race_continues_under_another_installation(folder: Path) -> None:
    """The command line gives the paths of configurations that have a name."""
    run_race(folder / "race", budget="15", config=["tiny.yaml", str(CONFIGS / "loggers" / "tensorboard.yaml")])
    plan = json.loads(Path("race/plan.json").read_text())
    assert plan["config"] == ["tiny.yaml", "loggers/tensorboard"]
    assert plan["contents"].keys() == {"tiny.yaml", "loggers/tensorboard", *read_race(folder / "race")["names"]}
    run_race(folder / "race", budget="15", config=["tiny.yaml", "loggers/tensorboard"])


def test_damaged_results_are_made_again(folder: Path) -> None:
    run_race(folder / "race")
    first = read_race(folder / "race")
    Path("race/runs/base+ema-seed1/v0/results.json").write_text("{")
    run_race(folder / "race")
    assert decisions(read_race(folder / "race")) == decisions(first)
    assert Path("race/runs/base+ema-seed1/v1/results.json").is_file()


def test_a_view_has_all_that_happens_in_80_columns(folder: Path) -> None:
    names = {f"tricks/{name}": name for name in ("ema", "mixup", "no_bias_decay", "a_candidate_with_a_long_name")}
    (folder / "clock.json").write_text(json.dumps({"elapsed": 1860, "runs": {"base-seed0": 60}}))
    runs = Runs(folder, [], [], 10, {}, fake_fits(), Budget.parse("2h"))  # type: ignore[arg-type]
    runs.names = names
    kept, out, failed = (Comparison(name, "screening", [1.0]) for name in [*names][:3])
    kept.reason = "continues to the test"
    out.state, out.reason = "out", "in the worse half after 4 seeds, which is a long reason"
    failed.state, failed.reason, failed.differences = "failed", "1 of 1 runs failed or diverged", [-math.inf]
    test = Comparison([*names][3], "test", [0.5, 1.5, 1.0], reach=1.2)
    verdict = Verdict(("tricks/ema",), [Round((), [kept, out, failed], [test])])
    runs.now = [Cell("base+ema+mixup", 7, folder, [], "runs"), Cell("base+ema", 7, folder, [], "waits")]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(race_view(runs, verdict, "round 2, test"))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in (
        "round 2, test",
        "89.0 min of 2h left",
        "base + ema",
        "+1.00 ± 1.20",
        "out: in the worse half",
        "failed: 1 of",
    ):
        assert part in text
    assert "runs now: base+ema+mixup seed 7; 1 more wait" in text


# ---------------------------------------------------------------------------------------------------------------------
# A race on the digits


@pytest.mark.slow
def test_a_race_leaves_a_recipe_and_a_report_and_continues(folder: Path) -> None:
    words = (*RACE, "tricks/xavier_init", "--score", "per-epoch", "--max-seeds", "3")
    done(*words, "--budget", "30")
    first = json.loads(Path("race/race.json").read_text())
    assert 12 < first["runs"] <= 30
    cells = sorted(path.name for path in Path("race/runs").iterdir() if path.is_dir())
    for name in ("recipe.yaml", "race.md", "race.csv", "race.png", "report.html"):
        assert (Path("race") / name).stat().st_size > 100
    done("fit", "--config", "race/recipe.yaml")  # as it stands
    assert results("runs/recipe/v0")["raw"].keys() == {"train", "val", "test"}
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
