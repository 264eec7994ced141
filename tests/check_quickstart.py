"""Check the newest run of the quickstart: ``python tests/check_quickstart.py RUNS_DIR``.

It must have left all that the README promises, and reach 98 % top-1 on the test split.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FILES = (
    "config.yaml",
    "metrics.csv",
    "results.json",
    "curves.png",
    "report.md",
    "predictions.npz",
    "tricks.json",
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
)
LEAST = 0.98


def check(runs: Path) -> str:
    """Test accuracy and place of the newest run, in words.

    Raises:
        ValueError: if it falls short.
    """
    found = [path for path in (runs / "quickstart").glob("v*") if path.name[1:].isdecimal()]
    if not found:
        raise ValueError(f"no run in {runs / 'quickstart'}")
    run = max(found, key=lambda path: int(path.name[1:]))
    missing = [name for name in FILES if not (run / name).is_file() or not (run / name).stat().st_size]
    if missing:
        raise ValueError(f"{run} lacks {', '.join(missing)}")
    results = json.loads((run / "results.json").read_text())
    top1 = results.get("averaged", results.get("raw", {})).get("test", {}).get("top1")
    if top1 is None or not top1 >= LEAST:
        raise ValueError(f"{run}: test top-1 is {top1}, not at least {LEAST}")
    return f"{run}: test top-1 is {top1:.4f}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(check(Path(sys.argv[1])))  # noqa: T201
    except (OSError, ValueError) as error:
        sys.exit(f"check_quickstart: {error}")
