"""The short run of the contract tests covers every pair of values."""

from __future__ import annotations

import itertools

import pytest
from helpers.pairwise import pairs_of, pairwise, parametrize_pairwise


@pytest.mark.parametrize("sizes", [(3, 2), (4, 2, 2), (22, 4, 2, 2), (3, 3, 3, 3), (1, 5, 2)])
def test_rows_have_every_pair_and_are_few(sizes: tuple[int, ...]) -> None:
    rows = pairwise(*map(range, sizes))
    product = set(itertools.product(*map(range, sizes)))
    assert set(rows) <= product
    assert set().union(*map(pairs_of, rows)) == set().union(*map(pairs_of, product))
    largest, second, *_ = sorted(sizes, reverse=True)
    assert len(rows) <= 1.5 * largest * second


def test_other_rows_of_the_product_are_marked_full() -> None:
    parameters = parametrize_pairwise("a, b, c", [1, 2], [3, 4], [5, 6]).args[1]
    short = [parameter.values for parameter in parameters if not parameter.marks]
    assert len(parameters) == 8
    assert sorted(short) == sorted(pairwise([1, 2], [3, 4], [5, 6]))
    assert {mark.name for parameter in parameters for mark in parameter.marks} == {"full"}
