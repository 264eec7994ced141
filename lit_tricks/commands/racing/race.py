"""``lit-tricks race``: the stack of tricks that gains on the user's own data, within a budget.

The rules are in ``decisions.py``; the runs are the cells of an ablation. A race that is started again replays its
decisions from the results in its folder, and continues.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_tricks.commands.ablation.ablate import settings_of
from lit_tricks.commands.ablation.cells import Cell, run_all, run_here
from lit_tricks.commands.ablation.exclusive import alone_in, read_object
from lit_tricks.commands.ablation.ray_engine import run_on_ray
from lit_tricks.commands.racing.decisions import Outcome, OutOfBudget, Settings, Trial, Verdict, decide
from lit_tricks.run.reading.scores import scores_in
from lit_tricks.run.report.race_page import report_race
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.config_files import find_config, given
from lit_tricks.utils.files import written_whole
from lit_tricks.utils.log import log
from lit_tricks.utils.trick_flags import apply_to_rows

__all__ = ["EXCLUSIVE", "race"]


# Tricks that raise an error beside each other, by the names of their configurations.
EXCLUSIVE = (
    frozenset({"ema", "swa"}),
    frozenset({"warmup_cosine", "warmup_step", "warmup_exponential"}),
    frozenset({"fixres", "drop_path"}),
    frozenset({"fixres", "progressive_resizing"}),
)
CONFIRMATION = (3, 8)  # seeds of the confirmation: at least, and at most
MARGIN = 1.15  # a run may take this much longer than the longest one so far


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
    engine: Literal["local", "ray"] = "local",
    cpus: float | None = None,
    gpus: float | None = None,
    fit_args: list[str] | None = None,
) -> Path:
    """Search the stack of tricks that gains most on your data, within a budget.

    Each round adds the trick that gains most to the leader, and ends with a test on seeds that were not used to choose
    it. The race ends when no candidate shows a gain. Then base, recipe, and the recipe without each of its tricks run
    with fresh seeds. Choices are made on validation data. Test data is evaluated for the verdict only.

    Every run is a plain ``lit-tricks fit`` of full length in a folder of its own. The same command continues a race
    that was stopped. Failed and diverged runs count as losses.

    Args:
        config: configurations of the base, by name or file.
        candidates: configurations of tricks. "a|b" stands for alternatives, of which one at most is kept.
        budget: time as "2h", "90m" or "300s", or a number of runs as "40". No run starts that would not end in time.
            A part is kept for the confirmation.
        out: folder for the runs, ``recipe.yaml``, ``race.md``, ``race.csv``, ``race.png`` and ``report.html``.
        min_gain: points, 0 or more. A candidate is out once its interval excludes a gain of this size.
        max_seeds: seeds of a test at most, 3 or more. More seeds find smaller gains.
        short: length of the screening runs as a part of the full length, in (0, 1]. Below 1, the screening can drop
            tricks that gain in long runs only, such as mixing.
        score: "per-cost" compares at equal training time: the cheaper side trains for more epochs. "per-epoch"
            compares at equal epochs.
        jobs: runs at a time, 1 or more. They share the cores, and take turns with the GPUs.
        engine: "local", or "ray" for the tasks of a Ray cluster.
        cpus: CPUs of each run on the cluster, 1 by default.
        gpus: GPUs of each run on the cluster; by default 1 where it has any.
        fit_args: words for every ``lit-tricks fit``; on the command line what follows ``--``. They must set
            ``--trainer.max_epochs``, if no configuration does.

    Returns:
        The configuration of the recipe, for ``lit-tricks fit --config``.

    Raises:
        FileNotFoundError: for a configuration that does not exist.
        ValueError: if an argument is out of range, a candidate is part of the base, or ``out`` holds another race.
        RuntimeError: if the budget is below one run, or no run of the base works.
    """
    groups = [group.split("|") for group in candidates]
    _check(config, groups, min_gain, max_seeds, short, jobs)
    limit = _Budget.parse(budget)
    names = {name: Path(name).stem for group in groups for name in group}
    paths = [find_config(name).resolve() for name in config]
    words = fit_args or []
    folder = Path(out)
    epochs = _epochs(paths, words)
    plan: dict[str, Any] = {"config": config, "candidates": candidates, "fit_args": words, "score": score}
    plan |= {"min_gain": min_gain, "max_seeds": max_seeds, "short": short}
    environment = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    environment.setdefault("WANDB_RUN_GROUP", folder.resolve().name)
    if engine == "ray":
        run = partial(run_on_ray, cpus=1 if cpus is None else cpus, gpus=gpus, environment=environment)
    else:
        run = partial(run_here, jobs=jobs, environment=environment)
    settings = Settings(
        max_seeds=max_seeds, min_gain=min_gain, equal_cost=score == "per-cost", short=short, epochs=epochs
    )
    with alone_in(folder, "race"):
        _write_plan(folder, plan)
        return _race(_Runs(folder, paths, words, epochs, names, run, limit, jobs), groups, settings)


def _race(runs: _Runs, groups: Sequence[Sequence[str]], settings: Settings) -> Path:
    """Decide, confirm and report. Return the recipe."""
    verdict = Verdict()
    runs.require_one()
    exclusive = [frozenset(name for name, stem in runs.names.items() if stem in group) for group in EXCLUSIVE]
    deciding = decide(groups, exclusive, settings, verdict)
    try:
        asked = next(deciding)
        while True:
            reserve = (len(verdict.kept) + 3) * CONFIRMATION[0]
            try:
                outcomes = runs.make(asked, reserve)
            except OutOfBudget as end:
                asked = deciding.throw(end)
            else:
                asked = deciding.send(outcomes)
            runs.write(verdict, settings, {})
    except StopIteration:
        pass
    confirmed = _confirm(runs, verdict, settings)
    runs.write(verdict, settings, confirmed)
    recipe = runs.recipe(verdict.kept)
    report_race(runs.folder)
    return recipe


def _confirm(runs: _Runs, verdict: Verdict, settings: Settings) -> dict[str, Any]:
    """Run base, recipe, and recipe minus each trick with seeds that no decision has used."""
    if not verdict.kept:
        return {}
    stacks = {"base": (), "recipe": verdict.kept}
    if len(verdict.kept) > 1:
        stacks |= {f"without {runs.names[name]}": tuple(t for t in verdict.kept if t != name) for name in verdict.kept}
    first = settings.first_test_seed + settings.max_seeds
    seeds: list[int] = []
    for seed in range(first, first + CONFIRMATION[1]):
        try:
            runs.make([Trial(tricks, seed) for tricks in stacks.values()], reserve=0)
        except OutOfBudget:
            break
        seeds.append(seed)
    found = {}
    for name, tricks in stacks.items():
        results = [runs.results(Trial(tricks, seed)) for seed in seeds]
        found[name] = {split: [100 * (each.get(split) or math.nan) for each in results] for split in ("val", "test")}
    return {"seeds": seeds, "stacks": found}


class _Budget:
    """A limit in seconds or in runs."""

    def __init__(self, text: str, seconds: float, runs: float) -> None:
        self.text, self.seconds, self.runs = text, seconds, runs

    @classmethod
    def parse(cls, text: str) -> _Budget:
        """Read "2h", "90m", "300s" or "40".

        Raises:
            ValueError: for anything else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(h|m|s|runs?|)\s*", str(text))
        if not match or not float(match[1]):
            raise ValueError(f'budget={text!r} must be a time such as "2h", "90m" or "300s", or a number of runs.')
        unit = {"h": 3600.0, "m": 60.0, "s": 1.0}.get(match[2])
        amount = float(match[1])
        return cls(str(text), amount * unit if unit else math.inf, math.inf if unit else amount)


class _Runs:
    """The runs of a race: made where they are missing, and read."""

    def __init__(
        self,
        folder: Path,
        configs: Sequence[Path],
        fit_args: Sequence[str],
        epochs: int,
        names: Mapping[str, str],
        engine: Any,
        budget: _Budget,
        jobs: int,
    ) -> None:
        self.folder, self.configs, self.fit_args, self.epochs = folder, configs, fit_args, epochs
        self.names, self.engine, self.budget, self.jobs = names, engine, budget, jobs
        self.clock = folder / "clock.json"
        spent = read_object(self.clock) or {}  # without a clock, the finished runs are free
        self.spent = {
            key: float(value) for key, value in spent.items() if isinstance(value, int | float) and value >= 0
        }

    def make(self, trials: Sequence[Trial], reserve: int) -> dict[Trial, Outcome]:
        """Run what is missing, and return all outcomes.

        Args:
            trials: that are asked for.
            reserve: runs of full length that the budget must still hold afterwards.

        Raises:
            OutOfBudget: if the missing runs do not fit into the budget.
        """
        missing = [trial for trial in trials if self._key(trial) not in self.spent]
        if missing and not self._fits(missing, reserve):
            raise OutOfBudget
        cells = [self._cell(trial) for trial in missing]
        for i in range(0, len(cells), max(1, self.jobs)):
            batch = cells[i : i + max(1, self.jobs)]
            start = time.monotonic()
            run_all(batch, self.engine, name="race")
            seconds = time.monotonic() - start
            for trial, cell in zip(missing[i:], batch, strict=False):
                if not cell.finished:
                    log.warning("race: %s, seed %d failed: %s", cell.name, cell.seed, cell.last_words())
                self.spent[self._key(trial)] = seconds
            self._save_clock()
        return {trial: self._outcome(trial) for trial in trials}

    def require_one(self) -> None:
        """Make the first run of the base, which tells how long a run takes.

        Raises:
            RuntimeError: if it fails, logs no score, or takes longer than the budget.
        """
        first = Trial((), 0)
        if self._key(first) not in self.spent:
            start = time.monotonic()
            cell = self._cell(first)
            run_all([cell], self.engine, name="race")
            if not cell.finished:
                raise RuntimeError(f"the base does not run: {cell.last_words()} (more in {cell.log}).")
            self.spent[self._key(first)] = time.monotonic() - start
            self._save_clock()
        if "val" not in self.results(first):
            raise RuntimeError(
                f"the base logs no score on validation data, as {self._cell(first).finished} shows: choices need one."
            )
        seconds = self.spent[self._key(first)]
        least = 2 * CONFIRMATION[0] + 2
        if self.budget.seconds < seconds or self.budget.runs < 1:
            raise RuntimeError(f"budget={self.budget.text} is below one run, which takes {seconds:.0f} s here.")
        if self.budget.seconds < least * seconds / self.jobs or self.budget.runs < least:
            log.warning("race: a run takes %.0f s; the budget holds no race of even one candidate", seconds)

    def results(self, trial: Trial) -> dict[str, float]:
        """Return the first score of a finished run, as a fraction, by split."""
        run = self._cell(trial).finished
        if not run:
            return {}
        content = read_object(run / "results.json") or {}
        metrics = content.get("averaged") or content.get("raw") or {}
        return {
            split: found[scores_in(found)[0]]
            for split, found in metrics.items()
            if split in ("val", "test") and scores_in(found)
        }

    def recipe(self, kept: tuple[str, ...]) -> Path:
        """Write the configuration of a stack that has run, for ``lit-tricks fit``."""
        runs = (self._cell(Trial(kept, seed)).finished for seed in range(1000))
        run = next(run for run in runs if run)
        content = read_yaml(run / "config.yaml")
        for key in ("name", "ckpt_path"):
            content.pop(key, None)
        content["seed_everything"] = 0
        content["trainer"]["default_root_dir"] = "runs"
        path = self.folder / "recipe.yaml"
        stack = " + ".join(self.names[name] for name in kept) or "no trick"
        with written_whole(path) as part:
            part.write_text(
                f"# The recipe of a race: the base with {stack}.\n#\n#   lit-tricks fit --config {path}\n"
                + yaml.safe_dump(content, sort_keys=False),
                encoding="utf-8",
            )
        return path

    def write(self, verdict: Verdict, settings: Settings, confirmed: Mapping[str, Any]) -> None:
        """Write ``race.json``, from which the report is made."""
        rounds = []
        for each in verdict.rounds:
            rounds.append(asdict(each))
        content = {
            "names": dict(self.names),
            "kept": list(verdict.kept),
            "rounds": rounds,
            "excluded": verdict.excluded,
            "out_of_budget": verdict.out_of_budget,
            "settings": asdict(settings),
            "budget": self.budget.text,
            "runs": len(self.spent),
            "seconds": sum(self.spent.values()) / max(1, self.jobs),
            "confirmed": dict(confirmed),
        }
        with written_whole(self.folder / "race.json") as part:
            part.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")

    def _fits(self, missing: Sequence[Trial], reserve: int) -> bool:
        if len(self.spent) + len(missing) + reserve > self.budget.runs:
            return False
        full = max((s for key, s in self.spent.items() if "@" not in key), default=0.0)
        wanted = sum(trial.length for trial in missing) + reserve
        return sum(self.spent.values()) / self.jobs + MARGIN * full * wanted / self.jobs <= self.budget.seconds

    def _outcome(self, trial: Trial) -> Outcome:
        cell = self._cell(trial)
        score = self.results(trial).get("val", math.nan)
        if not cell.finished:
            return Outcome(math.nan)
        content = read_object(cell.finished / "results.json") or {}
        seconds = content.get("cpu_seconds") or content.get("seconds")  # of a GPU the clock's
        return Outcome(100 * score if score is not None else math.nan, seconds if seconds else math.nan)

    def _key(self, trial: Trial) -> str:
        stack = "+".join(["base", *(self.names[name] for name in trial.tricks)])
        return f"{stack}@{trial.length:g}-seed{trial.seed}" if trial.length != 1 else f"{stack}-seed{trial.seed}"

    def _cell(self, trial: Trial) -> Cell:
        key = self._key(trial)
        stack = key.rpartition("-seed")[0]
        row = self.folder / "rows" / f"{stack}.yaml"
        if not row.is_file():
            settings = settings_of(trial.tricks)
            apply_to_rows(self.fit_args, [settings])
            if trial.length != 1:
                settings.setdefault("trainer", {})["max_epochs"] = max(1, round(trial.length * self.epochs))
            row.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(row) as part:
                part.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        configs = [f"--config={path}" for path in (*self.configs, row.resolve())]
        words = apply_to_rows(self.fit_args, map(settings_of, ([name] for name in self.names)))
        if trial.length != 1:  # a flag among them would win over the row
            words.append(f"--trainer.max_epochs={max(1, round(trial.length * self.epochs))}")
        return Cell(stack, trial.seed, self.folder.resolve() / "runs" / key, [*configs, *words])

    def _save_clock(self) -> None:
        with written_whole(self.clock) as part:
            part.write_text(json.dumps(self.spent, indent=1) + "\n", encoding="utf-8")


def _check(
    config: Sequence[str], groups: Sequence[Sequence[str]], min_gain: float, max_seeds: int, short: float, jobs: int
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
    if not min_gain >= 0 or math.isinf(min_gain):
        raise ValueError(f"min_gain={min_gain!r} must be 0 or more, in points.")
    if max_seeds < 3:
        raise ValueError(f"max_seeds={max_seeds} must be at least 3: two differences show nothing.")
    if not 0 < short <= 1:
        raise ValueError(f"short={short!r} must be in (0, 1]. 0.3 screens with runs of 30 % of the epochs.")
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1.")


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


def _write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    path = folder / "plan.json"
    before = read_object(path)
    if before is not None and before != plan:
        changed = ", ".join(key for key in plan if before.get(key) != plan[key])
        raise ValueError(f"{folder} holds another race ({changed} differs): choose another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace what JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
