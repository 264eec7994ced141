"""What races have decided."""

from __future__ import annotations

from typing import Any

__all__ = ["decisions"]

MEASURED = ("costs", "cost", "memories")  # they differ from machine to machine


def decisions(race: dict[str, Any]) -> list[Any]:
    """Return what a race has decided, from its ``race.json``, without the times that it measured."""
    rounds = [
        [{k: v for k, v in each.items() if k not in MEASURED} for each in (*found["screened"], *found["tested"])]
        for found in race["rounds"]
    ]
    return [race["kept"], race["runs"], rounds]
