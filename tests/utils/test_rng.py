"""Random states that are restored: of the process, of data sets, samplers and loaders."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lit_tricks.utils.rng import isolated_random_state, seeded


class Draws(Dataset[torch.Tensor]):
    """Draws each item from its own generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand((), generator=self.generator)


def test_states_of_the_process_are_restored():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with isolated_random_state():
        random.random(), np.random.rand(), torch.rand(())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("kind", ["data set", "sampler", "loader"])
def test_generators_of_loaders_are_restored(kind):
    generator = torch.Generator().manual_seed(2)
    dataset = Draws()
    how = {"sampler": {"sampler": RandomSampler(dataset, generator=generator)}, "loader": {"generator": generator}}
    loaders = [DataLoader(dataset, shuffle=kind == "loader", **how.get(kind, {})) for _ in range(120)]
    own = dataset.generator if kind == "data set" else generator
    before = own.get_state()
    with isolated_random_state(loaders=loaders):
        list(loaders[-1])
        assert not torch.equal(own.get_state(), before)
    assert torch.equal(own.get_state(), before)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (np.random.default_rng, lambda generator: generator.random()),
        (np.random.RandomState, lambda generator: generator.rand()),
        (np.random.PCG64, lambda generator: generator.random_raw()),
        (random.Random, lambda generator: generator.random()),
        (np.random.SeedSequence, lambda sequence: sequence.entropy),
    ],
)
def test_generators_of_other_libraries_are_restored(make, draw):
    dataset = Draws()
    dataset.other = make(5)
    expected = draw(make(5))
    with isolated_random_state(loaders=[DataLoader(dataset)]):
        assert draw(dataset.other) == expected
    assert draw(dataset.other) == expected


def test_seeded_draws_the_same_and_restores_the_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with seeded(7, torch.device("cpu")):
        first = torch.rand(3)
        with seeded(8):
            torch.rand(3)
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), second)
