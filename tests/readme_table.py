"""The tables of the tricks in the README: ``python tests/readme_table.py`` writes them, from cards and contract."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import yaml
from helpers.tricks import CASES, TRICKS

from lit_tricks import callbacks

README = Path(__file__).parents[1] / "README.md"
MARKERS = ("<!-- tricks table: start -->", "<!-- tricks table: end -->")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def effect(name: str) -> str:
    """First line of the card, with its link."""
    card = inspect.getdoc(getattr(callbacks, name)) or ""
    return card.partition("\n")[0].removesuffix(".").replace("``", "`")


def use(name: str) -> str:
    """The example of the card, as one line of Python."""
    [example] = re.findall(r"``- (.+)``", inspect.getdoc(getattr(callbacks, name)) or "")
    arguments = yaml.safe_load(example).get("init_args", {})
    return f"`{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})`"


def tables() -> str:
    what = [[f"`{name}`", effect(name), use(name)] for name in TRICKS]
    works = [
        [f"`{name}`", *("refused" if case in row.refused else "yes" for case in CASES)] for name, row in TRICKS.items()
    ]
    return f"{table(['Trick', 'What it does', 'Use'], what)}\n\n{table(['Trick', *CASES], works)}"


def with_tables(readme: str) -> str:
    start, end = MARKERS
    if readme.count(start) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md needs the lines {start} and {end}, once each, around the tables.")
    before, _, rest = readme.partition(start)
    return f"{before}{start}\n{tables()}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
