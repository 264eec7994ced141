"""``lit-tricks ablate``: measure the effect of each trick on your data, as in the paper's tables.

One caveat: a few seeds show only large differences. The table has the intervals. Read the intervals before the means.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

import lit_tricks
from lit_tricks.commands.ablation.cells import Cell, run_all
from lit_tricks.commands.ablation.engines import EngineName, check_engine, engine_of
from lit_tricks.commands.ablation.exclusive import alone_in, read_object
from lit_tricks.run.report.ablation_table import report_ablation
from lit_tricks.run.wandb_run import log_summary
from lit_tricks.tasks.classification import Classifier
from lit_tricks.utils.arguments import MAX_SEED, choice, integers
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.config_files import check_yaml, config_name, find_config
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.log import log
from lit_tricks.utils.trick_flags import apply_to_rows

__all__ = ["ablate", "rows_of", "settings_of", "track"]

Mode = Literal["stack", "single", "drop"]


def rows_of(tricks: Sequence[str], mode: Mode) -> dict[str, list[str]]:
    """Return the rows of an ablation, in their order: the name and the tricks of each row.

    Args:
        tricks: names of configurations, such as ``tricks/ema``.
        mode: "stack": a baseline without tricks, then one more trick per row; "single": the baseline, then one trick
            per row; "drop": all tricks, then all except one.
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
    engine: EngineName = "local",
    cpus: float | None = None,
    gpus: float | None = None,
    out: str = "ablation",
    fit_args: list[str] | None = None,
    as_sweep: str | None = None,
) -> Path:
    """Train with and without tricks over several seeds, and compare.

    Each cell of the table is a plain ``lit-tricks fit`` in its own process and run folder. A stopped ablation continues
    when you repeat the command: finished runs are kept, and others resume from their last checkpoint. A run that fails
    is reported, and the others continue. Within a seed, all rows start from the same weights and get the same data in
    the same order. With ``loggers/wandb`` among the configurations, the runs are a W&B group, and the table is in a run
    of this group.

    Args:
        config: configurations of all runs, by name or file.
        stack: configurations of the tricks, one per row.
        seeds: one run per seed in every row; 0, 1 and 2 by default.
        mode: one more trick per row ("stack"), one trick per row ("single"), or all except one ("drop").
        jobs: runs at a time, 1 or more. They share the cores, and take turns with the GPUs.
        engine: "local", or "ray": as tasks of a Ray cluster, as many at a time as its resources allow.
        cpus: CPUs of each run on the cluster, 1 by default.
        gpus: GPUs of each run on the cluster; by default 1 if it has any.
        out: folder for the runs, ``ablation.csv``, ``ablation.md`` and ``ablation.png``.
        fit_args: arguments of every ``lit-tricks fit``; on the command line all arguments after ``--``.
        as_sweep: write the same grid as a W&B sweep to this file, for ``wandb sweep``, without training. The file has
            all settings: agents on any machine with the data need no other file.

    Returns:
        The folder, or the file of the sweep.

    Raises:
        FileNotFoundError: for a configuration that does not exist.
        ValueError: if an argument is out of range, or ``out`` holds another ablation.
        RuntimeError: if runs failed, after the table of the others is written.
    """
    seeds = [0, 1, 2] if seeds is None else seeds
    choice("ablate", "mode", mode, get_args(Mode))
    seeds = integers("ablate", "seeds", seeds, 0, "Give one or more, such as 0 1 2.", MAX_SEED)
    _check(stack, seeds)
    check_engine("ablate", engine, jobs, cpus, gpus)
    paths = [find_config(name).resolve() for name in config]
    rows = rows_of(stack, mode)
    settings = {name: settings_of(tricks) for name, tricks in rows.items()}
    folder = Path(out)
    configs = [config_name(Path(name)) or name for name in config]  # another installation has other paths
    plan = {"config": configs, "rows": rows, "fit_args": fit_args or []}
    fit_args = apply_to_rows(fit_args or [], settings.values())
    if as_sweep:
        return _write_sweep(Path(as_sweep), folder.name, settings, seeds, paths, fit_args)
    with alone_in(folder, "ablate"):
        _write_plan(folder, plan, settings)
        runs = folder.resolve() / "runs"  # processes elsewhere have other working folders
        cells = [  # the first seed of all rows comes first, so that the table is useful early
            Cell(
                name,
                seed,
                runs / f"{_slug(name)}-seed{seed}",
                [*(f"--config={path}" for path in [*paths, _row_file(folder, name).resolve()]), *fit_args],
            )
            for seed in seeds
            for name in rows
        ]
        with engine_of(engine, jobs, cpus, gpus, folder) as (run, _):
            run_all(cells, run)
        found = {name: {cell.seed: cell.finished for cell in cells if cell.name == name} for name in rows}
        table = report_ablation(folder, found, relative_to="above" if mode == "stack" else "first")
        finished = [cell.finished for cell in cells if cell.finished]
        track("ablation", folder, finished, table, folder / "ablation.png")
        failed = [cell for cell in cells if not cell.finished]
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(cells)} runs failed, the table has the others. {failed[0].name!r} with seed "
                f"{failed[0].seed}: {failed[0].last_words()} (more in {failed[0].log}). The same command tries them "
                "again."
            )
        return folder


def _check(stack: list[str], seeds: list[int]) -> None:
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


def _write_plan(folder: Path, plan: dict[str, Any], settings: dict[str, dict[str, Any]]) -> None:
    """Keep what the folder is for, and the configuration of each row: all its tricks in one file."""
    path = folder / "plan.json"
    before = read_object(path)
    if before is None and path.exists():
        known = {_row_file(folder, name).name for name in settings}
        others = sorted(file.name for file in (folder / "rows").glob("*.yaml") if file.name not in known)
        if others:
            raise ValueError(f"{path} is damaged, and {folder} has rows of another ablation ({others[0]}): see --out.")
        log.warning("%s was damaged, and is written again", path)
    elif before not in (None, plan):
        raise ValueError(f"{folder} holds another ablation (see {path}): choose another folder with --out.")
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    for name, row in settings.items():
        write_whole(_row_file(folder, name), yaml.safe_dump(row, sort_keys=False))
    write_whole(path, json.dumps(plan, indent=2) + "\n")


def settings_of(tricks: Sequence[str]) -> dict[str, Any]:
    """Return the settings of configurations of tricks, merged in their order."""
    row: dict[str, Any] = {}
    for trick in tricks:
        path = find_config(trick)
        check_yaml(path, "the configuration")
        row = _merged(row, _read(path))
    return row


def _read(path: Path) -> dict[str, Any]:
    content: Any = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and no settings: write `trainer: ...` or the like.")
    settings: dict[str, Any] = content
    return settings


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
    path: Path, name: str, rows: dict[str, dict[str, Any]], seeds: list[int], configs: list[Path], fit_args: list[str]
) -> Path:
    words = _portable([*(f"--config={config}" for config in configs), *fit_args])
    if not any("WandbLogger" in word or word.endswith("loggers/wandb") for word in words):
        words.append("--config=loggers/wandb")
    sweep = {
        "name": name,
        "project": "lit-tricks",
        "program": "lit-tricks",
        "method": "grid",
        "metric": {"name": f"val/{_score(configs)}", "goal": "maximize"},
        "command": ["${env}", "lit-tricks", "fit", f"--name={name}", *words, "${args}"],
        "parameters": {
            "row": {"values": [json.dumps(row) for row in rows.values()]},
            "seed_everything": {"values": seeds},
        },
    }
    write_whole(path, yaml.safe_dump(sweep, sort_keys=False))
    return path


def _score(configs: list[Path]) -> str:
    """Return the main metric of the runs, from their module."""
    settings: dict[str, Any] = {}
    for path in configs:
        settings = _merged(settings, _read(path))
    name = str(settings.get("model", {}).get("class_path", "")).rpartition(".")[2]
    return str(getattr(getattr(lit_tricks, name, Classifier), "score", Classifier.score))


def _portable(words: Sequence[str]) -> list[str]:
    """Return arguments for other machines: installed configurations by name, and the content of others."""
    found: list[str] = []
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        is_config = (flag in ("-c", "--config") and equals) or (i and words[i - 1] in ("-c", "--config"))
        path = Path(value if equals else word)
        if is_config and path.is_file():
            word = f"{flag}=" * bool(equals) + (config_name(path) or json.dumps(_read(path)))
        found.append(word)
    return found


def track(kind: str, folder: Path, finished: Sequence[Path], table: Sequence[Sequence[str]], plot: Path) -> None:
    """Log a table to W&B if the runs are there.

    Args:
        kind: "ablation" or "race".
        folder: of all runs.
        finished: folders of finished runs.
        table: header and rows.
        plot: a picture to go with it.
    """
    loggers = (_read(finished[0] / "config.yaml").get("trainer") or {}).get("logger") if finished else None
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict) and logger["class_path"].endswith(".WandbLogger"):
            log_summary(kind, folder, logger["init_args"], table[0], table[1:], plot)


def _row_file(folder: Path, name: str) -> Path:
    return folder / "rows" / f"{_slug(name)}.yaml"


def _slug(name: str) -> str:
    return name.replace("+ ", "with-").replace("- ", "without-")
