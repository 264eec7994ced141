"""Power-law averages: the formulas against numeric integrals, and mixtures against the mean over every step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lit_tricks.callbacks.averaging.power_law import LONGEST, power_ema_decay, power_ema_exponent, power_ema_mixture

LENGTHS = (0.01, 0.05, 0.1, 0.2, 0.28)
POINTS = (np.arange(20_000) + 0.5) / 20_000  # midpoints of the run, as shares of it


def profile(length: float, end: float = 1.0) -> np.ndarray:
    """The profile of an average after a share of the run, from the definition, as a density over the run."""
    exponent = power_ema_exponent(length)
    density = np.where(end >= POINTS, (exponent + 1) / end * (np.minimum(POINTS, end) / end) ** exponent, 0)
    assert density.mean() == pytest.approx(1, rel=1e-2)
    return density


@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_the_standard_deviation_of_the_profile(length):
    density = profile(length)
    mean = (density * POINTS).mean()
    assert math.sqrt((density * (POINTS - mean) ** 2).mean()) == pytest.approx(length, rel=1e-4)
    cubic = [1, 7, 16 - length**-2, 12 - length**-2]  # equation 126 of the paper
    assert power_ema_exponent(length) == pytest.approx(np.roots(cubic).real.max(), abs=1e-9)


def test_the_longest_average_is_uniform():
    assert power_ema_exponent(LONGEST) == pytest.approx(0, abs=1e-12)
    assert [power_ema_decay(LONGEST, updates) for updates in range(4)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])


@pytest.mark.parametrize("length", LENGTHS)
def test_decays_give_the_profile_over_the_steps(length):
    shares = np.zeros(100)
    for updates in range(100):
        decay = power_ema_decay(length, updates)
        shares *= decay
        shares[updates] = 1 - decay
    power = power_ema_exponent(length) + 1
    edges = (np.arange(101) / 100) ** power  # the profile's integral, in closed form
    np.testing.assert_allclose(shares, np.diff(edges), atol=1e-12)


@pytest.mark.parametrize(("length", "bound"), [(0.03, 0.05), (0.075, 0.01), (0.15, 0.01), (0.25, 0.02)])
def test_mixture_is_the_nearest_one_and_states_its_distance(length, bound):
    times = [time for time in range(1, 17) for _ in range(2)]
    shares, error = power_ema_mixture(times, [0.05, 0.2] * 16, end=16, length=length)
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    basis = np.stack([profile(each, time / 16) for time, each in zip(times, [0.05, 0.2] * 16, strict=True)])
    exact = profile(length)
    norm = math.sqrt((exact**2).mean())
    assert math.sqrt(((shares @ basis - exact) ** 2).mean()) / norm == pytest.approx(error, abs=1e-3)
    assert error < bound
    # The least distance among all shares that add up to 1: the last share is 1 minus the others.
    free = (basis[:-1] - basis[-1]).T
    least = np.linalg.lstsq(free, exact - basis[-1], rcond=None)[0]
    assert math.sqrt(((free @ least + basis[-1] - exact) ** 2).mean()) / norm == pytest.approx(error, abs=1e-3)


def test_stored_averages_are_mixed_exactly():
    times, lengths = [10, 10, 20, 20, 30, 30], [0.1, 0.05] * 3
    for place, length in ((4, 0.1), (5, 0.05)):
        shares, error = power_ema_mixture(times, lengths, end=30, length=length)
        assert error < 1e-6
        assert shares == pytest.approx([float(i == place) for i in range(6)], abs=1e-6)


def test_what_the_snapshots_do_not_cover_has_a_large_error():
    assert power_ema_mixture([10, 10], [0.05, 0.2], end=10, length=0.28)[1] > 0.2
    assert power_ema_mixture([10, 10, 20, 20], [0.05, 0.2] * 2, end=20, length=0.01)[1] > 0.5
