"""The end of a fit: a table on the terminal; ``results.json``, ``curves.png`` and ``report.md`` in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_tricks.run.reading.run import Row, Run, read_run_folder
from lit_tricks.run.report.content import Section, results_table, time_table, tricks_table
from lit_tricks.run.report.curves import draw_curves
from lit_tricks.run.report.escaping import code_span
from lit_tricks.run.report.page import to_markdown
from lit_tricks.utils.checkpoint_files import load_archive
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.finite import to_json

__all__ = ["metrics_at", "print_results", "report_fit", "weights_in"]

SPLITS = ("train", "val", "test")


def report_fit(
    run: Path,
    best: str,
    seconds: float | None = None,
    time: dict[str, Any] | None = None,
    memory: int | None = None,
    cpu_seconds: float | None = None,
) -> dict[str, Any]:
    """Summarize a finished fit: print the table, and write ``results.json``, ``curves.png`` and a short ``report.md``.

    Args:
        run: run folder, with ``metrics.csv``.
        best: path of the best checkpoint, or "" if there is none.
        seconds: seconds of the training, including the runs that it resumes.
        time: seconds of this training by part, see ``TimeSplit.result``.
        memory: peak memory of the run in bytes.
        cpu_seconds: CPU time of the training, including the runs that it resumes; None for training on a GPU.

    Returns:
        The content of ``results.json``: the best checkpoint, its epoch, its metrics of ``train``, ``val`` and ``test``,
        under ``raw`` (trained weights) or ``averaged`` (val and test use the average in the checkpoint), the seconds,
        the CPU seconds, the time, and the peak memory. ``calibrated`` lists the splits whose metrics are of calibrated
        probabilities, if there are any. Where classes are imbalanced, metrics of the evaluated split
        include balanced accuracy, macro F1, and the recall by class frequency.
    """
    read = read_run_folder(run)
    rows = read.rows
    checkpoint = load_archive(best) if best else {}
    epoch = checkpoint.get("epoch", _last_epoch(rows))
    metrics = {split: found for split in SPLITS if (found := metrics_at(rows, split, epoch))}
    if (kept := read.predictions) and kept.split in metrics:
        metrics[kept.split] = kept.by_frequency() | metrics[kept.split]
    results: dict[str, Any] = {"best_checkpoint": best, "epoch": epoch, weights_in(checkpoint): metrics}
    if "calibration" in checkpoint and "test" in metrics:  # validation and training came before the calibration
        results["calibrated"] = ["test"]
    results |= {"seconds": seconds, "cpu_seconds": cpu_seconds, "time": time, "peak_memory": memory}
    write_whole(run / "results.json", to_json(results, indent=2) + "\n")
    curves = draw_curves(rows, run / "curves.png", read.starts)
    read = read_run_folder(run)
    write_whole(run / "report.md", _short_report(read, curves))
    print_results(read, {"resumes": read.resumes, "best checkpoint": best, "curves": curves, "run": run})
    return results


def print_results(run: Run, files: dict[str, str | Path | None]) -> None:
    """Print the metrics of a run as a table.

    Args:
        run: with its results.
        files: to print below the table, by what they are. None and "" are left out.
    """
    console = Console()
    console.print(_table(run))
    for what, path in files.items():
        if path:
            console.print(f"{what:>15}  {path}", highlight=False, soft_wrap=True)


def _last_epoch(rows: list[Row]) -> int:
    return int(max((row["epoch"] for row in rows if "epoch" in row), default=0))


def metrics_at(rows: list[Row], split: str, epoch: int) -> Row:
    """Return the metrics of a split, without its name. Metrics of train and val are from the given epoch."""
    found: Row = {}
    for row in rows:
        if split == "test" or row.get("epoch") == epoch:
            found |= {key: value for key, value in row.items() if key.startswith(f"{split}/")}
    names = {key: key.removeprefix(f"{split}/").removesuffix("_epoch") for key in found if not key.endswith("_step")}
    return {name: found[key] for key, name in names.items()}


def weights_in(checkpoint: dict[str, Any]) -> str:
    """Return "averaged" or "raw", for the ``state_dict``. Raw weights of an averaged run are in a callback's state."""
    if weights := checkpoint.get("calibration", {}).get("weights"):  # a calibrated checkpoint has no state of callbacks
        return str(weights)
    states = checkpoint.get("callbacks", {}).values()
    return "averaged" if any(isinstance(state, dict) and state.get("raw") for state in states) else "raw"


def _short_report(run: Run, curves: Path | None) -> str:
    """Return the existing pictures, without drawing."""
    tables = [results_table([run]), tricks_table(run), time_table([run])]
    sections = [Section(table.caption, tables=[table]) for table in tables if table.rows]
    what = "each of these curves"
    if run.predictions:
        what = "the confusion matrix, reliability, worst classes and most wrong images"
    elif run.masks:
        what = "the confusion matrix, the IoU of each class and the images with the lowest"
    origin = f"It resumes {code_span(run.resumes)}.\n\n" if run.resumes else ""
    more = f"{code_span(f'lit-tricks report {run.path}')} draws {what}."
    pictures = "![Loss, accuracy and learning rate against the training step](curves.png)\n\n" if curves else ""
    return f"{to_markdown(run.name, sections)}\n{origin}{pictures}{more}\n"


def _table(run: Run) -> Table:
    found = results_table([run])
    epoch = run.results.get("epoch")
    title = f"{run.kind} weights" if epoch is None else f"epoch {epoch}, {run.kind} weights"
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(found.header):
        table.add_column(column, justify="right" if i else "left")
    for row in found.rows:
        table.add_row(*row)
    return table
