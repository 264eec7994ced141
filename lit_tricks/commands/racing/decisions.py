"""The decisions of a race, without any run: which trials to make next, which trick to keep, and when to stop.

A round searches one more trick on top of the leader, in two stages.

1. **Screening.** All candidates run with the same few seeds. After one, two and four seeds the better half stays. No
   claim is made from these seeds.
2. **Test.** The best candidate, and if it fails the second, is compared with the leader on seeds that were not used to
   choose it. Differences are paired by seed. A group sequential one-sided t-test evaluates them after 3, 4, 5, 6, 8,
   ... seeds, and spends its error probability as ``alpha * (n / N)^2`` ([Lan & DeMets,
   1983](https://doi.org/10.1093/biomet/70.3.659)). The first test gets four fifths of alpha, the second one fifth (the
   fallback procedure, [Wiens, 2003](https://doi.org/10.1002/pst.64)). So the probability to keep a trick without gain
   in a round is at most alpha.

A test ends early without a keep where even the estimate plus one standard error would not reach significance. That can
only lower the error probability.

One caveat: the critical values assume differences that are normally distributed, as means over thousands of images are.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["Comparison", "OutOfBudget", "Outcome", "Round", "Settings", "Trial", "Verdict", "critical_values", "decide"]

SCREENING = (1, 1, 2)  # seeds that are added before the worse half goes
COSTS_KNOWN = 1  # the step of the screening after which costs are known; it and the steps before compare equal epochs
LOOKS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
SHARES = (0.8, 0.2)  # of alpha, for the first and the second candidate that is tested in a round
PATHS = 400_000  # simulated to find critical values: their Monte Carlo error is below 1 %
COST_TOLERANCE = 0.05  # smaller differences in time are measurement noise


class Trial(NamedTuple):
    """A training run: the tricks on top of the base, the seed, and the length as a multiple of the base's epochs."""

    tricks: tuple[str, ...]
    seed: int
    length: float = 1.0


class Outcome(NamedTuple):
    """The score of a trial in per cent, NaN for a failed or diverged run, its cost in seconds, its memory in bytes."""

    score: float
    cost: float = math.nan
    memory: float = math.nan


Pair = tuple[tuple[tuple[str, ...], float], tuple[tuple[str, ...], float]]  # tricks and length of both sides
Requests = Generator[list[Trial], Mapping[Trial, Outcome], None]


class OutOfBudget(Exception):  # noqa: N818  # a signal, not an error
    """Thrown into ``decide`` if the requested trials do not fit into the budget."""


@dataclass(frozen=True)
class Settings:
    """The rules of a race.

    Args:
        alpha: probability to keep a trick without gain, in each round, in (0, 1).
        max_seeds: largest number of seeds of a test, at least 3.
        min_gain: points; a candidate is out for good once its interval excludes a gain of this size.
        equal_cost: whether the cheaper side of a comparison trains for longer, so that both cost the same time.
        short: length of the screening runs, as a part of a full run, in (0, 1].
        epochs: of a full run, 1 or more. All runs have whole epochs.
    """

    alpha: float = 0.05
    max_seeds: int = 8
    min_gain: float = 0.0
    equal_cost: bool = True
    short: float = 1.0
    epochs: int = 100

    def whole(self, length: float) -> float:
        """Return a length that is a whole number of epochs, as a multiple of a full run."""
        return max(1, round(length * self.epochs)) / self.epochs

    @property
    def looks(self) -> tuple[int, ...]:
        """Return the numbers of seeds at which a test evaluates its differences."""
        return tuple(sorted({look for look in LOOKS if look < self.max_seeds} | {self.max_seeds}))

    @property
    def first_test_seed(self) -> int:
        """First seed that screening does not use."""
        return sum(SCREENING)


@dataclass
class Comparison:
    """A candidate against the leader, and the decision about it.

    ``differences`` are in points, one per seed. ``costs`` and ``memories`` are of the candidate and of the leader.
    """

    candidate: str
    stage: str
    differences: list[float] = field(default_factory=list)
    costs: list[tuple[float, float]] = field(default_factory=list)
    memories: list[tuple[float, float]] = field(default_factory=list)
    cost: float = math.nan
    reach: float = math.inf
    state: str = "open"  # "kept", "out", "failed", or "open"
    reason: str = ""

    @property
    def mean(self) -> float:
        """Mean difference; minus infinity after a failed run."""
        return statistics.fmean(self.differences) if self.differences else math.nan


@dataclass
class Round:
    """A round: its leader, the comparisons of its two stages, and the trick that was kept."""

    leader: tuple[str, ...]
    screened: list[Comparison] = field(default_factory=list)
    tested: list[Comparison] = field(default_factory=list)
    kept: str = ""


@dataclass
class Verdict:
    """The state of a race: the kept tricks, its rounds, and whether the budget ended it."""

    kept: tuple[str, ...] = ()
    rounds: list[Round] = field(default_factory=list)
    out_of_budget: bool = False
    excluded: dict[str, str] = field(default_factory=dict)  # candidates that are out for good, with the reason


@functools.cache
def critical_values(alpha: float, looks: tuple[int, ...]) -> dict[int, float]:
    """Return the value that the t statistic must reach at each look.

    They are found by simulating differences without gain: at each look the paths above its value are the part of alpha
    that is spent there. The last look is the end, at which all of alpha is spent.

    Args:
        alpha: one-sided error probability over all looks, in (0, 1).
        looks: numbers of seeds, increasing, at least 2.
    """
    paths = np.random.default_rng(0).standard_normal((PATHS, looks[-1]))
    sums, squares = paths.cumsum(1), (paths**2).cumsum(1)
    open_paths = np.ones(PATHS, dtype=bool)
    values: dict[int, float] = {}
    spent = 0.0
    for look in looks:
        mean = sums[:, look - 1] / look
        deviation = np.sqrt((squares[:, look - 1] / look - mean**2) * look / (look - 1))
        statistic = mean / deviation * math.sqrt(look)
        due = alpha * (look / looks[-1]) ** 2
        crossing = round((due - spent) * PATHS)
        ordered = np.sort(statistic[open_paths])[::-1]
        values[look] = float(ordered[crossing - 1]) if crossing else math.inf
        open_paths &= statistic < values[look]
        spent = due
    return values


def decide(
    candidates: Sequence[Sequence[str]], exclusive: Sequence[frozenset[str]], settings: Settings, verdict: Verdict
) -> Requests:
    """Yield requests for trials, and record the decisions from their outcomes in ``verdict``.

    Send the outcomes of all requested trials. Throw ``OutOfBudget`` to end.

    Args:
        candidates: groups of alternatives, of which at most one is kept.
        exclusive: further sets of candidates that cannot be stacked.
        settings: rules.
        verdict: is filled in.
    """
    try:
        while True:
            rest = _stackable(candidates, exclusive, verdict)
            if not rest:
                return
            this = Round(verdict.kept)
            verdict.rounds.append(this)
            yield from _screen(this, rest, settings, verdict)
            yield from _test(this, settings, verdict)
            if not this.kept:
                return
            verdict.kept = (*verdict.kept, this.kept)
    except OutOfBudget:
        verdict.out_of_budget = True


def _stackable(candidates: Sequence[Sequence[str]], exclusive: Sequence[frozenset[str]], verdict: Verdict) -> list[str]:
    """Return the candidates that may still be added to the leader."""
    kept = set(verdict.kept)
    groups = [frozenset(group) for group in candidates] + list(exclusive)
    taken = {name for group in groups if group & kept for name in group}
    names = [name for group in candidates for name in group]
    return [name for name in names if name not in taken | kept and name not in verdict.excluded]


def _screen(this: Round, rest: list[str], settings: Settings, verdict: Verdict) -> Requests:
    """Rank the candidates on a few seeds, and drop the worse half after each step."""
    this.screened = [Comparison(name, "screening") for name in rest]
    live, first = list(this.screened), 0
    for step, count in enumerate(SCREENING):
        seeds = range(first, first + count)
        yield from _compare(this.leader, live, seeds, settings, settings.short)
        first += count
        for each in live:
            _exclude_failed(each, verdict)
            if step == COSTS_KNOWN:
                each.cost = _cost(each)
        live = sorted((each for each in live if each.state == "open"), key=lambda each: -each.mean)
        if step < len(SCREENING) - 1:
            half = max(len(SHARES), (len(live) + 1) // 2)
            for each in live[half:]:
                each.state, each.reason = "out", f"in the worse half after {_seeds(first)}"
            live = live[:half]
    for each in live[len(SHARES) :]:
        each.state, each.reason = "out", f"not among the best {len(SHARES)} after {_seeds(first)}"
    for each in live[: len(SHARES)]:
        if each.mean <= 0:
            each.state, each.reason = "out", f"no gain in {_seeds(first)}"
        else:
            each.reason = "continues to the test"


def _test(this: Round, settings: Settings, verdict: Verdict) -> Requests:
    """Test the best candidates on fresh seeds, one after the other, until one is kept."""
    finalists = sorted((each for each in this.screened if each.state == "open"), key=lambda each: -each.mean)
    for share, finalist in zip(SHARES, finalists, strict=False):
        test = Comparison(finalist.candidate, "test", cost=finalist.cost)
        this.tested.append(test)
        values = critical_values(settings.alpha * share, settings.looks)
        done = 0
        for look in settings.looks:
            seeds = range(settings.first_test_seed + done, settings.first_test_seed + look)
            yield from _compare(this.leader, [test], seeds, settings, 1.0)
            done = look
            _exclude_failed(test, verdict)
            if test.state != "open":
                break
            _look(test, look, values, settings, verdict)
            if test.state != "open":
                break
        if test.state == "open":
            test.state, test.reason = "out", "the leader failed at too many seeds"
        if test.state == "kept":
            this.kept = test.candidate
            tested = {each.candidate for each in this.tested}
            for each in finalists:
                if each.candidate not in tested:
                    each.state, each.reason = "out", "not tested in this round, since another was kept"
            return


def _look(test: Comparison, look: int, values: Mapping[int, float], settings: Settings, verdict: Verdict) -> None:
    """Decide a test at one of its looks, if its differences are clear enough."""
    last = settings.max_seeds
    if len(test.differences) < 2:
        return
    error = statistics.stdev(test.differences) / math.sqrt(len(test.differences))
    test.reach = values[look] * error if math.isfinite(values[look]) else math.inf
    if test.mean - test.reach > 0:
        test.state, test.reason = "kept", f"the interval is above 0 after {look} seeds"
    elif test.mean + test.reach < settings.min_gain:
        test.state, test.reason = "out", f"the interval excludes a gain of {settings.min_gain:g} after {look} seeds"
        verdict.excluded[test.candidate] = test.reason
    elif look == last:
        test.state, test.reason = "out", f"no gain was shown in {last} seeds"
    elif (test.mean + error) * math.sqrt(last) < values[last] * error * math.sqrt(look):
        test.state, test.reason = "out", f"{last} seeds would hardly show a gain, after {look}"


def _compare(
    leader: tuple[str, ...], arms: Sequence[Comparison], seeds: Sequence[int], settings: Settings, length: float
) -> Requests:
    """Add the differences of the arms to the leader at these seeds, at equal cost if the settings request it."""
    if not arms or not seeds:
        return
    pairs = {each.candidate: _pair(leader, each, settings, length) for each in arms}
    outcomes = yield _trials(pairs.values(), seeds)
    for each in arms:
        (tricks, length), (base_tricks, base_length) = pairs[each.candidate]
        for seed in seeds:
            base, own = outcomes[Trial(base_tricks, seed, base_length)], outcomes[Trial(tricks, seed, length)]
            if math.isnan(base.score):
                continue  # a seed without a reference is no pair
            each.differences.append(own.score - base.score if not math.isnan(own.score) else -math.inf)
            each.costs.append((own.cost, base.cost))
            each.memories.append((own.memory, base.memory))


def _trials(pairs: Iterable[Pair], seeds: Sequence[int]) -> list[Trial]:
    """Return the trials of both sides of comparisons, each once."""
    sides = dict.fromkeys(side for pair in pairs for side in pair)
    return [Trial(tricks, seed, length) for tricks, length in sides for seed in seeds]


def _pair(leader: tuple[str, ...], arm: Comparison, settings: Settings, length: float) -> Pair:
    """Return tricks and length of both sides of a comparison: the cheaper one trains for longer."""
    own, length = (*leader, arm.candidate), settings.whole(length)
    if not settings.equal_cost or math.isnan(arm.cost) or abs(arm.cost - 1) <= COST_TOLERANCE:
        return (own, length), (leader, length)
    if arm.cost > 1:
        return (own, length), (leader, settings.whole(length * arm.cost))
    return (own, settings.whole(length / arm.cost)), (leader, length)


def _cost(each: Comparison) -> float:
    """Return the time of a run with the candidate, as a multiple of a run without it.

    Other work on the machine can only make a run slower, so the fastest run of each side counts.
    """
    known = [(own, base) for own, base in each.costs if own > 0 and base > 0]
    return min(own for own, _ in known) / min(base for _, base in known) if known else 1.0


def _exclude_failed(each: Comparison, verdict: Verdict) -> None:
    failed = sum(math.isinf(difference) for difference in each.differences)
    if failed:
        each.state, each.reason = "failed", f"{failed} of {len(each.differences)} runs failed or diverged"
        verdict.excluded[each.candidate] = each.reason


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"
