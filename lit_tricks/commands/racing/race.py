"""``lit-tricks race``: the stack of tricks that gains on the user's own data, within a budget.

The rules are in ``decisions.py``; the runs are the cells of an ablation. A race that is started again replays its
decisions from the results in its folder, and continues.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lit_tricks.commands.ablation.ablate import settings_of, track
from lit_tricks.commands.ablation.cells import live
from lit_tricks.commands.ablation.engines import EngineName, check_engine, engine_of
from lit_tricks.commands.ablation.exclusive import alone_in, read_object
from lit_tricks.commands.racing.budget import Budget
from lit_tricks.commands.racing.decisions import (
    COST_TOLERANCE,
    SCREENING,
    OutOfBudget,
    Settings,
    Trial,
    Verdict,
    decide,
)
from lit_tricks.commands.racing.runs import Runs
from lit_tricks.commands.racing.view import left_of_budget, race_view
from lit_tricks.run.report.race_page import COLUMNS, race_rows, report_race
from lit_tricks.utils.arguments import choice, integer, number
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.config_files import config_name, find_config, given
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.log import log

__all__ = ["EXCLUSIVE", "race"]

# Tricks that conflict, by their classes.
EXCLUSIVE = (
    frozenset({"ClassBalanced", "LogitAdjustment"}),
    frozenset({"EMA", "Lookahead", "SWA", "ScheduleFree"}),
    frozenset({"WarmupCosine", "WarmupExponential", "WarmupLinear", "WarmupPoly", "WarmupStableDecay", "WarmupStep"}),
    frozenset({"FixRes", "DropPath"}),
    frozenset({"FixRes", "Freeze"}),
    frozenset({"FixRes", "ProgressiveResizing"}),
    frozenset({"FixRes", "Unfreeze"}),
)
CONFIRMATION = (3, 8)  # seeds of the confirmation: at least, and at most
FIRST_LOOK = 3  # seeds of the shortest test
LEAST = 2 * (sum(SCREENING) + FIRST_LOOK + CONFIRMATION[0])  # runs of a race that keeps its only candidate


def race(
    config: list[str],
    *,
    candidates: list[str],
    budget: str,
    out: str = "race",
    min_gain: float = 0.0,
    max_seeds: int = 8,
    short: float = 1.0,
    score: Literal["per-cost", "per-epoch"] = "per-cost",
    jobs: int = 1,
    engine: EngineName = "local",
    cpus: float | None = None,
    gpus: float | None = None,
    fit_args: list[str] | None = None,
) -> Path:
    """Search the stack of tricks that gains most on your data, within a budget.

    Each round adds the trick that gains most to the leader, and ends with a test on seeds that were not used to choose
    it. The race ends when no candidate shows a gain. Then base, recipe, and the recipe without each of its tricks run
    with fresh seeds. Choices are made on validation data. Test data is evaluated for the verdict only.

    Every run is a plain ``lit-tricks fit`` of full length in its own folder. The same command continues a race that was
    stopped, and tries failed runs again. Failed and diverged runs count as losses.

    Args:
        config: configurations of the base, by name or file.
        candidates: configurations of tricks. "a|b" means alternatives: at most one of them is kept.
        budget: time by the clock as "2h", "90m" or "300s", or a number of runs as "40". No run starts that would not
            end in time. The same command with another budget continues the race.
            A part is kept for the confirmation.
        out: folder for the runs, ``recipe.yaml``, ``race.md``, ``race.csv``, ``race.png`` and ``report.html``.
        min_gain: points, 0 or more. A candidate is out once its interval excludes a gain of this size.
        max_seeds: seeds of a test at most, 3 or more. More seeds find smaller gains.
        short: length of the screening runs as a part of the full length, in (0, 1]. Below 1, the screening can drop
            tricks that gain in long runs only, such as mixing.
        score: "per-cost" compares at equal cost: the cheaper side trains for more epochs. The cost of a run is the CPU
            time of its training, or the time by the clock where a GPU trains. "per-epoch" compares at equal epochs.
        jobs: runs at a time, 1 or more. They share the cores, and take turns with the GPUs.
        engine: "local", or "ray" for the tasks of a Ray cluster.
        cpus: CPUs of each run on the cluster, 1 by default.
        gpus: GPUs of each run on the cluster; by default 1 where it has any.
        fit_args: arguments of every ``lit-tricks fit``; on the command line all arguments after ``--``. They must set
            ``--trainer.max_epochs``, if no configuration does.

    Returns:
        The configuration of the recipe, for ``lit-tricks fit --config``.

    Raises:
        FileNotFoundError: for a configuration that does not exist.
        ValueError: if an argument is out of range, a candidate is part of the base, or ``out`` holds another race.
        RuntimeError: if the budget is below one run, or no run of the base works.
    """
    groups = [group.split("|") for group in candidates]
    _check(config, groups, min_gain, max_seeds, short)
    check_engine("race", engine, jobs, cpus, gpus)
    choice("race", "score", score, ("per-cost", "per-epoch"))
    limit = Budget.parse(budget)
    names = {name: Path(name).stem for group in groups for name in group}
    paths = [find_config(name).resolve() for name in config]
    words = fit_args or []
    folder = Path(out)
    epochs = _epochs(paths, words)
    configs = [config_name(Path(name)) or name for name in config]  # another installation has other paths
    plan: dict[str, Any] = {"config": configs, "candidates": candidates, "fit_args": words, "score": score}
    plan |= {"min_gain": min_gain, "max_seeds": max_seeds, "short": short}
    plan["contents"] = {name: _digest(name) for name in (*configs, *names)}
    settings = Settings(
        max_seeds=max_seeds, min_gain=min_gain, equal_cost=score == "per-cost", short=short, epochs=epochs
    )
    with alone_in(folder, "race"):
        _write_plan(folder, plan)
        with engine_of(engine, jobs, cpus, gpus, folder) as (run, parallel):
            runs = Runs(folder, paths, words, epochs, names, run, limit, parallel)
            return _Race(runs, groups, settings).run()


class _Race:
    """Connects the decisions of a race with its runs, and stores the state of both."""

    def __init__(self, runs: Runs, groups: Sequence[Sequence[str]], settings: Settings) -> None:
        self.runs, self.groups, self.settings = runs, groups, settings
        self.verdict, self.stage, self.confirmed = Verdict(), "first run", dict[str, Any]()
        self._logged: dict[tuple[int, str, str], str] = {}
        self._made = len(runs.took)

    def run(self) -> Path:
        """Decide, confirm and report. Return the recipe."""
        with live(lambda: race_view(self.runs, self.verdict, self.stage)):
            self.runs.require_one(LEAST)
            self._decide()
            self._confirm()
        recipe = self.runs.recipe(self.verdict.kept)
        self._write()
        report_race(self.runs.folder)
        finished = self.runs.cell(Trial((), 0)).finished
        table = [COLUMNS, *([_cell(value) for value in row] for row in race_rows(self._content()))]
        track("race", self.runs.folder, [finished] if finished else [], table, self.runs.folder / "race.png")
        return recipe

    def _decide(self) -> None:
        deciding = decide(self.groups, _exclusive(self.runs.names), self.settings, self.verdict)
        try:
            requested = next(deciding)
            while True:
                this = self.verdict.rounds[-1]
                self.stage = f"round {len(self.verdict.rounds)}, {'test' if this.tested else 'screening'}"
                stacks = len(self.verdict.kept) + 2  # of a confirmation after one more keep
                try:
                    outcomes = self.runs.make(requested, (stacks if stacks == 2 else stacks + 1) * CONFIRMATION[0])
                except OutOfBudget as end:
                    requested = deciding.throw(end)
                else:
                    requested = deciding.send(outcomes)
                self._log()
                self._write()
        except StopIteration:
            self._log()

    def _confirm(self) -> None:
        """Run base, recipe, and recipe minus each trick with seeds that no decision has used."""
        kept, runs, settings = self.verdict.kept, self.runs, self.settings
        if not kept:
            return
        self.stage = "confirmation"
        stacks: dict[str, tuple[str, ...]] = {"base": (), "recipe": kept}
        if len(kept) > 1:
            stacks |= {f"without {runs.names[name]}": tuple(t for t in kept if t != name) for name in kept}
        lengths = {name: self._length_at_cost_of_recipe(tricks) for name, tricks in stacks.items()}
        first = settings.first_test_seed + settings.max_seeds
        seeds: list[int] = []
        for seed in range(first, first + CONFIRMATION[1]):
            try:
                runs.make([Trial(tricks, seed, lengths[name]) for name, tricks in stacks.items()], reserve=0)
            except OutOfBudget:
                break
            seeds.append(seed)
        scores = {}
        for name, tricks in stacks.items():
            found = [runs.scores(Trial(tricks, seed, lengths[name])) for seed in seeds]
            scores[name] = {
                split: [math.nan if (score := each.get(split)) is None else 100 * score for each in found]
                for split in ("val", "test")
            }
        epochs = {name: round(length * runs.epochs) for name, length in lengths.items()}
        self.confirmed = {"seeds": seeds, "stacks": scores, "epochs": epochs}

    def _length_at_cost_of_recipe(self, tricks: tuple[str, ...]) -> float:
        """Return the length at which a part of the recipe costs as much as the recipe."""
        tests = (each for found in self.verdict.rounds for each in found.tested if each.candidate == found.kept)
        costs = {each.candidate: each.cost for each in tests}
        length = math.prod(cost for name, cost in costs.items() if name not in tricks and math.isfinite(cost))
        if not self.settings.equal_cost or abs(length - 1) <= COST_TOLERANCE:
            return 1.0
        return self.settings.whole(length)

    def _log(self) -> None:
        """Log the decisions that are new."""
        for round_number, found in enumerate(self.verdict.rounds, start=1):
            for each in (*found.screened, *found.tested):
                place = (round_number, each.stage, each.candidate)
                if each.reason and self._logged.get(place) != each.reason:
                    self._logged[place] = each.reason
                    name = self.runs.names[each.candidate]
                    state = "in" if each.state == "open" else each.state
                    log.info("race: round %d, %s: %s is %s: %s", round_number, each.stage, name, state, each.reason)
        if len(self.runs.took) > self._made:
            self._made = len(self.runs.took)
            log.info("race: %s", left_of_budget(self.runs))

    def _write(self) -> None:
        write_whole(self.runs.folder / "race.json", json.dumps(self._content(), indent=2) + "\n")

    def _content(self) -> dict[str, Any]:
        """Return the content of ``race.json``, from which the report is made."""
        verdict, runs = self.verdict, self.runs
        content: dict[str, Any] = {
            "names": dict(runs.names),
            "kept": list(verdict.kept),
            "rounds": [asdict(each) for each in verdict.rounds],
            "excluded": verdict.excluded,
            "failed": runs.failures(),
            "out_of_budget": verdict.out_of_budget,
            "settings": asdict(self.settings),
            "clock": runs.clock,
            "budget": runs.budget.text,
            "runs": len(runs.took),
            "seconds": runs.spent,
            "confirmed": self.confirmed,
        }
        finite: dict[str, Any] = _finite(content)
        return finite


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _exclusive(names: Iterable[str]) -> list[frozenset[str]]:
    """Return the sets of candidates that cannot be stacked."""
    classes = {name: _classes(settings_of([name])) for name in names}
    return [frozenset(name for name, own in classes.items() if own & group) for group in EXCLUSIVE]


def _classes(settings: Mapping[str, Any]) -> set[str]:
    """Return the class names of the callbacks in a configuration."""
    trainer = settings.get("trainer") or {}
    callbacks = [*(trainer.get("callbacks") or []), *(trainer.get("callbacks+") or [])]
    paths = (each.get("class_path", "") if isinstance(each, dict) else each for each in callbacks)
    return {str(path).rpartition(".")[2] for path in paths}


def _check(
    config: Sequence[str], groups: Sequence[Sequence[str]], min_gain: float, max_seeds: int, short: float
) -> None:
    names = [name for group in groups for name in group]
    if not names or not all(names):
        raise ValueError("candidates is empty: name configurations of tricks, such as tricks/ema tricks/mixup.")
    stems = [Path(name).stem for name in names]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise ValueError(f"candidates has {twice[0]!r} twice: give each once, or rename a configuration.")
    base = {find_config(name).resolve() for name in config}
    for name in names:
        if find_config(name).resolve() in base:
            raise ValueError(f"candidates: {name!r} is part of the base already. Leave it out of one of the two.")
        if not settings_of([name]):
            raise ValueError(f"candidates: {name!r} has no settings, so that it is the base. Leave it out.")
        if bad := set(Path(name).stem) & set("+@"):
            raise ValueError(f"candidates: {name!r} has {min(bad)!r} in its name. Rename the file.")
    number("race", "min_gain", min_gain, "[0, 100]", "It is in points.")
    integer("race", "max_seeds", max_seeds, 3, "Two differences show nothing.", 1000)
    number("race", "short", short, "(0, 1]", "0.3 screens with runs of 30 % of the epochs.")


def _epochs(configs: Iterable[Path], fit_args: Sequence[str]) -> int:
    """Return the length of a run in epochs."""
    found = given(list(fit_args), "--trainer.max_epochs")
    if found is None:
        for path in configs:
            content = read_yaml(path) or {}
            found = (content.get("trainer") or {}).get("max_epochs", found)
    try:
        epochs = int(found)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        epochs = 0
    if epochs < 1:
        raise ValueError("the length of a run is unknown: add `-- --trainer.max_epochs 30`.")
    return epochs


def _digest(name: str) -> str:
    return hashlib.sha256(find_config(name).read_bytes()).hexdigest()


def _write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Note what the folder is for.

    Raises:
        ValueError: if it holds another race.
    """
    path = folder / "plan.json"
    before = read_object(path)
    if before is not None and before != plan:
        changed = [key for key in plan if before.get(key) != plan[key] and key != "contents"]
        files = before.get("contents")
        if not changed and isinstance(files, dict):
            changed = [
                f"the content of {name}" for name, digest in plan["contents"].items() if files.get(name) != digest
            ]
        what = ", ".join(changed) or "its plan"
        raise ValueError(f"{folder} holds another race ({what} differs): choose another folder with --out.")
    write_whole(path, json.dumps(plan, indent=2) + "\n")


def _finite(value: Any) -> Any:
    """Convert values that JSON does not support."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
