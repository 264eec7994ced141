"""The runs of an ablation: each a ``lit-tricks fit`` in its own process, several at a time."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from lit_tricks.commands.ablation.exclusive import read_object
from lit_tricks.run.reading.checks import check_results
from lit_tricks.run.report.ablation_table import read_run
from lit_tricks.utils.checkpoint_files import read_checkpoint, require_resumable
from lit_tricks.utils.log import log
from lit_tricks.utils.parent_process import held_pipe

__all__ = ["Cell", "Engine", "live", "run_all", "run_here", "run_unfinished"]


@dataclass
class Cell:
    """One run: a row in one seed.

    Args:
        name: of the row.
        seed: of the run.
        folder: ``ROOT/NAME``, in which ``lit-tricks fit`` makes ``v0``, and ``v1`` where it resumes.
        settings: arguments of ``lit-tricks fit``.
        state: for the table.
        seconds: from the start of its process to the end, once it has ended.
    """

    name: str
    seed: int
    folder: Path
    settings: list[str]
    state: str = ""
    seconds: float = 0.0

    @property
    def finished(self) -> Path | None:
        """The newest run folder with results that are whole."""
        return next((run for run in self._versions() if _is_finished(run)), None)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint of a run that was stopped, of the newest one whose checkpoint is whole."""
        for run in self._versions():
            path = run / "checkpoints" / "last.ckpt"
            if not path.is_file():
                continue
            try:
                require_resumable(read_checkpoint(path), path)
            except (OSError, ValueError) as error:
                log.warning("%s: an older checkpoint is used, or none", error)
            else:
                return path
        return None

    @property
    def words(self) -> list[str]:
        """Return the arguments of ``python``."""
        own = [f"--seed_everything={self.seed}", f"--trainer.default_root_dir={self.folder.parent}"]
        checkpoint = self.checkpoint
        own += [f"--name={self.folder.name}"] + [f"--ckpt_path={checkpoint}"] * bool(checkpoint)
        return ["-m", "lit_tricks", "fit", *self.settings, *own]

    @property
    def log(self) -> Path:
        """Return the file with the output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def last_words(self) -> str:
        """Return the last line that the run printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.is_file() else []
        return lines[-1] if lines else "it printed nothing"

    def _versions(self) -> list[Path]:
        versions = [path for path in self.folder.glob("v*") if path.name[1:].isdecimal()]
        return sorted(versions, key=lambda path: int(path.name[1:]), reverse=True)


def _is_finished(run: Path) -> bool:
    """Return whether a run has results that are whole, and of the right types."""
    results = read_object(run / "results.json")
    try:
        check_results(results or {})
    except ValueError:
        return False
    return results is not None


Engine = Callable[[Sequence[Cell]], Generator[Cell, None, None]]


def run_all(cells: Sequence[Cell], engine: Engine, name: str = "ablate") -> None:
    """Run the cells that are not finished, and show a table of all cells. Cells that fail are left unfinished.

    Args:
        cells: of the table.
        engine: runs cells, and yields each when its run has ended.
        name: of the command, for the log.
    """
    with live(lambda: _table(cells)), contextlib.closing(run_unfinished(cells, engine, name)) as ended:
        for _ in ended:
            pass


def run_unfinished(cells: Sequence[Cell], engine: Engine, name: str) -> Generator[Cell, None, None]:
    """Run the cells that are not finished, and yield each when its run has ended. Close this generator to end the runs.

    Args:
        cells: to run.
        engine: runs cells, and yields each when its run has ended.
        name: of the command, for the log.
    """
    for cell in cells:
        cell.state = _result(cell) if cell.finished else "waits"
    todo = [cell for cell in cells if not cell.finished]
    if len(todo) < len(cells):
        log.info("%s: %d of %d runs are there already", name, len(cells) - len(todo), len(cells))
    if not todo:
        return
    todo[0].folder.parent.mkdir(parents=True, exist_ok=True)
    with _interrupted_by_signals(), contextlib.closing(engine(todo)) as ended:
        for number, cell in enumerate(ended, start=1):
            cell.state = _result(cell) if cell.finished else "failed"
            log.info("%s: %d/%d %s, seed %d: %s", name, number, len(todo), cell.name, cell.seed, cell.state)
            yield cell


@contextlib.contextmanager
def live(render: Callable[[], RenderableType]) -> Iterator[None]:
    """Keep a view up to date on a terminal. Show nothing where standard error is not one.

    Args:
        render: makes the view.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Live(get_renderable=render, console=console, transient=True):
        yield


def run_here(cells: Sequence[Cell], jobs: int, environment: Mapping[str, str]) -> Generator[Cell, None, None]:
    """Run cells in processes of this machine, several at a time.

    Args:
        cells: to run.
        jobs: runs at a time.
        environment: variables of the runs, in addition to the environment of this process.
    """
    running: set[Any] = set()
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for share in _shares(jobs):
        slots.put(share | dict(environment))

    def run(cell: Cell) -> None:
        share = slots.get()
        start = time.monotonic()
        try:
            cell.state = "resumes" if cell.checkpoint else "runs"
            with held_pipe() as (pipe, variable):
                with cell.log.open("ab") as stream:
                    # a separate session: Ctrl-C reaches only this process, which then ends the others
                    process = subprocess.Popen(
                        [sys.executable, *cell.words], stdin=pipe, stdout=stream, stderr=stream, env=share | variable,
                        start_new_session=True,
                    )  # fmt: skip
                running.add(process)
                process.wait()
            running.discard(process)
        finally:
            cell.seconds = time.monotonic() - start
            slots.put(share)

    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run, cell): cell for cell in cells}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Let the end of a job or of a terminal be as Ctrl-C: the runs end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(kind, signal.default_int_handler) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _shares(jobs: int) -> list[dict[str, str]]:
    """Return the environment of each run at a time: its share of the cores, and its GPU."""
    if jobs == 1:
        return [dict(os.environ)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, usable // jobs)
    shares = [{"OMP_NUM_THREADS": str(cores)} | dict(os.environ) for _ in range(jobs)]
    for i, share in enumerate(shares):
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    return shares


def _result(cell: Cell) -> str:
    assert cell.finished
    return f"{next(iter(read_run(cell.finished).values())):.2%}"


def _table(cells: Sequence[Cell]) -> Table:
    table = Table()
    for column in ("", *(f"seed {seed}" for seed in dict.fromkeys(cell.seed for cell in cells))):
        table.add_column(column)
    for name in dict.fromkeys(cell.name for cell in cells):
        table.add_row(name, *(cell.state for cell in cells if cell.name == name))
    return table
