"""Print the branch coverage of the package's parts. Fail below 92 %. ``python .ci/branches.py coverage.json``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

LEAST = 92


def main(report: Path) -> int:
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
    if share < LEAST:
        print(f"branch coverage {share:.2f} % is below {LEAST} %: test the branches that are new", file=sys.stderr)
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
