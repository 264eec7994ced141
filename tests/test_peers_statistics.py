"""Statistics of the comparison with other libraries, against SciPy and Holm's definition."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from peers_statistics import holm, p_value, reduction

OURS, PEER = [18.2, 17.9, 18.6, 18.1, 18.4], [19.9, 18.8, 19.1, 20.2, 19.0]


def test_holm_equals_the_closed_test_of_bonferroni():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.6, 0.03])
    # An adjusted p-value is the largest Bonferroni p-value of all sets of hypotheses that contain the hypothesis.
    indices = range(len(p))
    sets = [list(each) for size in indices for each in itertools.combinations(indices, size + 1)]
    closed = [max(min(1, len(each) * p[each].min()) for each in sets if i in each) for i in indices]
    assert holm(p.tolist()) == pytest.approx(closed)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R's p.adjust


def test_p_value_equals_the_paired_t_test():
    differences = [b - a for a, b in zip(OURS, PEER, strict=True)]
    assert p_value(differences) == pytest.approx(stats.ttest_rel(PEER, OURS).pvalue)
    assert p_value([-each for each in differences]) == pytest.approx(p_value(differences))
    assert (p_value([0.5]), p_value([0.0, 0.0]), p_value([0.5, 0.5])) == (1.0, 1.0, 0.0)


def test_reduction_equals_the_interval_of_the_logarithm():
    found = np.log(OURS) - np.log(PEER)
    low, high = stats.t.interval(0.95, len(found) - 1, found.mean(), stats.sem(found))
    expected = 100 * (1 - np.exp([found.mean(), high, low]))
    assert reduction(OURS, PEER) == pytest.approx(expected.tolist())
    assert reduction([10.0], [20.0])[0] == pytest.approx(50)
