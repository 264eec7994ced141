"""The end of a validation or a test: a table on the terminal, and files in a folder if one is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_tricks.run.reading.checks import check_results
from lit_tricks.run.reading.run import Run, read_run_folder
from lit_tricks.run.report.fit import print_results, weights_in
from lit_tricks.utils.bounded import read_arrays
from lit_tricks.utils.checkpoint_files import load_archive
from lit_tricks.utils.files import read_regular, write_whole
from lit_tricks.utils.finite import to_json

__all__ = ["PREDICTIONS", "RESULTS", "prepare_folder", "report_evaluation"]

RESULTS, PREDICTIONS = "results.json", "predictions.npz"
KEYS = {"checkpoint", "epoch", "raw", "averaged"}  # of results.json; a fit writes others


def prepare_folder(folder: Path) -> None:
    """Make the folder of an evaluation, and check that only files of an earlier evaluation would be replaced.

    Raises:
        FileExistsError: if one of the files is there, and no evaluation wrote it.
        OSError: if the folder cannot be made.
    """
    remedy = "Choose another folder."
    for name, is_ours in {RESULTS: _is_evaluation, PREDICTIONS: _is_predictions}.items():
        file = folder / name
        if file.exists() and not is_ours(file):
            what = "belongs to a training run" if name == RESULTS and _is_of_run(folder) else "is from something else"
            raise FileExistsError(f"--out {folder}: {name} exists, and {what}. {remedy}")
    if (folder / PREDICTIONS).exists() and not (folder / RESULTS).exists():
        raise FileExistsError(f"--out {folder}: {PREDICTIONS} exists without {RESULTS}. {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"--out {folder}: the folder cannot be made ({error.strerror}). {remedy}") from error


def report_evaluation(split: str, logged: Mapping[str, Any], checkpoint: str, folder: Path | None) -> None:
    """Print the metrics of a split, and write ``results.json``.

    Args:
        split: "val" or "test".
        logged: metrics as the Trainer has them, by their names with the split.
        checkpoint: the file that was evaluated; "" for weights that come from elsewhere.
        folder: where the file goes; None writes none.
    """
    content = load_archive(checkpoint) if checkpoint else {}
    metrics = {name.removeprefix(f"{split}/"): float(value) for name, value in sorted(logged.items())}
    of_split = {name: metrics[name] for name in metrics if f"{split}/{name}" in logged}
    kept = read_run_folder(folder).predictions if folder is not None else None
    if kept is not None and kept.split == split:
        of_split = kept.by_frequency() | of_split
    weights = weights_in(content)
    results = {"checkpoint": checkpoint or None, "epoch": content.get("epoch"), weights: {split: of_split or metrics}}
    files: dict[str, str | Path | None] = {"checkpoint": checkpoint}
    if folder is not None:
        write_whole(folder / RESULTS, to_json(results, indent=2) + "\n")
        files |= {name.partition(".")[0]: folder / name for name in (RESULTS, PREDICTIONS) if (folder / name).exists()}
    print_results(Run("", folder or Path(), results=results), files)


def _is_evaluation(file: Path) -> bool:
    try:
        content = json.loads(read_regular(file))
        check_results(content)
    except Exception:  # the file may hold anything
        return False
    return "checkpoint" in content and content.keys() <= KEYS


def _is_of_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists()


def _is_predictions(file: Path) -> bool:
    try:
        return {"split", "classes", "weights"} <= read_arrays(file).keys()
    except Exception:  # not an archive
        return False
