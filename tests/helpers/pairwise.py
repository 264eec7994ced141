"""Combinations of arguments in which every pair of values occurs, for tests of functions with many arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

__all__ = ["pairs_of", "pairwise", "parametrize_pairwise"]

Row = tuple[Any, ...]


def pairs_of(row: Row) -> set[tuple[int, int, Any, Any]]:
    """Return the pairs of values in a row, each with the positions of both."""
    return {(i, j, row[i], row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def pairwise(*values: Iterable[Any]) -> list[Row]:
    """Return rows of the product in which every pair of values of two arguments occurs.

    Each row is the one with the most pairs that no row before it has. There are about as many rows as the two longest
    arguments have combinations.
    """
    product = list(itertools.product(*values))
    missing = set().union(*map(pairs_of, product))
    rows = []
    while missing:
        rows.append(max(product, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows


def parametrize_pairwise(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the product of the values. Rows that ``pairwise`` leaves out have the mark ``full``."""
    short = set(pairwise(*values))
    marks = {True: (), False: (pytest.mark.full,)}
    product = itertools.product(*values)
    return pytest.mark.parametrize(names, [pytest.param(*row, marks=marks[row in short]) for row in product])
