"""The table of the tricks in the README: ``python tests/readme_table.py`` writes it, from cards and measurements."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from lit_tricks import callbacks

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "_ext"))
from effects import effect, entries  # noqa: E402

README = ROOT / "README.md"
MARKERS = ("<!-- tricks table: start -->", "<!-- tricks table: end -->")
SITE = "https://lit-tricks.github.io/lit-tricks/tricks"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claim(name: str) -> tuple[str, str]:
    """Return the first line of a card, and the link to its paper."""
    card = (inspect.getdoc(getattr(callbacks, name)) or "").partition("\n")[0]
    match = re.fullmatch(r"(.*) \((\[.*\]\(\S+\))\)\.", card)
    assert match, f"the first line of {name} is not `Claim ([paper](link)).`"
    return match[1].replace("``", "`"), match[2]


def measured(name: str) -> str:
    """Return the paired change in points with its 95 % interval, or a dash without a measurement."""
    entry = entries()[name]
    if "evidence" not in entry:
        return "-"
    found = effect(entry)
    return f"{found['change']:+.2f} ± {found['reach']:.2f}"


def slug(name: str) -> str:
    """Return the name of a trick's page."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def tables() -> str:
    """Return the table of the README."""
    rows = [
        [f"[`{name}`]({SITE}/{slug(name)}.html)", *claim(name), measured(name)] for name in sorted(callbacks.__all__)
    ]
    return table(["Trick", "What it does", "Paper", "Points"], rows)


def with_tables(readme: str) -> str:
    """Return the README with its table."""
    start, end = MARKERS
    if readme.count(start) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md needs the lines {start} and {end}, once each, around the table.")
    before, _, rest = readme.partition(start)
    return f"{before}{start}\n{tables()}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
