"""Runs of an ablation that import no torch: they sleep."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lit_tricks.commands.ablation.cells import Cell, run_all

__all__ = ["alive", "interrupted", "sleepers", "wait_for"]


class Sleeper(Cell):
    """Sleeps for ``settings[0]`` seconds and leaves results, or fails if its seed is odd."""

    @property
    def words(self) -> list[str]:
        pid, done = f"{self.folder}.pid", str(self.folder / "v0")
        script = (
            "import json, os, pathlib, time; from lit_tricks.utils.parent_process import end_with_parent; "
            f"end_with_parent(); pathlib.Path({pid!r}).write_text(str(os.getpid())); "
            f"start = time.time(); time.sleep({self.settings[0]}); assert {self.seed} % 2 == 0, 'odd'; "
            f"folder = pathlib.Path({done!r}); folder.mkdir(parents=True); "
            "report = {'start': start, 'end': time.time(), 'environment': dict(os.environ), 'cwd': os.getcwd()}; "
            "(folder / 'report.json').write_text(json.dumps(report)); (folder / 'results.json').write_text('{}')"
        )
        return ["-c", script]

    @property
    def report(self) -> dict[str, Any]:
        """When it ran, and where."""
        content: dict[str, Any] = json.loads((self.folder / "v0" / "report.json").read_text())
        return content


def sleepers(folder: Path, seconds: float, seeds: tuple[int, ...]) -> list[Sleeper]:
    return [Sleeper("row", seed, folder.resolve() / f"cell{seed}", [str(seconds)]) for seed in seeds]


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def alive(folder: Path) -> list[int]:
    """Processes that the sleepers have left."""
    pids = [int(path.read_text() or 0) for path in folder.glob("*.pid")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def interrupted(cells: list[Sleeper], engine: Any, kind: int) -> None:
    """Run cells, with a signal when two of them run."""

    def watch() -> None:
        wait_for(lambda: sum(cell.folder.with_suffix(".pid").exists() for cell in cells) == 2)
        os.kill(os.getpid(), kind)

    thread = threading.Thread(target=watch)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_all(cells, engine)
    thread.join()
