"""Print the section of a version in CHANGELOG.md: ``python .ci/release_notes.py 0.1.0``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def release_notes(version: str, changelog: str) -> str:
    """Return what the changelog lists under a version.

    Raises:
        ValueError: if the changelog has no such section, or an empty one.
    """
    found = re.search(
        rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |^\[.+\]: |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    if not found or not found[1].strip():
        raise ValueError(f"CHANGELOG.md has no notes under [{version}]. Rename [Unreleased].")
    return found[1].strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(release_notes(sys.argv[1], CHANGELOG.read_text(encoding="utf-8")))
