"""Ours against the scripts of timm, torchvision and Lightning: each tuned alike, at equal epochs and at equal cost.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --data cifar10 --out RESULTS --epochs 10 --images 10000 --size 16 \\
        --batch-size 128

The data are CIFAR-10 as image files, train/CLASS/*.jpg and val/CLASS/*.jpg in a folder or tar file. 5000 images of
train are held out for the trials. All runs learn from the same other images of train. The images of val are the test,
which only the last runs see.

Stages:

1. the teacher.
2. the trials, with one seed. All rows have the same number: --trials, and the ``further`` ones of peers_runs.py.
3. the test, with several seeds of the best trial of each row. Rows of ours run again with as many steps as cost
   what the best peer costs. The best peer is the best on the held-out images.

Cost is the time of a run without the making of its batches, which loading processes can do at the same time. It is in
CPU seconds of the process, or in wall seconds of a GPU.

Finished runs are lines of OUT/peers.jsonl. A repeated command continues. At the end, and with --stage report, it writes
peers.md and peers.png from all lines of these settings. A failed run is reported, and repeated by the
next command. A run takes one core of a CPU. --jobs makes several at a time. CPU seconds stay about the same, but the
seconds of a GPU that runs share do not.

The settings of the command above are for CPUs. A run takes about 95 CPU seconds (55 to 115 without data), the teacher
takes 275, and all 176 runs take 5 hours of a core. A GPU takes the defaults, 30 epochs of 45,000 images at 32 pixels,
with --workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # otherwise the check for a GPU makes it unusable in forks
os.environ.setdefault("OMP_NUM_THREADS", "1")

import peers_report
from _processes import context, write_result
from evidence_data import load
from evidence_report import machine
from peers_report import COST, best_peer, best_trial, cost, tests_of
from peers_runs import ROWS, TEACHER, Pixels, Run, Scale, choices, ours_run, train

from lit_tricks.data.memory.stored import MemorySource

SEED_OF_TRIALS = 1000
Cell = dict[str, Any]  # stage, row, and trial or seed


def work(cell: Cell, run: Run, out: Path) -> None:
    """Make one run in a separate process, with a file for the result and a file for the output."""
    row = cell["row"].removesuffix(COST)
    make = ours_run if row == "teacher" else ROWS[row].train
    write_result(out, lambda: train(run, "test" if cell["stage"] == "test" else "val", lambda: make(run)))


class Bench:
    """Makes runs in processes, and writes a line for each."""

    def __init__(self, args: argparse.Namespace, scale: Scale) -> None:
        self.args, self.scale = args, scale
        self.lines = args.out / "peers.jsonl"
        self.end = time.time() + args.seconds
        if self.lines.exists():
            whole, _, part = self.lines.read_text().rpartition("\n")
            if part:  # an interrupted line
                self.lines.write_text(whole + "\n" if whole else "")
        load(args.data, args.cache)
        self.kept = [MemorySource(Pixels(str(args.cache), part)) for part in ("train", "val")]  # forks share them
        self.context = context(args.device)
        self.machine = machine(args.device)

    def done(self) -> list[dict[str, Any]]:
        return peers_report.read(self.lines, self.scale)

    def run_of(self, cell: Cell) -> Run:
        """Return the run of a cell, with the choices of its trial, or of the best one."""
        done, steps, row = self.done(), self.scale.steps, cell["row"]
        if cell["stage"] == "teacher":
            chosen = {**choices("ours", 0), "options": TEACHER}
        elif cell["stage"] == "tune":
            chosen = choices(row, cell["trial"])
        else:
            tuned = row.removesuffix(COST)
            chosen = best_trial(done, tuned)["choices"]
            if row != tuned:
                steps = round(steps * cost(done, best_peer(done)) / cost(done, tuned))
            for line in tests_of(done, row):
                if (line["choices"], line["steps"]) != (chosen, steps):
                    sys.exit(f"{row} was tested with other choices, before there were more trials: give another --out")
        args = self.args
        teacher, seed = teacher_file(args.out, self.scale), cell.get("seed", SEED_OF_TRIALS)
        return Run(
            self.scale, args.cache, teacher, seed, steps, chosen["lr"], chosen["decay"], chosen["options"],
            args.workers,
        )  # fmt: skip

    def make(self, todo: list[Cell]) -> None:
        """Make the runs of the cells that have no line, until they are done or the time is over."""
        lines = [{key: line.get(key) for key in ("stage", "row", "trial", "seed")} for line in self.done()]
        todo = [cell for cell in todo if {**dict.fromkeys(("trial", "seed")), **cell} not in lines]
        running: list[tuple[Cell, Run, Any, Path, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                while running or (todo and time.time() < self.end):
                    for each in list(running):
                        if not each[2].is_alive():
                            running.remove(each)
                            self._write(*each)
                    if todo and len(running) < self.args.jobs and time.time() < self.end:
                        cell = todo.pop(0)
                        run, out = self.run_of(cell), Path(folder) / f"{len(todo)}.json"
                        process = self.context.Process(target=work, args=(cell, run, out))
                        process.start()
                        running.append((cell, run, process, out, time.time()))
                    else:
                        time.sleep(0.2)
            finally:
                for _, _, process, _, _ in running:
                    process.kill()
                    process.join(5)

    def _write(self, cell: Cell, run: Run, process: Any, out: Path, start: float) -> None:
        if not out.exists():
            log = out.with_suffix(".log").read_text(errors="replace") if out.with_suffix(".log").exists() else ""
            print(f"{_named(cell)} FAILED ({process.exitcode}):\n{log[-1500:]}", flush=True)
            return
        result = json.loads(out.read_text())
        chosen = {"lr": run.lr, "decay": run.decay, "options": run.options}
        line = {**cell, "choices": chosen, "steps": run.steps, **result}
        line |= {"wall": round(time.time() - start, 1), "settings": asdict(self.scale), "machine": self.machine}
        with self.lines.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        top1 = ", ".join(f"{name} {found['top1']:.2f}" for name, found in result["scores"].items())
        print(f"{time.strftime('%H:%M:%S')} {_named(cell)}: {top1}, {result['seconds']:.0f} s", flush=True)


def _named(cell: Cell) -> str:
    return " ".join(map(str, cell.values()))


def teacher_file(out: Path, scale: Scale) -> Path:
    """Return the file of the teacher of these settings."""
    digest = hashlib.sha256(json.dumps(asdict(scale)).encode()).hexdigest()[:8]
    return out / f"peers_teacher_{digest}.pt"


def stages(
    args: argparse.Namespace, scale: Scale, done: Callable[[], list[dict[str, Any]]]
) -> Sequence[Callable[[], list[Cell]]]:
    """Return functions that list the cells of the stages. Each stage needs what the stages before it have found."""

    def teacher() -> list[Cell]:
        return [{"stage": "teacher", "row": "teacher"}] if "ours_teacher" in args.rows else []

    def tune() -> list[Cell]:
        file = teacher_file(args.out, scale)
        if "ours_teacher" in args.rows and not file.exists():
            print(f"there is no {file}: ours_teacher is left out. To train the teacher again, remove its line.")
        rows = [row for row in args.rows if file.exists() or row != "ours_teacher"]
        return [
            {"stage": "tune", "row": row, "trial": trial}
            for trial in range(-len(ROWS["ours"].further), args.trials)
            for row in rows
        ]

    def test() -> list[Cell]:
        found = [(line["row"], line["trial"]) for line in done() if line["stage"] == "tune"]
        tuned = [row for row in args.rows if all((row, trial) in found for trial in range(args.trials))]
        for row in args.rows:
            if row not in tuned:
                print(f"{row}: trials are missing, so it is not tested", flush=True)
        ours = [row for row in tuned if not ROWS[row].peer and not ROWS[row].base]
        headline = list(ours)
        if len(ours) < len(tuned):
            headline += [best_peer(done()), *(row + COST for row in ours)]
        return [
            {"stage": "test", "row": row, "seed": seed}
            for seed in range(1, max(args.seeds, args.headline_seeds) + 1)
            for row in [*tuned, *(row for row in headline if row not in tuned)]
            if seed <= (args.headline_seeds if row in headline else args.seeds)
        ]

    return {"teacher": [teacher], "tune": [teacher, tune], "all": [teacher, tune, test], "report": []}[args.stage]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder or tar file of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "evidence-cifar10.npz")
    parser.add_argument("--stage", choices=("teacher", "tune", "all", "report"), default="all", help="the last one")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--trials", type=int, default=5, help="of each row, and the further ones")
    parser.add_argument("--headline-seeds", type=int, default=8, help="of ours, at both axes, and of the best peer")
    parser.add_argument("--seeds", type=int, default=5, help="of the other peers")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the images of a peer's run")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    )
    Scale.add_flags(parser)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the runs too
    scale = Scale.of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage != "report":
        if args.data is None or not (args.data.exists() or args.cache.exists()):
            parser.error(f"--data {args.data}: no such folder or tar file; it has train/CLASS/*.jpg, val/CLASS/*.jpg")
        bench = Bench(args, scale)
        for stage in stages(args, scale, bench.done):
            bench.make(stage())
    peers_report.write(args.out, peers_report.read(args.out / "peers.jsonl", scale), scale)


if __name__ == "__main__":
    main()
