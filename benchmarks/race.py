"""Compare a race, full grids and one seed on synthetic arms with known gains: ``python benchmarks/race.py``."""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

from lit_tricks.commands.racing.decisions import Outcome, Settings, Trial, Verdict, decide

RESULTS = Path(__file__).parent / "results" / "race.md"
IMAGES = "# A race on photographs"  # title of the part that race_images.py writes
# Standard deviations in points: what all arms of a seed share, and what is an arm's own. Paired differences have 0.40,
# runs 0.41, as in results/evidence.jsonl (0.1 to 0.6).
SHARED, OWN = 0.30, 0.28
SCENES: dict[str, tuple[float, ...]] = {
    "8 tricks, none gains": (0.0,) * 8,
    "2 of 8 gain (0.8, 0.5), one loses": (0.8, 0.5, 0, 0, 0, 0, 0, -0.5),
    "4 of 8 gain (1.2, 0.8, 0.5, 0.3), two lose": (1.2, 0.8, 0.5, 0.3, 0, 0, -0.5, -1.0),
    "3 of 8 gain (0.5 each)": (0.5, 0.5, 0.5, 0, 0, 0, 0, 0),
    "1 of 4 gains (0.5)": (0.5, 0, 0, 0),
}


class World:
    """Runs of known gains, each made once."""

    def __init__(self, gains: Sequence[float], generator: np.random.Generator) -> None:
        self.gains = {str(i): gain for i, gain in enumerate(gains)}
        self.generator = generator
        self.seeds: dict[int, float] = {}
        self.made: dict[Trial, float] = {}
        self.partial_runs = 0.0  # cost of shortened runs, in full runs

    def score(self, trial: Trial) -> float:
        """Return the score of a trial, the same whenever it is requested for."""
        if trial not in self.made:
            if trial.seed not in self.seeds:
                self.seeds[trial.seed] = self.generator.normal(0, SHARED)
            gain = sum(self.gains[name] for name in trial.tricks)
            self.made[trial] = 90 + gain + self.seeds[trial.seed] + self.generator.normal(0, OWN)
        return self.made[trial]

    def differences(self, leader: tuple[str, ...], name: str, seeds: Sequence[int]) -> list[float]:
        """Return the differences of an arm to the leader."""
        own = tuple(sorted((*leader, name)))
        return [self.score(Trial(own, seed)) - self.score(Trial(leader, seed)) for seed in seeds]

    def early(self, tricks: tuple[str, ...], share: float) -> float:
        """Return a score at a share of the first seed's run. Tricks gain there what they gain at the end."""
        self.partial_runs += share
        return sum(self.gains[name] for name in tricks) + self.generator.normal(0, OWN)

    @property
    def runs(self) -> float:
        """Cost so far, in full runs."""
        return len(self.made) + self.partial_runs


Screen = Callable[[World, tuple[str, ...], list[str]], list[str]]  # of a leader and arms, the arms to run


def race(world: World) -> tuple[str, ...]:
    """Return what a race keeps."""
    verdict = Verdict()
    race = decide([[name] for name in world.gains], [], Settings(equal_cost=False), verdict)
    requested = next(race)
    while True:
        found = {trial: Outcome(world.score(trial._replace(tricks=tuple(sorted(trial.tricks))))) for trial in requested}
        try:
            requested = race.send(found)
        except StopIteration:
            return verdict.kept


def grid(world: World, seeds: int = 8, alpha: float = 0.05) -> tuple[str, ...]:
    """Return what a full grid keeps: forward selection, all arms with all seeds, t-test by Bonferroni."""
    leader: tuple[str, ...] = ()
    rest = set(world.gains)
    while rest:
        found = {name: world.differences(leader, name, range(seeds)) for name in sorted(rest)}
        t = {name: np.mean(each) / np.std(each, ddof=1) * math.sqrt(seeds) for name, each in found.items()}
        p = {name: stats.t.sf(t[name], seeds - 1) for name in found}
        good = [name for name in found if p[name] < alpha / len(rest)]
        if not good:
            break
        best = max(good, key=lambda name: np.mean(found[name]))
        leader = tuple(sorted((*leader, best)))
        rest.remove(best)
    return leader


def one_seed(world: World, screen: Screen = lambda world, leader, arms: arms) -> tuple[str, ...]:
    """Return what forward selection by one seed keeps, from the arms that ``screen`` leaves in each round."""
    leader: tuple[str, ...] = ()
    rest = set(world.gains)
    while rest:
        arms = screen(world, leader, sorted(rest))
        found = {name: world.differences(leader, name, [0])[0] for name in arms}
        best = max(found, key=lambda name: found[name])
        if found[best] <= 0:
            break
        leader = tuple(sorted((*leader, best)))
        rest.remove(best)
    return leader


def halved(world: World, leader: tuple[str, ...], arms: list[str]) -> list[str]:
    """Return the arms that successive halving leaves: the better half at 1/4 and at 1/2 of the run.

    Runs continue from rung to rung, so the full runs of these arms cost only the second half.
    """
    for added in (0.25, 0.25):
        scores = {name: world.early((*leader, name), added) for name in arms}
        arms = sorted(arms, key=lambda name: -scores[name])[: math.ceil(len(arms) / 2)]
    world.partial_runs -= 0.5 * len(arms)
    return arms


def measure(method: Callable[[World], tuple[str, ...]], gains: Sequence[float], repeats: int) -> tuple[float, ...]:
    """Return the share of races with a wrong keep, the share of gains found, and the mean number of runs."""
    generator = np.random.default_rng(0)
    wrong, found, runs = 0, 0, 0.0
    for _ in range(repeats):
        world = World(gains, generator)
        kept = [world.gains[name] for name in method(world)]
        wrong += any(gain <= 0 for gain in kept)
        found += sum(gain > 0 for gain in kept)
        runs += world.runs
    return wrong / repeats, found / repeats / max(1, sum(gain > 0 for gain in gains)), runs / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2000)
    repeats = parser.parse_args().repeats
    methods = {
        "race": race,
        "full grid, 8 seeds": grid,
        "forward selection, 1 seed": one_seed,
        "successive halving, 1 seed": partial(one_seed, screen=halved),
    }
    lines = ["# A race on arms with known gains", ""]
    lines += [
        "| gains in points | method | wrong keeps in % of races | gains found in % | runs | x grid of as many gains |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for scene, gains in SCENES.items():
        found = {name: measure(method, gains, repeats) for name, method in methods.items()}
        runs = found["full grid, 8 seeds"][2]
        if any(gain > 0 for gain in gains):  # a grid with as many seeds as it needs to find what the race finds
            for seeds in itertools.count(8):
                larger = measure(partial(grid, seeds=seeds), gains, repeats)
                if larger[1] >= found["race"][1]:
                    found[f"full grid, {seeds} seeds: as many gains as the race"] = larger
                    runs = larger[2]
                    break
        for name, (wrong, share, made) in found.items():
            gain = f"{100 * share:.0f}" if any(g > 0 for g in gains) else "-"
            lines.append(f"| {scene} | {name} | {100 * wrong:.1f} | {gain} | {made:.1f} | {made / runs:.2f} |")
    lines += [
        "",
        "Lower is better for wrong keeps and runs, higher for gains found. A wrong keep is a trick whose true gain is "
        "0 or less. The grid also selects forward: each round runs all remaining tricks with all seeds. "
        "The last column compares with the smallest grid of at least 8 seeds that finds as many gains as the race. "
        "Successive halving drops half of the tricks at 1/4 and at 1/2 of the run, where their gains are as large as "
        "at its end. "
        f"{repeats} races each; a run's deviation is {SHARED} points that all arms of a seed share, and {OWN} of its "
        "own.",
        "",
        f"{platform.machine()} CPU, Python {platform.python_version()}, numpy {np.__version__}; "
        f"{datetime.date.today()}. `python benchmarks/race.py --repeats {repeats}`",
    ]
    _, title, images = RESULTS.read_text().partition(IMAGES) if RESULTS.is_file() else ("", "", "")
    RESULTS.write_text("\n".join([*lines, "", title + images]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
