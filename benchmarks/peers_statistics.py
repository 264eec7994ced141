"""Statistics of paired runs for peers.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtr

from lit_tricks.run.report.ablation_table import paired_change


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values that hold for all comparisons together, in the order given (Holm, 1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p) - rank) * p[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of Student's t-test that paired differences have mean 0; 1 for a single one."""
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return 1.0
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(n - 1, -abs(mean) / error))


def reduction(errors: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return how many per cent fewer errors there are than the paired others, and both ends of the 95 % interval.

    Mean and interval are of the logarithm of the ratio, by Student's t.
    """
    mean, reach = paired_change([math.log(a / b) for a, b in zip(errors, others, strict=True)])
    return (
        -100 * math.expm1(mean),
        -100 * math.expm1(mean + reach) if math.isfinite(reach) else -math.inf,
        -100 * math.expm1(mean - reach),
    )
