"""The pure functions: their examples run, and the module lists all of them."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import lit_tricks
from lit_tricks import callbacks, functional


@pytest.mark.parametrize("name", functional.__all__)
def test_examples_run_as_written(name):
    function = getattr(functional, name)
    names = vars(inspect.getmodule(function)) | {"torch": torch}
    [example] = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert example.examples
    result = doctest.DocTestRunner(verbose=False).run(example)
    assert (result.failed, result.attempted) == (0, len(example.examples))


def test_functions_of_trick_files_are_listed():
    """Except for those that only make sense with their trick."""
    needs_trick = {"class_weights", "effective_batch_size", "focal_target", "layer_factors", "matrices_in"}
    needs_trick |= {"orthogonal_updates", "positive_weight"}
    in_packages = {"calibration_scores", "fit_temperature", "fit_vector_scaling", "strength_at", "warmup"}
    in_packages |= {"power_ema_decay", "power_ema_exponent", "power_ema_mixture"}
    found = {
        name
        for trick in callbacks.__all__
        for name, value in vars(inspect.getmodule(getattr(callbacks, trick))).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and value.__module__ == getattr(callbacks, trick).__module__
    }
    assert found - needs_trick == set(functional.__all__) - in_packages


def test_table_lists_every_function_and_its_trick():
    table = functional.__doc__
    assert all(f"``{name}``" in table for name in functional.__all__)
    tricks = {name for row in table.splitlines() if row.startswith("| ") for name in row.split("|")[1].split(", ")}
    assert {name.strip() for name in tricks} - {"Trick"} <= set(lit_tricks.callbacks.__all__)
