"""The processes that tests start: each has imported the libraries before its first line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import warm
from helpers.warm import PRELOAD

CODE = "import os, sys; print([name for name in {names} if name not in sys.modules]); print(os.environ['HERE'])"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a new interpreter imports for itself")
def test_process_starts_with_all_imports_done(tmp_path: Path) -> None:
    process = warm.run(["-c", CODE.format(names=PRELOAD)], tmp_path, os.environ | {"HERE": "there"})
    assert (process.returncode, process.stdout, process.stderr) == (0, "[]\nthere\n", "")


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(3)", 3), ("1 / 0", 1), ("", 0)])
def test_process_ends_with_the_exit_code_of_python(code: str, expected: int, tmp_path: Path) -> None:
    process = warm.run(["-c", code], tmp_path)
    assert process.returncode == expected
    assert ("ZeroDivisionError" in process.stderr) == (expected == 1)
