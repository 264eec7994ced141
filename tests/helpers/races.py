"""Races whose runs take no time, and the decisions of races."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lit_tricks.commands.ablation.cells import Cell
from lit_tricks.commands.racing import race as race_module

__all__ = ["decisions", "fake_fits", "read_race", "run_race"]

GAINS = {"ema": 1.5, "mixup": 0.8, "cutmix": 0.7, "no_bias_decay": -0.3}
COSTS = {"ema": 1.2}
CANDIDATES = ("tricks/ema", "tricks/mixup|tricks/cutmix", "tricks/no_bias_decay")
MEASURED = ("costs", "cost", "memories")  # they differ from machine to machine
FAILING = ("base+cutmix-seed1",)
Event = Callable[[], None]


def fake_fits(
    event: Event = lambda: None, failing: Sequence[str] = FAILING, seconds: float = 10.0
) -> Callable[[Sequence[Cell]], Iterator[Cell]]:
    """Make an engine whose runs have known gains and take no time.

    Args:
        event: is called at each step of a run.
        failing: runs that fail, by the ends of their names; "" is all of them.
        seconds: by the clock, of each run.
    """

    def run(cells: Sequence[Cell]) -> Iterator[Cell]:
        for cell in cells:
            event()
            cell.state = "runs"
            stack, _, length = cell.name.partition("@")
            tricks = stack.split("+")[1:]
            run = cell.folder / f"v{len(list(cell.folder.glob('v*')))}"
            run.mkdir(parents=True)
            event()
            noise = np.random.default_rng([cell.seed, *map(ord, cell.name)]).normal(0, 0.2)
            score = (80 + sum(GAINS[name] for name in tricks) + noise) / 100
            content = {
                "raw": {"val": {"top1": score}, "test": {"top1": score}},
                "seconds": seconds,
                "peak_memory": 1000,
            }
            content["cpu_seconds"] = 10 * float(length or 1) * math.prod(COSTS.get(name, 1) for name in tricks)
            config = {"trainer": {"max_epochs": 10}, "model": {"class_path": "Classifier"}, "name": cell.folder.name}
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            if tricks and cell.folder.name.endswith(tuple(failing)):
                cell.log.write_text("RuntimeError: it fails\n")
            else:
                (run / "results.json").write_text(json.dumps(content)[:40])  # cut off
                event()
                (run / "results.json").write_text(json.dumps(content))
            event()
            cell.seconds = seconds
            yield cell

    return run


def run_race(out: Path, engine: Any = None, parallel: int = 1, **arguments: Any) -> Path:
    """Run a race on fake fits and return its recipe. There is no report."""

    @contextlib.contextmanager
    def engine_of(*args: Any) -> Iterator[Any]:
        yield engine or fake_fits(), parallel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race_module, "engine_of", engine_of)
        patch.setattr(race_module, "report_race", lambda folder: None)
        given: dict[str, Any] = {"candidates": list(CANDIDATES), "budget": "90", "out": str(out)}
        given |= {"config": ["tiny.yaml"], "fit_args": ["--trainer.max_epochs=10"]}
        return race_module.race(**given | arguments)


def read_race(out: Path) -> dict[str, Any]:
    """Return the content of ``race.json``."""
    content: dict[str, Any] = json.loads((out / "race.json").read_text())
    return content


def decisions(race: dict[str, Any]) -> list[Any]:
    """Return what a race has decided, from its ``race.json``, without the times that it measured."""
    rounds = [
        [{k: v for k, v in each.items() if k not in MEASURED} for each in (*found["screened"], *found["tested"])]
        for found in race["rounds"]
    ]
    return [race["kept"], race["runs"], rounds]
