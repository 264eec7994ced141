"""The README says what is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from helpers.cli import done, workplace
from helpers.tricks import CASES, TRICKS
from readme_table import README, tables, with_tables


def test_tables_are_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python tests/readme_table.py`"


def test_tables_have_every_trick_and_case():
    for name in TRICKS:
        assert sum(line.startswith(f"| `{name}` |") for line in tables().splitlines()) == 2
    assert f"| Trick | {' | '.join(CASES)} |" in tables()


def test_fits_are_understood(tmp_path: Path):
    readme = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^lit-tricks (fit .+)$", readme, re.MULTILINE)]
    commands = [words for words in commands if "--help" not in words and "runs/" not in " ".join(words)]
    assert len(commands) >= 5
    with workplace(tmp_path):
        for words in commands:
            done(*words, *["--print_config"] * ("--print_config" not in words))
