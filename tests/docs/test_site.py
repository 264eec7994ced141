"""The documentation: a page for each trick, and builds that fail where something is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_tricks import callbacks

pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "_ext"))

trick_pages: Any = pytest.importorskip("trick_pages")
from sphinx.errors import ExtensionError  # noqa: E402

ENTRIES = yaml.safe_load((ROOT / "docs" / "tricks.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(callbacks.__all__))
def test_page_of_a_trick_holds_every_part(name: str, tmp_path: Path) -> None:
    text = trick_pages.page(name, ENTRIES[name], trick_pages.costs(), tmp_path)
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        *("Measured effect", "In the literature", "Suggested values", "Cost and advice", "Combinations"),
        *("Precision, devices, resume", "How it works inside", "Citation", "API"),
    ]
    assert "@" in text.partition("```bibtex")[2]
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}
    assert set(ENTRIES[name]["conflicts"]) <= set(callbacks.__all__)


@pytest.mark.parametrize(
    ("what", "missing"),
    [("figure", set()), ("BibTeX", set()), ("measurement", {"cost"}), ("measured effect", {"not_measured"})],
)
def test_page_without_a_part_fails_and_names_the_trick(
    what: str, missing: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "figure":
        monkeypatch.delitem(trick_pages.FIGURES, "Compile")
    if what == "BibTeX":
        monkeypatch.setattr(trick_pages, "citations", lambda links: [])
    known = {key: value for key, value in ENTRIES["Compile"].items() if key not in missing}
    with pytest.raises(ExtensionError, match=f"Compile has no {what}"):
        trick_pages.page("Compile", known, {}, tmp_path)


def test_conflicts_are_mutual() -> None:
    pairs = {(name, other) for name, entry in ENTRIES.items() for other in entry["conflicts"]}
    assert pairs == {(other, name) for name, other in pairs}


def test_links_to_files_of_the_repository_exist() -> None:
    sources = [ROOT / "README.md", ROOT / "docs" / "tricks.yaml", *(ROOT / "docs").rglob("*.md")]
    pattern = re.compile(r"lit-tricks/lit-tricks/(?:(?:blob|tree)/)?main/([^)\s#\"]+)")
    links = {link for source in sources for link in pattern.findall(source.read_text(encoding="utf-8"))}
    assert len(links) > 10
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []
