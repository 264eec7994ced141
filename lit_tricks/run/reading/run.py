"""Read the parts of a run folder, and the reason for each missing part."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lit_tricks.run.reading.checks import check_config, check_results, check_tricks
from lit_tricks.run.reading.mask_predictions import MaskPredictions
from lit_tricks.run.reading.predictions import Predictions, clean
from lit_tricks.utils.bounded import read_arrays, read_yaml
from lit_tricks.utils.files import MOST_RESULTS, read_regular

__all__ = ["Row", "Run", "read_run_folder", "read_runs"]

Row = dict[str, float]
MOST_RESUMED = 1000  # runs that resume each other
FILES = ("results.json", "metrics.csv", "config.yaml")  # a folder with one of these is a run's


@dataclass
class Run:
    """The parts of a run folder. Missing parts are empty.

    Args:
        name: short name, unique in a report.
        path: the folder.
        rows: rows of ``metrics.csv``; in a resumed run also the earlier rows, from the run that it resumes.
        results: content of ``results.json``.
        tricks: content of ``tricks.json``: arguments and effect, by name.
        config: content of ``config.yaml``.
        predictions: predictions of images, from ``predictions.npz``.
        masks: predictions of pixels of a segmentation, from ``predictions.npz``.
        missing: reason for each missing part, by the name of its figure.
        resumes: checkpoint that the run started from; "" for a run that was not resumed.
        starts: steps at which this run, and the runs that it resumes, continued an earlier run.
    """

    name: str
    path: Path
    rows: list[Row] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    tricks: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    predictions: Predictions | None = None
    masks: MaskPredictions | None = None
    missing: dict[str, str] = field(default_factory=dict)
    resumes: str = ""
    starts: list[float] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Return the kind of weights of the metrics: "raw", "averaged", or "" without results."""
        return next((kind for kind in ("averaged", "raw") if kind in self.results), "")

    @property
    def calibrated(self) -> list[Any]:
        """Return the splits whose metrics are of calibrated probabilities."""
        found = self.results.get("calibrated")
        return found if isinstance(found, list) else []

    @property
    def metrics(self) -> dict[str, Row]:
        """Metrics of the best checkpoint, by split."""
        found: dict[str, dict[str, float | None]] = self.results.get(self.kind, {})
        return {
            split: {name: math.nan if value is None else value for name, value in metrics.items()}
            for split, metrics in found.items()
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the training, by what they went into."""
        found: dict[str, float] = (self.results.get("time") or {}).get("seconds", {})
        return found


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read several folders. Each name is the shortest end of the path that is unique.

    Raises:
        FileNotFoundError: if a folder does not exist, or is no run folder.
        ValueError: if a folder is given twice.
    """
    folders = [Path(path) for path in paths]
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise ValueError(f"{folders[i]} is given twice: give each run once.")
    depth = 2  # NAME/vN
    while len({folder.parts[-depth:] for folder in resolved}) < len(resolved):
        depth += 1
    names = ["/".join(folder.parts[-depth:]) for folder in resolved]
    for folder in folders:
        _require_run(folder)
    return [read_run_folder(folder, name) for folder, name in zip(folders, names, strict=True)]


def _require_run(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder. Pass a run folder, such as runs/quickstart/v0.")
    if not any((path / file).is_file() for file in FILES):
        inside = sorted(str(found.parent) for found in path.glob("*/metrics.csv"))
        remedy = f"give one of those in it, {', '.join(inside[:3])}" if inside else f"it has none of {', '.join(FILES)}"
        raise FileNotFoundError(f"{path} is not the folder of a run: {remedy}.")


def read_run_folder(path: Path, name: str = "", above: Collection[Path] = ()) -> Run:
    """Read a run folder. Missing and damaged parts are recorded.

    Args:
        path: path of the folder.
        name: short, unique name.
        above: folders of runs that resume this run, directly or indirectly.
    """
    run = Run(name or "/".join(path.resolve().parts[-2:]), path)

    def read(file: str, shows: str, without: str, parse: Any) -> Any:
        target = path / file
        if not target.is_file():
            run.missing[shows] = f"there is no {file}: {without}"
            return None
        try:
            return parse(target)
        except Exception as error:  # damaged files fail in many ways
            reason = clean(error).partition("\n")[0][:120]
            run.missing[shows] = f"{file} cannot be read ({type(error).__name__}{': ' * bool(reason)}{reason})"
            return None

    older = "the run did not come to its end, or an older version made it"
    run.rows = read("metrics.csv", "curves", "nothing was logged", _read_metrics) or []
    run.results = read("results.json", "results", older, partial(_read_json, check=check_results)) or {}
    run.tricks = (
        read(
            "tricks.json",
            "tricks",
            "the training did not start, or an older version made it",
            partial(_read_json, check=check_tricks),
        )
        or {}
    )
    run.config = read("config.yaml", "settings", "the run was not made by lit-tricks", _read_yaml) or {}
    _add_earlier_rows(run, above)
    stored = read(
        "predictions.npz",
        "predictions",
        "the run did not come to its end, an older version made it, or the module does not compute class scores in its "
        "forward, called from test_step or validation_step",
        _read_said,
    )
    run.predictions, run.masks = (stored, None) if isinstance(stored, Predictions) else (None, stored)
    if not run.seconds and "results" not in run.missing:
        run.missing["time"] = "results.json has no time: an older version made it, or the Trainer had another profiler"
    return run


def _add_earlier_rows(run: Run, above: Collection[Path]) -> None:
    """Put the rows of the run that is resumed before the run's own, up to the step where it took over."""
    run.resumes = str(run.config.get("ckpt_path") or "")
    if not run.resumes:
        return
    parent = _parent_folder(run)
    if parent is None:
        run.missing["curves before it was resumed"] = f"the folder of the run with {run.resumes} is not there"
        return
    here = {*above, run.path.resolve()}
    if parent.resolve() in here or len(here) > MOST_RESUMED:
        run.missing["curves before it was resumed"] = f"{parent} resumes this run itself, or too many others"
        return
    earlier = read_run_folder(parent, above=here)
    start = min((row["step"] for row in run.rows if "step" in row), default=math.inf)
    before = [{k: v for k, v in row.items() if not k.startswith("test/")} for row in earlier.rows]
    run.rows = [row for row in before if row.get("step", math.inf) < start] + run.rows
    run.starts = [*earlier.starts, *([start] if math.isfinite(start) else [])]


def _parent_folder(run: Run) -> Path | None:
    """Find the folder of the run that is resumed, also where both were moved together."""
    checkpoint, here = Path(run.resumes), run.path.resolve()
    for base in (*here.parents, Path()):
        folder = (base / checkpoint).parent.parent
        if any((folder / file).is_file() for file in FILES) and folder.resolve() != here:
            return folder
    return None


def _read_metrics(path: Path) -> list[Row]:
    text = read_regular(path, MOST_RESULTS).decode("utf-8")
    if not text.endswith("\n"):  # the process was killed while it wrote the last line
        text = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [{clean(key): float(cell) for key, cell in row.items() if key and cell} for row in rows]


def points(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """Return the steps and values of a metric, where it is finite."""
    return [(row["step"], row[key]) for row in rows if key in row and "step" in row and math.isfinite(row[key])]


def _read_json(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = _cleaned(json.loads(read_regular(path, MOST_RESULTS)))
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not an object")
    check(content)
    return content


def _cleaned(value: Any) -> Any:
    """Return JSON whose text can be written: it may hold halves of characters."""
    if isinstance(value, dict):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _read_said(path: Path) -> Predictions | MaskPredictions:
    of_pixels = "confusion" in read_arrays(path)
    return MaskPredictions.read(path) if of_pixels else Predictions.read(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        return {}
    check_config(content)
    return content
