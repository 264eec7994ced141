"""Types of the package, as type checkers find them from outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lit_tricks

USER = Path(__file__).parent.parent / "helpers" / "typed_user.py"

pytestmark = pytest.mark.slow


def run(*command: str) -> str:
    """Return what a module of this interpreter prints; type checkers end with 1 when they find something."""
    package = str(Path(lit_tricks.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=package, timeout=300
    ).stdout


def marked_lines() -> set[int]:
    return {number for number, line in enumerate(USER.read_text().splitlines(), 1) if line.endswith("# error")}


def test_user_file_under_mypy_has_only_the_marked_errors():
    output = run("mypy", "--strict", "--no-error-summary", str(USER))
    found = [line.split(":", 2)[:2] for line in output.splitlines() if ": error:" in line]
    assert {(Path(path).name, int(number)) for path, number in found} == {(USER.name, n) for n in marked_lines()}, (
        output
    )


def test_user_file_under_pyright_has_only_the_marked_errors():
    output = run("pyright", "--outputjson", "--pythonpath", sys.executable, str(USER))
    found = [item for item in json.loads(output)["generalDiagnostics"] if item["severity"] == "error"]
    assert {item["range"]["start"]["line"] + 1 for item in found} == marked_lines(), output


def test_public_types_are_complete():
    output = run(
        "pyright", "--verifytypes", "lit_tricks", "--ignoreexternal", "--outputjson", "--pythonpath", sys.executable
    )
    completeness = json.loads(output)["typeCompleteness"]
    assert completeness["completenessScore"] >= 0.95
