"""The stack of "Bag of Tricks" (Table 6) on real images, trick by trick.

    python benchmarks/evidence.py --data cifar10.tar.xz --out benchmarks/results --seconds 280

CIFAR-10 as JPEG files, train/CLASS/*.jpg and val/CLASS/*.jpg in a folder or tar file. All runs have batches of the
library's data module. evidence.md counts the runs that were made before, with another data pipeline. The runs share one
GPU. peers.py compares with the scripts of others.
Finished runs are lines of OUT/evidence.jsonl. The command stops after --seconds, and continues when you repeat it. At
the end, and with --report, it writes evidence.md and evidence.png from these lines. --cpu-smoke runs it at toy scale.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # otherwise the check for a GPU makes it unusable in forks
os.environ.setdefault("OMP_NUM_THREADS", "1")

import evidence_report
from _processes import context, write_result
from evidence_data import Arrays, load
from evidence_runs import Settings, train

TAUGHT = ("distillation", "mixup", "swa")
RUNS = ("baseline", "cosine", "smoothing", *TAUGHT)
LAST = ("no_teacher",)  # after all others


def cells(runs: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Return the cells seed by seed, so that any first part is balanced, with the teacher first."""
    first = [("teacher", 0)] if {*TAUGHT} & {*runs} else []
    early = [(run, seed) for seed in seeds for run in runs if run not in LAST]
    return [*first, *early, *((run, seed) for seed in seeds for run in runs if run in LAST)]


def work(run: str, seed: int, data: Arrays, device: str, s: Settings, teacher: Path, out: Path) -> None:
    """Make one run in a separate process, with a file for the result and a file for the output."""
    write_result(out, lambda: train(run, seed, data, device, s, teacher))


def grid(todo: list[tuple[str, int]], args: argparse.Namespace, s: Settings, end: float) -> None:
    """Run cells side by side until they are done or the time is over."""
    began, data = time.time(), load(args.data, args.cache)
    print(
        f"{time.time() - began:.1f} s: {len(data['train_y'])} training images, {len(data['val_y'])} of val", flush=True
    )
    if args.limit:
        data = {k: v[:: max(1, len(data["train_y"]) // args.limit)] for k, v in data.items()}
    ctx, took, failed = context(args.device), [], 0
    running: dict[tuple[str, int], tuple[Any, float]] = {}
    teacher = args.out / "evidence_teacher.pt"
    with tempfile.TemporaryDirectory() as folder, (args.out / "evidence.jsonl").open("a") as lines:

        def file_of(cell: tuple[str, int]) -> Path:
            return Path(folder) / f"{cell[0]}-{cell[1]}.json"

        try:
            while (todo or running) and time.time() < end:
                for cell, (process, start) in list(running.items()):
                    if process.is_alive():
                        continue
                    del running[cell]
                    path, seconds = file_of(cell), time.time() - start
                    if path.exists():
                        result = json.loads(path.read_text()) | {"wall": round(seconds, 1), "settings": asdict(s)}
                        lines.write(json.dumps(result | {"machine": args.machine}) + "\n")
                        lines.flush()
                        took.append(seconds)
                        print(f"{time.time() - began:5.0f} s  {cell}: {result['top1']}", flush=True)
                    else:
                        failed += 1
                        output = path.with_suffix(".log").read_text(errors="replace")
                        print(f"{time.time() - began:5.0f} s  {cell} FAILED:\n{output[-1500:]}", flush=True)
                # wait for the teacher, so that it has most of the GPU
                teaching = any(run == "teacher" for run, _ in [*running, *todo])
                room = (min(4, args.jobs) if teaching else args.jobs) - len(running)
                left = end - time.time()
                ready = [c for c in todo if c[0] not in TAUGHT or (teacher.exists() and not teaching)]
                if room > 0 and ready and not (took and left < 0.8 * statistics.median(took)):
                    cell = ready[0]
                    todo.remove(cell)
                    arguments = (*cell, data, args.device, s, teacher, file_of(cell))
                    process = ctx.Process(target=work, args=arguments)
                    process.start()
                    running[cell] = process, time.time()
                elif not running:
                    break
                else:
                    time.sleep(0.1)
        finally:
            for process, _ in running.values():
                process.kill()
            for process, _ in running.values():
                process.join(5)
    print(
        f"{time.time() - began:.0f} s, {len(took)} runs done, {failed} failed, {len(todo) + len(running)} left",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder or tar file of the images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "evidence-cifar10.npz")
    parser.add_argument("--seconds", type=float, default=280, help="stop after them")
    parser.add_argument("--jobs", type=int, default=8, help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", default=[*RUNS, *LAST], choices=[*RUNS, *LAST])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    )
    parser.add_argument("--report", action="store_true", help="only remake evidence.md and evidence.png")
    parser.add_argument("--cpu-smoke", action="store_true", help="toy scale")
    parser.add_argument("--limit", type=int, help="training images, about; None: all")
    defaults = Settings()
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the runs too
    end = time.time() + args.seconds
    s = Settings(**{name: getattr(args, name) for name in asdict(defaults)})
    if args.device == "cpu" and not args.report:
        s = replace(s, precision="bf16-mixed")
    if args.cpu_smoke:
        s = replace(s, epochs=4, batch_size=64, width=0.125, teacher_width=0.125, fixres_epochs=1)
        args.limit, args.seeds, args.jobs = args.limit or 500, args.seeds[:2], 1
    args.out.mkdir(parents=True, exist_ok=True)
    done = evidence_report.read(args.out / "evidence.jsonl", s)
    if not args.report:
        if args.data is None or not args.data.exists():
            parser.error(
                f"--data {args.data}: no such folder or tar file; it holds train/CLASS/*.jpg and val/CLASS/*.jpg"
            )
        args.machine = evidence_report.machine(args.device)
        teacher_there = (args.out / "evidence_teacher.pt").exists()
        skip = {(c["run"], c["seed"]) for c in done if c["run"] != "teacher" or teacher_there}
        todo = [cell for cell in cells(args.runs, args.seeds) if cell not in skip]
        grid(todo, args, s, end)
        done = evidence_report.read(args.out / "evidence.jsonl", s)
    evidence_report.write(args.out, done, s)


if __name__ == "__main__":
    main()
