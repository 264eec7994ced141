"""The README says what is so."""

from __future__ import annotations

from readme_table import README, tables, with_tables
from tricks import CASES, TRICKS


def test_tables_are_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python tests/readme_table.py`"


def test_tables_have_every_trick_and_case():
    for name in TRICKS:
        assert sum(line.startswith(f"| `{name}` |") for line in tables().splitlines()) == 2
    assert f"| Trick | {' | '.join(CASES)} |" in tables()
