"""``lit-tricks ablate``: which trick is worth it, on the user's own data, in the form of the paper's tables.

One caveat: a few seeds tell large differences only. The table has the intervals; read them before the means.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_tricks._parser import find_config
from lit_tricks.commands._cells import Cell, run_all
from lit_tricks.reports.ablation import report_ablation

__all__ = ["ablate", "rows_of"]

Mode = Literal["stack", "single", "drop"]


def rows_of(tricks: Sequence[str], mode: Mode) -> dict[str, list[str]]:
    """The rows of an ablation, in their order: the name of each, and its tricks.

    Args:
        tricks: names of configurations, such as ``tricks/ema``.
        mode: "stack": a baseline without any, then one more in each row; "single": the baseline, then each alone;
            "drop": all of them, then all but one.
    """
    short = {trick: Path(trick).stem for trick in tricks}
    if mode == "drop":
        return {"all": list(tricks)} | {f"- {short[t]}": [other for other in tricks if other != t] for t in tricks}
    if mode == "single":
        return {"baseline": []} | {f"+ {short[t]}": [t] for t in tricks}
    return {"baseline": []} | {f"+ {short[t]}": list(tricks[: i + 1]) for i, t in enumerate(tricks)}


def ablate(
    config: list[str],
    *,
    stack: list[str],
    seeds: list[int] | None = None,
    mode: Mode = "stack",
    jobs: int = 1,
    out: str = "ablation",
    fit_args: list[str] | None = None,
    as_sweep: str | None = None,
) -> Path:
    """Train with and without tricks over several seeds, and compare.

    Each cell of the table is a plain ``lit-tricks fit`` in a process and a run folder of its own. A stopped ablation
    goes on where it was when the command is given again: finished runs are kept, others resume from their last
    checkpoint. A run that fails is reported, and the others go on. In one seed all rows start from the same weights and
    see the same data in the same order.

    Args:
        config: configurations of all runs, by name or file.
        stack: configurations of the tricks, one a row.
        seeds: one run for each of them in every row; 0, 1 and 2 by default.
        mode: one more trick in each row ("stack"), each alone ("single"), or all but one ("drop").
        jobs: runs at a time, 1 or more. They share the cores, and take turns with the GPUs.
        out: folder for the runs, ``ablation.csv``, ``ablation.md`` and ``ablation.png``.
        fit_args: words for every ``lit-tricks fit``; on the command line what follows ``--``.
        as_sweep: write the same grid as a W&B sweep to this file, for ``wandb sweep``, and train nothing.

    Returns:
        The folder, or the file of the sweep.

    Raises:
        FileNotFoundError: for a configuration that does not exist.
        ValueError: if an argument is out of range, or ``out`` holds another ablation.
        RuntimeError: if runs failed, after the table of the others is written.
    """
    seeds = [0, 1, 2] if seeds is None else seeds
    _check(stack, seeds, jobs)
    paths = [str(find_config(name).resolve()) for name in config]
    rows = rows_of(stack, mode)
    folder = Path(out)
    plan = {"config": config, "rows": rows, "fit_args": fit_args or []}
    _write_plan(folder, plan)
    fit = [arg for path in paths for arg in ("--config", path)]
    if as_sweep:
        return _write_sweep(Path(as_sweep), folder, rows, seeds, fit, fit_args or [])
    cells = [  # the first seed of all rows comes first: so the table says something early
        Cell(
            name, seed, folder / "runs" / f"{_slug(name)}-seed{seed}", [*fit, "--config", str(_row_file(folder, name))]
        )
        for seed in seeds
        for name in rows
    ]
    run_all(cells, fit_args or [], jobs)
    runs = {name: {cell.seed: cell.finished for cell in cells if cell.name == name} for name in rows}
    report_ablation(folder, runs, relative_to="above" if mode == "stack" else "first")
    failed = [cell for cell in cells if not cell.finished]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} runs failed, the table has the others. {failed[0].name!r} with seed "
            f"{failed[0].seed}: {failed[0].last_words()} (more in {failed[0].log}). The same command tries them again."
        )
    return folder


def _check(stack: list[str], seeds: list[int], jobs: int) -> None:
    if not stack:
        raise ValueError("stack is empty: name configurations of tricks, such as tricks/ema.")
    for what, values in (("stack", stack), ("seeds", seeds)):
        twice = [value for value in values if values.count(value) > 1]  # type: ignore[arg-type]
        if twice:
            raise ValueError(f"{what} has {twice[0]} twice: give each once.")
    stems = [Path(trick).stem for trick in stack]
    same = [stem for stem in stems if stems.count(stem) > 1]
    if same:
        raise ValueError(f"two configurations of stack are called {same[0]!r}: rename one, rows go by these names.")
    if not seeds:
        raise ValueError("seeds is empty: give one or more, such as 0 1 2.")
    if jobs < 1:
        raise ValueError(f"jobs={jobs} is below 1: it is the number of runs at a time.")


def _write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Keep what the folder is for, and the configuration of each row: all its tricks in one file."""
    path = folder / "plan.json"
    if path.is_file() and json.loads(path.read_text()) != plan:
        raise ValueError(f"{folder} holds another ablation, as {path} says: choose another folder with --out.")
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    for name, tricks in plan["rows"].items():
        row: dict[str, Any] = {}
        for trick in tricks:
            row = _merged(row, yaml.safe_load(find_config(trick).read_text(encoding="utf-8")))
        _row_file(folder, name).write_text(yaml.safe_dump(row, sort_keys=False))
    path.write_text(json.dumps(plan, indent=2) + "\n")


def _merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Settings on top of others; those that end with ``+`` are appended."""
    merged = dict(left)
    for key, value in right.items():
        if isinstance(value, dict):
            merged[key] = _merged(merged.get(key, {}), value)
        else:
            merged[key] = [*merged.get(key, []), *value] if key.endswith("+") else value
    return merged


def _write_sweep(
    path: Path, folder: Path, rows: dict[str, list[str]], seeds: list[int], fit: list[str], fit_args: list[str]
) -> Path:
    sweep = {
        "name": folder.name,
        "program": "lit-tricks",
        "method": "grid",
        "command": ["${env}", "lit-tricks", "fit", *fit, "${args}", *fit_args],
        "parameters": {
            "config": {"values": [str(_row_file(folder, name).resolve()) for name in rows]},
            "seed_everything": {"values": seeds},
        },
    }
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def _row_file(folder: Path, name: str) -> Path:
    return folder / "rows" / f"{_slug(name)}.yaml"


def _slug(name: str) -> str:
    return name.replace("+ ", "with-").replace("- ", "without-")
