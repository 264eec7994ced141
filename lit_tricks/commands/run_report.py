"""``lit-tricks report``: what became of a run, or of several, as one page."""

from __future__ import annotations

from pathlib import Path

from lit_tricks.utils.log import log

__all__ = ["report"]


def report(runs: list[str], *, out: str | None = None) -> Path:
    """Report runs: curves, time, mistakes and calibration. Several runs are overlaid.

    The report needs only the run folders. It also works for interrupted runs, and lists missing data with the reason.
    It writes ``report.html``, one file for any browser that needs no network, and ``report.md`` with pictures.

    Args:
        runs: run folders, such as runs/quickstart/v0, or the folder of one race.
        out: folder for the report; by default the run folder, or ``report`` for several runs.

    Returns:
        The page, ``report.html``.

    Raises:
        FileNotFoundError: if a folder does not exist or is no run folder.
        ValueError: if a run is given twice.
    """
    from lit_tricks.run.reading.run import read_runs
    from lit_tricks.run.report.content import report_sections
    from lit_tricks.run.report.page import write
    from lit_tricks.run.report.race_page import report_race

    if len(runs) == 1 and Path(runs[0], "race.json").is_file():
        return report_race(Path(runs[0]))
    found = read_runs(runs)
    for run in found:
        if why := _why_not_usable(run.path):
            log.warning(why)
            run.missing["a usable checkpoint"] = why
    folder = Path(out or (runs[0] if len(runs) == 1 else "report"))
    folder.mkdir(parents=True, exist_ok=True)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs: {', '.join(run.name for run in found)}"
    write(folder, title, report_sections(found))
    log.info("report: %s", folder / "report.html")
    return folder / "report.html"


def _why_not_usable(run: Path) -> str:
    """Return what is wrong with the weights of the run's best checkpoint, if it has one."""
    from lit_tricks.commands.checkpoints import checkpoint_at, read_checkpoint, require_finite

    try:
        path = checkpoint_at(run)
        state = read_checkpoint(path)["state_dict"]
    except (OSError, ValueError):  # a report needs no checkpoint
        return ""
    try:
        require_finite(path, state)
    except ValueError as error:
        return str(error)
    return ""
