"""Power-law averages, and averages of any length as mixtures of stored ones ([Karras et al., 2024](https://arxiv.org/abs/2312.02696)).

The average after ``t`` updates has the profile ``(s / t) ** exponent`` over the updates ``s``. Its length is the
profile's standard deviation as a share of ``t``, so an average of length 0.1 covers the same part of every run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LONGEST", "power_ema_decay", "power_ema_exponent", "power_ema_mixture"]

LONGEST = math.sqrt(1 / 12)  # length of the uniform average, whose exponent is 0


@functools.lru_cache
def power_ema_exponent(length: float) -> float:
    """Return the exponent of a power-law average, the largest root of section C.1's cubic equation.

    Args:
        length: standard deviation of the profile as a share of the run (``sigma_rel``), above 0 and at most 0.2886,
            where the average is uniform and the exponent 0.

    Example:
        >>> [round(power_ema_exponent(length), 2) for length in (0.05, 0.1, 0.25)]
        [16.97, 6.94, 0.72]
    """
    needed = length**-2
    exponent = 1 / length  # above the root, where the cubic is convex: Newton's method descends to the root
    while True:
        value = ((exponent + 7) * exponent + 16 - needed) * exponent + 12 - needed
        lower = exponent - value / ((3 * exponent + 14) * exponent + 16 - needed)
        if not lower < exponent:
            return exponent
        exponent = lower


def power_ema_decay(length: float, updates: int) -> float:
    """Return the decay of an update of a power-law average: ``(1 - 1 / t) ** (exponent + 1)`` at update ``t``.

    Args:
        length: standard deviation of the profile as a share of the run, see ``power_ema_exponent``.
        updates: number of earlier updates, ``t - 1``. At 0 the average becomes a copy of the weights.

    Example:
        >>> [round(power_ema_decay(0.1, updates), 4) for updates in (0, 10, 1000)]
        [0.0, 0.4693, 0.9921]
    """
    return math.pow(updates / (updates + 1), power_ema_exponent(length) + 1)


def power_ema_mixture(
    times: Sequence[int], lengths: Sequence[float], end: int, length: float
) -> tuple[list[float], float]:
    """Return the shares of stored averages in the average of another length, and the error of the mixture.

    The shares add up to 1, and minimize the squared distance of the profiles, in float64 (the paper's algorithm 3,
    which scales the shares to this sum afterwards).

    Args:
        times: updates after which each average was stored, 1 or more.
        lengths: length of each stored average.
        end: updates after which the mixture is the average.
        length: length of the mixture.

    Returns:
        The shares, which may be negative, and the distance of the profiles relative to the norm of the exact profile.

    Example:
        >>> shares, error = power_ema_mixture([50, 50, 100, 100], [0.05, 0.2, 0.05, 0.2], end=100, length=0.2)
        >>> [round(share, 6) + 0.0 for share in shares], round(error, 6) + 0.0
        ([0.0, 0.0, 0.0, 1.0], 0.0)
    """
    ends = torch.tensor([*times, end], dtype=torch.float64)
    exponents = torch.tensor([power_ema_exponent(each) for each in (*lengths, length)], dtype=torch.float64)
    overlaps = _overlaps(ends, exponents)
    norms = overlaps.diagonal()[:-1].sqrt()
    count = len(times)
    # Lagrange's conditions: the squared distance is least among mixtures whose shares add up to 1.
    system, wanted = torch.zeros(count + 1, count + 1, dtype=torch.float64), torch.ones(count + 1, dtype=torch.float64)
    system[:-1, :-1] = overlaps[:-1, :-1] / norms / norms[:, None]
    system[:-1, -1] = system[-1, :-1] = norms[-1] / norms
    wanted[:-1] = overlaps[:-1, -1] / norms
    wanted[-1] = norms[-1]
    shares = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:-1, 0] / norms
    coefficients = torch.cat([shares, -torch.ones(1, dtype=torch.float64)])
    squared = float(coefficients @ overlaps @ coefficients / overlaps[-1, -1])
    return shares.tolist(), math.sqrt(max(squared, 0.0))


def _overlaps(ends: Tensor, exponents: Tensor) -> Tensor:
    """Return the integrals of the products of all pairs of profiles."""
    powers, logs = exponents + 1, ends.log()
    total = powers[:, None] + powers - 1
    shrunk = torch.minimum(logs[:, None], logs) * total - (powers * logs)[:, None] - powers * logs
    return powers[:, None] * powers / total * shrunk.exp()
