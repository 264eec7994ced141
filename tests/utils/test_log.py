"""Log lines: seen in a terminal without any set-up, by ``caplog``, and once only."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import pytest

from lit_tricks import EMA
from lit_tricks.utils.log import log, show_lines

ROOT = logging.getLogger()


@contextlib.contextmanager
def terminal() -> Iterator[io.StringIO]:
    """A program that has not set up logging: pytest's handlers are gone. What it writes to stderr."""
    before = ROOT.handlers, log.handlers, log.level
    ROOT.handlers, log.handlers = [], []
    log.setLevel(logging.NOTSET)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            yield stderr
    finally:
        ROOT.handlers, log.handlers = before[:2]
        log.setLevel(before[2])


def test_lines_of_tricks_are_shown_without_set_up():
    with terminal() as stderr:
        EMA().announce("does this")
        EMA().announce("does that")
        assert ROOT.handlers == []
    assert stderr.getvalue() == "EMA: does this\nEMA: does that\n"


def test_lines_follow_stderr_when_it_is_replaced():
    with terminal() as stderr:
        show_lines()
        with contextlib.redirect_stderr(io.StringIO()) as other:
            log.info("a line")
    assert (stderr.getvalue(), other.getvalue()) == ("", "a line\n")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("logger", [ROOT, log], ids=["root", "lit_tricks"])
def test_lines_go_to_the_handler_of_the_program_alone(when, logger):
    with terminal() as stderr:
        if when == "after":
            show_lines()
        logger.addHandler(logging.StreamHandler(stream := io.StringIO()))
        show_lines()
        log.info("a line")
    assert (stderr.getvalue(), stream.getvalue()) == ("", "a line\n")


def test_level_that_the_program_has_set_stays():
    with terminal() as stderr:
        log.setLevel(logging.WARNING)
        EMA().announce("does this")
    assert stderr.getvalue() == ""


def test_caplog_sees_the_lines(caplog):
    EMA().announce("does this")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("lit_tricks", "EMA: does this")]
