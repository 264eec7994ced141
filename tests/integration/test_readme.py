"""The statements and commands of README."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.cli import done, workplace
from readme_table import README, tables, with_tables

from lit_tricks import callbacks


@pytest.mark.slow
def test_table_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python tests/readme_table.py`"


@pytest.mark.slow
def test_table_has_every_trick():
    lines = tables().splitlines()
    for name in callbacks.__all__:
        assert sum(line.startswith(f"| [`{name}`]") for line in lines) == 1


def test_links_are_absolute():
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 40
    assert all(link.startswith("https://") for link in links)
    for path in (link.partition("/main/")[2] for link in links if "lit-tricks/lit-tricks" in link):
        assert not path or (README.parent / path).exists(), path


def test_readme_fits_on_a_page():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 97 + len(callbacks.__all__)  # the table has a line per trick


def test_fits_are_understood(tmp_path: Path):
    readme = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^lit-tricks (fit .+)$", readme, re.MULTILINE)]
    commands = [words for words in commands if "--help" not in words and "runs/" not in " ".join(words)]
    assert commands
    with workplace(tmp_path):
        for words in commands:
            done(*words, *["--print_config"] * ("--print_config" not in words))
