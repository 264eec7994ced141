"""Draws by counting: the published hash, on any device, in any order, and without patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_tricks.data.memory.draws import LANES, Key, below, draw

BITS = 2**64 - 1


def splitmix(state: int) -> int:
    """The output function of SplitMix64, as published: https://prng.di.unimi.it/splitmix64.c"""
    z = state & BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
    return z ^ (z >> 31)


def key(seed: int, epoch: int, indices: torch.Tensor) -> Key:
    return Key(seed, torch.full_like(indices, epoch), indices)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, BITS, -1])
def test_draws_are_the_hash_of_their_key(seed: int) -> None:
    step = 0x9E3779B97F4A7C15
    indices = torch.tensor([0, 1, 49_999, 2**40])
    for epoch in (-1, 0, 7):
        found = draw(key(seed, epoch, indices))
        for column, index in enumerate(indices.tolist()):
            state = splitmix(splitmix(splitmix(seed) + epoch * step) + index * step)
            assert found[:, column].tolist() == [splitmix(state + lane * step) >> 32 for lane in range(1, LANES + 1)]


def test_draws_do_not_depend_on_the_batch() -> None:
    indices = torch.randperm(1000)
    whole = draw(key(3, 2, indices))
    parts = [draw(key(3, 2, part)) for part in indices.split(7)]
    assert torch.equal(whole, torch.cat(parts, 1))
    mixed = draw(Key(3, torch.arange(10) % 2, torch.arange(10)))
    assert torch.equal(mixed[:, 1::2], draw(key(3, 1, torch.arange(1, 10, 2))))


def test_draws_of_neighbors_have_no_pattern() -> None:
    """Neighboring seeds, epochs, indices and lanes are as good as random: the bounds are 5 standard deviations."""
    count = 20_000
    grids = [draw(key(seed, epoch, torch.arange(count))) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63, 0))]
    lanes = torch.cat(grids).double().numpy() / 2**32
    assert np.abs(lanes.mean(1) - 1 / 2).max() < 5 * np.sqrt(1 / 12 / count)
    correlations = np.corrcoef(np.concatenate((lanes[:, 1:], lanes[:, :-1])))
    assert np.abs(correlations[~np.eye(len(correlations), dtype=bool)]).max() < 5 / np.sqrt(count)
    for limit in (2, 9, 17):
        counts = torch.stack([torch.bincount(below(lane, limit), minlength=limit) for grid in grids for lane in grid])
        assert (counts - count / limit).abs().max() < 5.5 * np.sqrt(count / limit)
        assert counts.shape[1] == limit


def test_limits_may_differ_per_image() -> None:
    numbers = torch.tensor([0, 2**31, 2**32 - 1])
    assert below(numbers, torch.tensor([5, 5, 5])).tolist() == below(numbers, 5).tolist() == [0, 2, 4]
    assert below(numbers, torch.tensor([1, 2, 3])).tolist() == [0, 1, 2]
