"""The runs of an ablation: each a ``lit-tricks fit`` in a process of its own, several at a time."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lit_tricks.reports.ablation import read_run

__all__ = ["Cell", "run_all"]

log = logging.getLogger("lit_tricks")


@dataclass
class Cell:
    """One run: a row in one seed.

    Args:
        name: of the row.
        seed: of the run.
        folder: ``ROOT/NAME``, in which ``lit-tricks fit`` makes ``v0``, and ``v1`` where it resumes.
        config: the words that name its configurations.
    """

    name: str
    seed: int
    folder: Path
    config: list[str]
    state: str = ""

    @property
    def finished(self) -> Path | None:
        """The run folder with its results."""
        return next((run for run in self._versions() if (run / "results.json").is_file()), None)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint of a run that was stopped."""
        lasts = (run / "checkpoints" / "last.ckpt" for run in self._versions())
        return next((path for path in lasts if path.is_file()), None)

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_suffix(".log")

    def last_words(self) -> str:
        """The last line that the run printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
        return lines[-1] if lines else "it printed nothing"

    def _versions(self) -> list[Path]:
        versions = [path for path in self.folder.glob("v*") if path.name[1:].isdecimal()]
        return sorted(versions, key=lambda path: int(path.name[1:]), reverse=True)


def run_all(cells: Sequence[Cell], fit_args: Sequence[str], jobs: int) -> None:
    """Run the cells that are not finished. Those that fail are left unfinished.

    Args:
        cells: of the table.
        fit_args: words for each ``lit-tricks fit``.
        jobs: runs at a time.
    """
    for cell in cells:
        cell.state = "waits"
        if cell.finished:
            cell.state = _result(cell)
    todo = [cell for cell in cells if not cell.finished]
    if len(todo) < len(cells):
        log.info("ablate: %d of %d runs are there already", len(cells) - len(todo), len(cells))
    running: set[subprocess.Popen[bytes]] = set()
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for environment in _shares(jobs):
        slots.put(environment)

    def run(cell: Cell) -> None:
        environment = slots.get()
        try:
            cell.state = "resumes" if cell.checkpoint else "runs"
            with cell.log.open("ab") as stream:
                # a session of its own: Ctrl-C is for this process, which then ends the others
                process = subprocess.Popen(
                    _words(cell, fit_args), stdout=stream, stderr=stream, env=environment, start_new_session=True
                )
            running.add(process)
            process.wait()
            running.discard(process)
        finally:
            slots.put(environment)

    if todo:
        todo[0].folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        with Live(get_renderable=lambda: _table(cells), console=console, transient=True) as live:
            if not console.is_terminal:
                live.stop()
            futures = {pool.submit(run, cell): cell for cell in todo}
            for number, future in enumerate(as_completed(futures), start=1):
                future.result()
                cell = futures[future]
                cell.state = _result(cell) if cell.finished else "failed"
                log.info("ablate: %d/%d %s, seed %d: %s", number, len(todo), cell.name, cell.seed, cell.state)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()


def _words(cell: Cell, fit_args: Sequence[str]) -> list[str]:
    own = [f"--seed_everything={cell.seed}", f"--trainer.default_root_dir={cell.folder.parent}"]
    own += [f"--name={cell.folder.name}"] + [f"--ckpt_path={cell.checkpoint}"] * bool(cell.checkpoint)
    return [sys.executable, "-m", "lit_tricks", "fit", *cell.config, *fit_args, *own]


def _shares(jobs: int) -> list[dict[str, str]]:
    """The environment of each run at a time: its share of the cores, and its GPU."""
    if jobs == 1:
        return [dict(os.environ)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    cores = max(1, len(os.sched_getaffinity(0)) // jobs)
    shares = [{"OMP_NUM_THREADS": str(cores)} | dict(os.environ) for _ in range(jobs)]
    for i, share in enumerate(shares):
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    return shares


def _result(cell: Cell) -> str:
    assert cell.finished
    return f"{read_run(cell.finished)['top1']:.2%}"


def _table(cells: Sequence[Cell]) -> Table:
    table = Table()
    for column in ("", *(f"seed {seed}" for seed in dict.fromkeys(cell.seed for cell in cells))):
        table.add_column(column)
    for name in dict.fromkeys(cell.name for cell in cells):
        table.add_row(name, *(cell.state for cell in cells if cell.name == name))
    return table
