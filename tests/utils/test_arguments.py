from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_tricks.utils import arguments


class Owner:
    pass


def number(value, interval="[0, 1)", **kwargs):
    return arguments.number(Owner(), "x", value, interval, "0.5 is usual.", **kwargs)


def integer(value, least=1, **kwargs):
    return arguments.integer("function", "n", value, least, "Give a number of images.", **kwargs)


def texts(value):
    return arguments.texts(Owner(), "names", value, "Give names.")


def numbers(value, **kwargs):
    return arguments.numbers(Owner(), "xs", value, "(0, 10]", "Give numbers.", **kwargs)


@pytest.mark.parametrize(
    ("value", "found"),
    [(0.5, 0.5), (0, 0), (np.float32(0.5), 0.5), (np.int64(0), 0), (torch.tensor(0.25), 0.25), (Fraction(1, 4), 0.25)],
)
def test_number_becomes_a_plain_one(value, found):
    assert number(value) == found
    assert type(number(value)) is type(found)


@pytest.mark.parametrize(
    "value", [None, "", "nan", "0.5", True, -1, 1, 1.5, 10**400, 1e308, math.inf, math.nan, [], {}]
)
def test_number_is_checked(value):
    with pytest.raises(ValueError, match=r"^Owner\(x=.*\): x must be a number in \[0, 1\)\. 0\.5 is usual\.$"):
        number(value)


def test_both_ends_of_an_interval():
    assert number(1, "(0, 1]") == 1
    assert number(-3, "[-3, 3]") == -3
    for value in (0, math.nextafter(1, 2)):
        with pytest.raises(ValueError, match="x="):
            number(value, "(0, 1]")


@pytest.mark.parametrize("value", [3, np.int32(3), torch.tensor(3)])
def test_integer_becomes_a_plain_one(value):
    assert type(integer(value)) is int


@pytest.mark.parametrize("value", [None, "3", True, np.bool_(True), 0, 3.0, np.float64(3), 10**30, [], {}])
def test_integer_is_checked(value):
    with pytest.raises(ValueError, match=r"^function\(n=.*\): n must be an integer .* 1.* Give a number of images\.$"):
        integer(value)


def test_integer_names_the_largest_value_where_it_is_passed():
    with pytest.raises(ValueError, match="from 1 to 2147483647"):
        integer(10**30)
    with pytest.raises(ValueError, match="from 1 to 4"):
        integer(0, most=4)


def test_none_is_legal_only_with_a_meaning():
    assert number(None, or_none="the default") is None
    with pytest.raises(ValueError, match="or None for the default"):
        number("x", or_none="the default")


def test_choice_compares_types_too():
    options = (1, "a", False)
    assert arguments.choice(Owner(), "x", np.int64(1), options) == 1
    for value in (True, 1.0, 0, [], {}, "b", None):
        with pytest.raises(ValueError, match="x="):
            arguments.choice(Owner(), "x", value, options)


def test_flag_takes_booleans_only():
    assert arguments.flag(Owner(), "x", np.bool_(True)) is True
    for value in (1, 0, "true", None, []):
        with pytest.raises(ValueError, match="True or False"):
            arguments.flag(Owner(), "x", value)


def test_paths_are_kept_as_text():
    assert arguments.path(Owner(), "root", Path("a/b"), "Give a folder.") == str(Path("a/b"))
    for value in ("", " ", None, 3, b"a"):
        with pytest.raises(ValueError, match="root="):
            arguments.path(Owner(), "root", value, "Give a folder.")


@pytest.mark.parametrize("value", ["abc", [], [""], ["a", 1], {"a": 1}, {"a"}, None, b"ab"])
def test_texts_are_checked(value):
    with pytest.raises(ValueError, match="names="):
        texts(value)


def test_lists_of_texts_and_numbers_are_checked():
    assert texts(("a", "b")) == ["a", "b"]
    assert numbers(np.array([1.0, 2.0])) == [1.0, 2.0]
    assert numbers((1, 2.5), length=2) == [1, 2.5]
    for value in ([1, math.nan], [0], [1, True], "12", 3, []):
        with pytest.raises(ValueError, match="xs="):
            numbers(value)
    with pytest.raises(ValueError, match="a list of 3 numbers"):
        numbers([1, 2], length=3)


def test_long_values_are_cut():
    with pytest.raises(ValueError, match=r"\.\.\.\)") as error:
        integer("x" * 10_000)
    assert len(str(error.value)) < 250


def test_an_error_of_a_value_itself_passes_through():
    class Odd:
        def tolist(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        number(Odd())
