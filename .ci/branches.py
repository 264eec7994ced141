"""Print the branch coverage of the package's parts, and write the badge that README shows. Fail below 92 %.

``python .ci/branches.py coverage.json badge.json`` reads the report of coverage.py, and writes JSON that
[shields.io](https://shields.io/badges/endpoint-badge) draws. The workflow
``tests.yml`` publishes it on the branch ``badges``.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

LEAST = 92


def badge_of(share: float) -> dict[str, object]:
    """Return a badge with the share in per cent. The share is rounded down: 91.99 does not show as 92."""
    color = "brightgreen" if share >= LEAST else "red"
    return {"schemaVersion": 1, "label": "coverage", "message": f"{int(10 * share) / 10} %", "color": color}


def main(report: Path, badge: Path) -> int:
    covered: Counter[str] = Counter()
    all_of: Counter[str] = Counter()
    for file, content in json.loads(report.read_text())["files"].items():
        part = Path(file).relative_to("lit_tricks").parts[0]
        for name in (part, "lit_tricks"):
            covered[name] += content["summary"]["covered_branches"]
            all_of[name] += content["summary"]["num_branches"]
    for name in sorted(all_of, key=lambda name: (name == "lit_tricks", name)):
        if all_of[name]:
            print(f"{100 * covered[name] / all_of[name]:6.2f} % of {all_of[name]:5d} branches: {name}")
    share = 100 * covered["lit_tricks"] / all_of["lit_tricks"]
    badge.write_text(json.dumps(badge_of(share)), encoding="utf-8")
    if share < LEAST:
        print(f"branch coverage {share:.2f} % is below {LEAST} %: test the branches that are new", file=sys.stderr)
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
