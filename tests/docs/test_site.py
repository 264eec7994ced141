"""The documentation: a page for each trick, and builds that fail where something is missing."""

from __future__ import annotations

import inspect
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
    suggested = {argument for arguments, *_ in ENTRIES[name]["values"] for argument in arguments.split(", ")}
    assert suggested <= set(inspect.signature(getattr(callbacks, name)).parameters)


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


def test_overview_has_every_trick_with_its_goals_and_its_measured_effect() -> None:
    text = trick_pages.overview(ENTRIES, trick_pages.costs())
    cards, effects, recipes = re.split(r"^## .*$", text, flags=re.MULTILINE)
    for name, entry in ENTRIES.items():
        [tags] = re.findall(
            rf"^:::{{grid-item-card}} {name}\n.*\n.*\n:class-card: trick-card (.*)$", cards, re.MULTILINE
        )
        wanted = [trick_pages.tag("goal", goal) for goal in entry["goals"]]
        assert tags.split() == wanted + [f"budget-{budget}" for budget in entry["budgets"]]
        assert effects.count(f"[{name}]({trick_pages.slug(name)}.md)") == 1
    assert "recipes.md" in recipes


def test_a_goal_without_a_button_fails_the_build() -> None:
    wrong = {"EMA": ENTRIES["EMA"] | {"goals": ["fame"]}}
    with pytest.raises(ExtensionError, match=r"EMA: .*'fame'.*small data"):
        trick_pages.overview(wrong, trick_pages.costs())


def test_cases_of_the_contract_are_all_on_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(trick_pages.behavior("Compile"))
    assert "| compilation | - | `torch.compile` |" in text
    assert "| several devices | DDP, FSDP2 | - |" in text
    monkeypatch.setattr(trick_pages, "CASES", (*trick_pages.CASES, "TPU"))
    with pytest.raises(ExtensionError, match="lacks TPU"):
        list(trick_pages.behavior("Compile"))


def test_conflicts_are_mutual() -> None:
    pairs = {(name, other) for name, entry in ENTRIES.items() for other in entry["conflicts"]}
    assert pairs == {(other, name) for name, other in pairs}
