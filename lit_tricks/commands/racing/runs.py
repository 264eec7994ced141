"""The runs of a race: made where they are missing, timed, and read.

Two clocks are in use. The budget counts the time by the clock, and plans with it. The cost of a trick is CPU time where
no GPU trains, since other work on the machine makes runs longer by the clock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_tricks.commands.ablation.ablate import settings_of
from lit_tricks.commands.ablation.cells import Cell, Engine, run_unfinished
from lit_tricks.commands.ablation.exclusive import read_object
from lit_tricks.commands.racing.budget import Budget
from lit_tricks.commands.racing.decisions import Outcome, OutOfBudget, Trial
from lit_tricks.run.reading.scores import scores_in
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.log import log
from lit_tricks.utils.trick_flags import apply_to_rows

__all__ = ["Runs"]

MARGIN = 1.15  # a run may take this much longer than the longest one so far


@dataclass
class Runs:
    """The runs of a race, in ``folder/runs``, and what they took, in ``folder/clock.json``.

    Args:
        folder: of the race.
        configs: files of the base.
        fit_args: words for every ``lit-tricks fit``.
        epochs: of a full run.
        names: short name of each candidate.
        engine: makes runs.
        budget: of the race.
        parallel: how many runs the engine makes at a time.
    """

    folder: Path
    configs: Sequence[Path]
    fit_args: Sequence[str]
    epochs: int
    names: Mapping[str, str]
    engine: Engine
    budget: Budget
    parallel: int = 1
    took: dict[str, float] = field(init=False)  # seconds by the clock, of each run that has ended
    elapsed: float = field(init=False)  # seconds by the clock in which runs were made
    outcomes: dict[Trial, Outcome] = field(default_factory=dict)  # of all runs that the race has requested
    now: list[Cell] = field(default_factory=list)  # the cells that are made at the moment
    since: float | None = None  # when they were started
    failed: set[str] = field(default_factory=set)  # keys of runs that this process has tried

    def __post_init__(self) -> None:
        settings = {name: settings_of([name]) for name in self.names}
        self._words = apply_to_rows(self.fit_args, settings.values())
        clock = read_object(self.folder / "clock.json") or {}  # without a clock, the finished runs are free
        took = clock.get("runs")
        self.took = {k: float(v) for k, v in took.items() if _is_time(v)} if isinstance(took, dict) else {}
        self.elapsed = float(clock["elapsed"]) if _is_time(clock.get("elapsed")) else sum(self.took.values())

    @property
    def spent(self) -> float:
        """Seconds of the budget that are spent at this moment."""
        return self.elapsed + (0.0 if self.since is None else time.monotonic() - self.since)

    def make(self, trials: Sequence[Trial], reserve: int) -> dict[Trial, Outcome]:
        """Make the runs that are missing, and return all outcomes.

        Args:
            trials: the requested trials.
            reserve: runs of full length that the budget must still hold afterwards.

        Raises:
            OutOfBudget: if the missing runs do not fit into the budget.
        """
        missing = [trial for trial in trials if not self._has_ended(trial)]
        if missing and not self._fits(missing, reserve):
            raise OutOfBudget
        if missing:
            self._make(missing)
        for trial in trials:
            if trial in missing or trial not in self.outcomes:
                self.outcomes[trial] = self._outcome(trial)
        return {trial: self.outcomes[trial] for trial in trials}

    def require_one(self, least: int) -> None:
        """Make the first run of the base, which shows how long a run takes.

        Args:
            least: number of runs of a race of one candidate.

        Raises:
            RuntimeError: if the run fails, logs no score, or takes longer than the budget.
        """
        first = Trial((), 0)
        if not self._has_ended(first):
            self._make([first])
        key, cell = self.key(first), self.cell(first)
        if not cell.finished:
            raise RuntimeError(f"the base does not run: {cell.last_words()} (more in {cell.log}).")
        if "val" not in self.scores(first):
            raise RuntimeError(
                f"the base logs no score on validation data, as {cell.finished} shows. A race needs one of val/top1, "
                "val/miou and val/map to choose by."
            )
        seconds = self.took[key]
        if self.budget.seconds < seconds or self.budget.runs < 1:
            raise RuntimeError(
                f"budget={self.budget.text} is below one run, which takes {seconds:.0f} s here. A race of one "
                f"candidate takes {least} runs or more."
            )
        if self.budget.seconds < math.ceil(least / self.parallel) * seconds or self.budget.runs < least:
            log.warning(
                "race: budget=%s is too small for a race of one candidate: it takes %d runs or more, and a run takes "
                "%.0f s",
                *(self.budget.text, least, seconds),
            )

    def _outcome(self, trial: Trial) -> Outcome:
        """Return score, cost and memory of a run that has ended."""
        cell = self.cell(trial)
        content = read_object(cell.finished / "results.json") or {} if cell.finished else {}
        score = self.scores(trial).get("val")
        if score is None or not math.isfinite(score):
            return Outcome(math.nan)
        cost, memory = (content.get(name) or math.nan for name in (self.clock, "peak_memory"))
        return Outcome(100 * score, cost, memory)

    @functools.cached_property
    def clock(self) -> str:
        """Field of ``results.json`` that is the cost of a run: CPU time, or time by the clock where a GPU trains."""
        run = self.cell(Trial((), 0)).finished
        content = read_object(run / "results.json") or {} if run else {}
        return "cpu_seconds" if content.get("cpu_seconds") else "seconds"

    def scores(self, trial: Trial) -> dict[str, float | None]:
        """Return the first score of a finished run, as a fraction, by split."""
        run = self.cell(trial).finished
        content = read_object(run / "results.json") or {} if run else {}
        metrics = content.get("averaged") or content.get("raw") or {}
        return {
            split: found[scores_in(found)[0]]
            for split, found in metrics.items()
            if split in ("val", "test") and scores_in(found)
        }

    def failures(self) -> list[dict[str, Any]]:
        """List the runs that failed or diverged, with the reason."""
        found = []
        for trial, outcome in self.outcomes.items():
            if math.isfinite(outcome.score):
                continue
            cell = self.cell(trial)
            reason = "its score is not finite" if cell.finished else cell.last_words()
            found.append({"stack": cell.name, "seed": cell.seed, "reason": reason, "log": str(cell.log)})
        return found

    def recipe(self, kept: tuple[str, ...]) -> Path:
        """Write the configuration of a stack that has run, for ``lit-tricks fit``."""
        runs = (self.cell(trial).finished for trial in (*self.outcomes, Trial((), 0)) if trial.tricks == kept)
        run = next(run for run in runs if run)
        content: dict[str, Any] = read_yaml(run / "config.yaml")
        for key in ("name", "ckpt_path"):
            content.pop(key, None)
        content["seed_everything"] = 0
        content["trainer"] |= {"default_root_dir": "runs", "max_epochs": self.epochs}
        path = self.folder / "recipe.yaml"
        stack = " + ".join(self.names[name] for name in kept) or "no trick"
        header = f"# The recipe of a race: the base with {stack}.\n#\n#   lit-tricks fit --config {path}\n"
        write_whole(path, header + yaml.safe_dump(content, sort_keys=False))
        return path

    def key(self, trial: Trial) -> str:
        """Return the name of a run's folder."""
        stack = "+".join(["base", *(self.names[name] for name in trial.tricks)])
        return f"{stack}@{trial.length:g}-seed{trial.seed}" if trial.length != 1 else f"{stack}-seed{trial.seed}"

    def cell(self, trial: Trial) -> Cell:
        """Return the cell of a run, and write the configuration of its tricks if there is none."""
        key = self.key(trial)
        stack = key.rpartition("-seed")[0]
        row = self.folder / "rows" / f"{stack}.yaml"
        length = max(1, round(trial.length * self.epochs))
        if not row.is_file():
            settings = settings_of(trial.tricks)
            apply_to_rows(self.fit_args, [settings])
            if trial.length != 1:
                settings.setdefault("trainer", {})["max_epochs"] = length
            row.parent.mkdir(parents=True, exist_ok=True)
            write_whole(row, yaml.safe_dump(settings, sort_keys=False))
        configs = [f"--config={path}" for path in (*self.configs, row.resolve())]
        # a flag among the words would win over the row
        words = [*self._words, *([f"--trainer.max_epochs={length}"] if trial.length != 1 else [])]
        return Cell(stack, trial.seed, self.folder.resolve() / "runs" / key, [*configs, *words])

    def _has_ended(self, trial: Trial) -> bool:
        """Return whether a run has results, or has failed in this process. The next process tries it again."""
        key = self.key(trial)
        return key in self.took and (key in self.failed or self.cell(trial).finished is not None)

    def _make(self, trials: Sequence[Trial]) -> None:
        """Make runs, and save after each what it took."""
        cells = {self.key(trial): self.cell(trial) for trial in trials}
        keys = {id(cell): key for key, cell in cells.items()}
        before = self.elapsed
        self.now, self.since = list(cells.values()), time.monotonic()
        try:
            for key, cell in cells.items():
                if cell.finished:  # the race was killed before it could note this run
                    self.took[key] = _seconds_of(cell.finished)
            with contextlib.closing(run_unfinished(self.now, self.engine, "race")) as ended:
                for cell in ended:
                    if not cell.finished:
                        log.warning("race: %s, seed %d failed: %s", cell.name, cell.seed, cell.last_words())
                        self.failed.add(keys[id(cell)])
                    self.took[keys[id(cell)]] = cell.seconds
                    self._save(before + time.monotonic() - self.since)
        finally:
            self.elapsed, self.now, self.since = self.spent, [], None
            self._save()

    def _fits(self, missing: Sequence[Trial], reserve: int) -> bool:
        """Return whether the budget holds runs, and as many of full length after them."""
        if len(self.took) + len(missing) + reserve > self.budget.runs:
            return False
        full = max((seconds for key, seconds in self.took.items() if "@" not in key), default=0.0)
        longest = sorted((trial.length for trial in missing), reverse=True)[:: self.parallel]  # of those side by side
        waves = sum(longest) + math.ceil(reserve / self.parallel)
        return self.elapsed + MARGIN * full * waves <= self.budget.seconds

    def _save(self, elapsed: float | None = None) -> None:
        content = {"elapsed": self.elapsed if elapsed is None else elapsed, "runs": self.took}
        write_whole(self.folder / "clock.json", json.dumps(content, indent=1) + "\n")


def _seconds_of(run: Path) -> float:
    seconds: Any = (read_object(run / "results.json") or {}).get("seconds")
    return float(seconds) if _is_time(seconds) else 0.0


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
