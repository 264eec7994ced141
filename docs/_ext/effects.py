"""Measured effects of the tricks, from ``benchmarks/results/evidence.jsonl`` and ``docs/tricks.yaml``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lit_tricks.run.report.ablation_table import paired_change

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def entries() -> dict[str, Any]:
    """Return what ``tricks.yaml`` states, by trick."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "tricks.yaml").read_text(encoding="utf-8"))
    return content


def evidence() -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Return top-1 in per cent by (run, model), seed and test size."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for line in (RESULTS / "evidence.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        for model, sizes in run["top1"].items():
            found.setdefault((run["run"], model), {})[run["seed"]] = {k: 100 * v for k, v in sizes.items()}
    return found


def effect(entry: dict[str, Any]) -> dict[str, Any]:
    """Return size, top-1 without and with the trick, mean change, reach of its 95 % interval, and number of seeds.

    Args:
        entry: of a trick that has ``evidence``.
    """
    where = entry["evidence"]
    size, found = where.get("size", "32"), evidence()
    these, those = (found[tuple(where[key])] for key in ("with", "without"))
    seeds = sorted(these.keys() & those.keys())
    change, reach = paired_change([these[seed][size] - those[seed][size] for seed in seeds])
    before, after = (sum(each[seed][size] for seed in seeds) / len(seeds) for each in (those, these))
    return {"size": size, "before": before, "after": after, "change": change, "reach": reach, "seeds": len(seeds)}
