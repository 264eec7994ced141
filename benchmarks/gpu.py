"""Measure on a GPU: speed, launches, syncs and memory of the tricks, and 16-mixed, with predictions.

    python benchmarks/gpu.py --out benchmarks/results/gpu.md

Each part runs in its own process, with its own time limit. If a part fails, the failure is reported and the other parts
continue. ``--parts ema scaler`` runs only these parts. --seconds limits the time of all parts. --smoke runs the code at
toy scale, also without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # otherwise the check for a GPU makes it unusable in forks
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for results that must be bitwise equal

import gpu_exact
import gpu_speed
from _processes import context
from gpu_common import Report, Scale

Row = tuple[str, str, str]
PARTS: dict[str, tuple[Callable[[Scale, Report], None], int]] = {  # with the seconds each may take
    "ema": (gpu_exact.ema, 30),
    "syncs": (gpu_exact.syncs, 30),
    "launches": (gpu_exact.launches, 20),
    "scaler": (gpu_exact.scaler, 40),
    "memory": (gpu_speed.memory, 30),
    "each": (gpu_speed.each, 75),
    "throughput": (gpu_speed.throughput, 45),
    "precise_bn": (gpu_speed.precise_bn, 30),
    "resume": (gpu_exact.resume, 30),
    "distillation": (gpu_exact.distillation, 75),
    "compiled": (gpu_speed.compiled, 110),
}


def work(name: str, s: Scale, connection: Connection) -> None:
    """Run in a separate process, and send each figure as soon as it is measured."""
    warnings.simplefilter("ignore")
    try:
        PARTS[name][0](s, lambda *row: connection.send(row))
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", "-", f"{type(error).__name__}: {str(error)[:200]}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(name: str, s: Scale, limit: float, ctx: Any) -> list[Row]:
    ours, theirs = ctx.Pipe(duplex=False)
    process = ctx.Process(target=work, args=(name, s, theirs))
    rows, end = [], time.time() + limit
    process.start()
    theirs.close()
    while (left := end - time.time()) > 0 and ours.poll(left):
        try:
            rows.append(ours.recv())
        except EOFError:  # it is over
            break
        print(f"{name}: {rows[-1][0]}: {rows[-1][2]} (predicted {rows[-1][1]})", flush=True)
    else:
        rows.append((f"stopped after {limit:.0f} s", "-", "-"))
        print(f"{name}: {rows[-1][0]}", flush=True)
    process.kill()
    process.join(10)
    return rows


def text(found: dict[str, list[Row]], s: Scale, took: float) -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        machine = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except FileNotFoundError:
        machine = ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "timm"))
    lines = ["| part | | predicted | measured |", "|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(row) + " |" for name, rows in found.items() for row in rows]
    return "\n".join(
        [
            "# What only a GPU shows",
            "",
            "All predictions were written before the first run on a GPU. Ratios compare medians over rounds in which",
            f"the candidates take turns, {s.steps} steps each. Steps are a Trainer's, including its own cost.",
            "",
            *lines,
            "",
            f"{machine or platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; "
            f"{datetime.date.today()}; {took:.0f} s. `python benchmarks/gpu.py --parts {' '.join(found)}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=290, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.md"))
    parser.add_argument("--smoke", action="store_true", help="toy scale, on the CPU where there is no GPU")
    args = parser.parse_args()
    start, found, s = time.time(), {}, Scale()
    if args.smoke:
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
        s = Scale(device, "resnet18", "test_resnet", batch_size=4, image_size=64, steps=2, rounds=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ctx = context(s.device)
    for name in args.parts:
        limit = min(PARTS[name][1], start + args.seconds - time.time())
        found[name] = run(name, s, limit, ctx) if limit > 5 else [("no time was left", "-", "-")]
        args.out.write_text(text(found, s, time.time() - start))
    print(f"{time.time() - start:.0f} s; {args.out}", flush=True)


if __name__ == "__main__":
    main()
