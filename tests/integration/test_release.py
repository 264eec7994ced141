"""The sources of a release: one version everywhere, its section of the changelog, and the steps of CI."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import lit_tricks

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]  # type: ignore[index]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION == lit_tricks.__version__


def test_changelog_has_notes_for_the_version() -> None:
    notes = script("release_notes").release_notes(VERSION, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert notes.startswith(("### ", "- ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    assert "\n## " not in notes


CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-01-02

### Added

- One thing.

## [1.1.0] - 2026-01-01

- Another thing.

[Unreleased]: https://example.org
[1.1.0]: https://example.org
"""


def test_release_notes_are_one_section_of_the_changelog() -> None:
    release_notes = script("release_notes").release_notes
    assert release_notes("1.2.0", CHANGELOG) == "### Added\n\n- One thing.\n"
    assert release_notes("1.1.0", CHANGELOG) == "- Another thing.\n"


@pytest.mark.parametrize("version", ["1.2", "2.0.0", "Unreleased"])
def test_version_without_notes_is_an_error(version: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"[{version}]")):
        script("release_notes").release_notes(version, CHANGELOG)


def report(covered: int, branches: int) -> dict[str, Any]:
    return {"summary": {"covered_branches": covered, "num_branches": branches}}


@pytest.mark.parametrize(
    ("covered", "code", "message", "color"),
    [(920, 0, "92.0 %", "brightgreen"), (919, 1, "91.9 %", "red"), (965, 0, "94.2 %", "brightgreen")],
)
def test_branch_coverage_is_on_the_badge_and_fails_below_the_least(
    covered: int, code: int, message: str, color: str, tmp_path: Path, capsys: Any
) -> None:
    files = {"lit_tricks/data/a.py": report(covered, 1000), "lit_tricks/run/b.py": report(920, 1000)}
    (tmp_path / "coverage.json").write_text(json.dumps({"files": files}))
    assert script("branches").main(tmp_path / "coverage.json", tmp_path / "badge.json") == code
    badge = json.loads((tmp_path / "badge.json").read_text())
    assert badge == {"schemaVersion": 1, "label": "coverage", "message": message, "color": color}
    printed = capsys.readouterr()
    assert re.search(r"92\.00 % of +1000 branches: run", printed.out)
    assert ("below 92 %" in printed.err) == bool(code)


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_workflow_publishes_the_badge_that_the_readme_shows(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, timeout=60)
        return done.stdout.decode()

    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    git("init", "--quiet", "main")
    (tmp_path / "main" / "README.md").write_text("a file of the branch main")
    git("-C", "main", "add", "README.md")
    git(
        "-C",
        "main",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.org",
        "commit",
        "--quiet",
        "--message",
        "Add README",
    )
    git("clone", "--quiet", "--bare", "main", "remote")
    for number, content in enumerate(("{}", '{"message": "94 %"}')):  # in the second run the branch exists
        git("clone", "--quiet", "remote", f"clone{number}")
        (tmp_path / f"clone{number}" / "coverage.json").write_text(content)
        publish = ["bash", "-e", "-c", jobs["badge"]["steps"][-1]["run"]]
        subprocess.run(publish, cwd=tmp_path / f"clone{number}", check=True, capture_output=True, timeout=60)
    assert git("-C", "remote", "ls-tree", "--name-only", "badges").split() == ["coverage.json"]
    assert git("-C", "remote", "show", "badges:coverage.json") == content
    address = "https://raw.githubusercontent.com/lit-tricks/lit-tricks/badges/coverage.json"
    assert f"https://img.shields.io/endpoint?url={address}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One can not.", ["b.md:3: 'can not' (1, was 0). Write: cannot"]),
        ("It can NOT, and can not.", ["b.md:3 b.md:3: 'can not' (2, was 0). Write: cannot"]),
        ("One cannot. Data besides_ that.", []),
    ],
)
def test_a_new_phrase_of_the_word_list_is_an_error_with_its_line(text: str, expected: list[str]) -> None:
    messages, _ = script("prose").check({"a.py": "can", "b.md": f"#\n\n{text}\n"}, {})
    assert messages == expected


def test_a_phrase_of_the_word_list_may_move_and_become_rarer_but_not_more_frequent() -> None:
    check = script("prose").check
    before = {"can not": {"a.py": 2}}
    assert check({"b.py": "can not\ncan not"}, before)[0] == []
    messages, counts = check({"a.py": "can not"}, before)
    assert messages == []
    assert counts["can not"] == {"a.py": 1}
    assert [message.split(": ")[0] for message in check({"a.py": "can not", "b.py": "can not\n" * 2}, before)[0]] == [
        "b.py:1 b.py:2"
    ]


def test_the_word_list_is_checked_in_all_tracked_files() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the source distribution has no git")
    prose = script("prose")
    texts = prose.tracked()
    assert {"README.md", "pyproject.toml", "tests/integration/test_release.py"} <= set(texts)
    assert prose.occurrences("Nothing, in the place of\nx") == [(r"in (?:the )?place of", 1)]


def test_workflows_name_steps_that_exist() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    functions = set(re.findall(r"^(\w+)\(\) \{", text, re.MULTILINE))
    [steps] = re.findall(r"^STEPS=\((.+)\)$", text, re.MULTILINE)
    assert set(steps.split()) <= functions
    [pairs] = re.findall(r"^  printf '%s\\n' (.+) \| xargs", text, re.MULTILINE)
    used = set(" ".join(shlex.split(pairs)).split())
    assert used <= functions
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
            for step in job["steps"]:
                for words in re.findall(r"\.ci/run (.+)", step.get("run", "")):
                    used |= set(words.split())
    assert used <= functions
    assert {"lint", "types", "tests", "quickstart", "coverage"} <= used
    assert functions <= used | set(steps.split())


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_ci_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True, timeout=60)
