"""Links to our own repository and site lead to what exists. Links of other sites need the network: `.ci/run links`."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from readme_table import slug

from lit_tricks import callbacks

ROOT = Path(__file__).parents[2]
OURS = re.compile(
    r"https://(?:(?:github\.com|raw\.githubusercontent\.com)/lit-tricks/lit-tricks|lit-tricks\.github\.io/lit-tricks)"
    r"(?![\w-])([^)\]}\s\"'`<>\\,]*)"
)
# Pages that GitHub makes.
GITHUB = re.compile(
    r"/?|/security/advisories/new|/issues|/issues/new/choose|/releases(/tag/v[\d.]+)?|/compare/v[\d.]+\.\.\.(main|v[\d.]+)"
)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Return the content of the tracked text files by name."""
    if not (ROOT / ".git").exists():
        pytest.skip("the source distribution has no git")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = [
        ROOT / name
        for name in names.split("\0")
        if name.endswith((".md", ".py", ".yaml", ".yml", ".toml", ".ipynb", ".cff"))
    ]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths if path.is_file()}


def exists(link: str, path: str) -> bool:
    """Return whether a page of the project exists, by the file that it is made from."""
    path = path.partition("#")[0].rstrip(".:;")
    if link.startswith("https://lit-tricks.github.io"):
        page = path.strip("/").removesuffix(".html")
        tricks = {"tricks", "tricks/index", *(f"tricks/{slug(name)}" for name in callbacks.__all__)}
        return page in {"", *tricks} or (ROOT / "docs" / f"{page}.md").is_file()
    if match := re.fullmatch(r"/(?:blob/|tree/)?main/(.+)", path):
        return (ROOT / match[1]).exists()
    if match := re.fullmatch(r"/actions/workflows/([\w.]+?)(/badge\.svg)?", path):
        return (ROOT / ".github" / "workflows" / match[1]).is_file()
    return bool(GITHUB.fullmatch(path)) or path == "/badges/coverage.json"  # a branch that tests.yml writes


def test_absolute_links_to_the_project_exist(texts: dict[str, str]) -> None:
    links = {(name, match[0], match[1]) for name, text in texts.items() for match in OURS.finditer(text)}
    links = {link for link in links if link[0] != "tests/docs/test_links.py"}
    assert len(links) > 80
    assert sorted((name, link) for name, link, path in links if not exists(link, path)) == []


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ("https://github.com/lit-tricks/lit-tricks/blob/main/README.md#install-and-train", True),
        ("https://github.com/lit-tricks/lit-tricks/blob/main/READ.md", False),
        ("https://github.com/lit-tricks/lit-tricks/wiki", False),
        ("https://lit-tricks.github.io/lit-tricks/tricks/mix_up.html", True),
        ("https://lit-tricks.github.io/lit-tricks/tricks/mixup.html", False),
        ("https://lit-tricks.github.io/lit-tricks/guides/resume.html", True),
    ],
)
def test_broken_links_are_found(link: str, found: bool) -> None:
    [match] = OURS.finditer(link)
    assert exists(match[0], match[1]) == found


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_of_pages_exist(texts: dict[str, str]) -> None:
    broken, count = [], 0
    for name, text in texts.items():
        if name.endswith(".ipynb"):
            text = "\n".join(
                "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
            )
        elif not name.endswith(".md"):
            continue
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", prose):
            count += 1
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            generated = target.parent.resolve() == ROOT / "docs" / "tricks"
            if generated:
                known = target.stem == "index" or target.stem in map(slug, callbacks.__all__)
            else:
                known = target.exists() and (not anchor or anchor in anchors(target.read_text("utf-8")))
            if not known:
                broken.append((name, link))
    assert count > 10
    assert broken == []
