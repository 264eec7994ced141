"""Measure the time to list many image files, and the memory of the list in each loading process over an epoch.

    python benchmarks/scanner.py --images 200000 --out benchmarks/results/scanner.md

Makes a folder of links to one tiny JPEG file (Linux only, for the memory is read from /proc).
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from lit_tricks.data import ImageFolder
from lit_tricks.data.io.file_index import list_images

CLASSES = 1000


def write_images(root: Path, count: int) -> None:
    for split, number in (("train", count), ("val", CLASSES)):
        for label in range(CLASSES):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(label, number, CLASSES):
                path = folder / f"n{label:08d}_{i}.JPEG"
                if i < 2 * CLASSES:  # a file has at most 65,000 names
                    Image.fromarray(np.full((8, 8, 3), label % 256, np.uint8)).save(path)
                    first = path
                else:
                    os.link(first, path)


def torchvisions(root: str) -> int:
    return len(DatasetFolder(f"{root}/train", lambda path: path, IMG_EXTENSIONS))


def ours(root: str) -> int:
    return len(list_images(f"{root}/train")[0])


def memory(root: str, as_strings: bool, workers: int) -> list[dict[str, float]]:
    """Return the PSS and USS of each worker in MB, at the first batches and at the end of an epoch."""
    data = ImageFolder(root, image_size=8, batch_size=256, num_workers=workers, augmentation="none")
    loader = data.train_dataloader()
    if as_strings:
        classes = {name: label for label, name in enumerate(data.classes)}
        source = loader.dataset.source
        source.paths = [path for path, _ in make_dataset(f"{root}/train", classes, IMG_EXTENSIONS)]
    rows = []
    for number, _ in enumerate(loader):
        if number in (min(20, len(loader) // 4), len(loader) - 1):
            rows.append(pages())
    return rows


def pages() -> dict[str, float]:
    found: dict[str, list[int]] = {"Pss": [], "Private_Dirty": [], "Private_Clean": []}
    for worker in multiprocessing.active_children():
        for line in Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name].append(int(rest.split()[0]))
    own = [dirty + clean for dirty, clean in zip(found["Private_Dirty"], found["Private_Clean"], strict=True)]
    return {"PSS": statistics.mean(found["Pss"]) / 1024, "USS": statistics.mean(own) / 1024}


def in_process(function: Callable[..., Any], *args: Any, cache: str) -> tuple[float, Any]:
    """Return the result of a function in a separate process, and its seconds there."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run() -> None:
        os.environ["LIT_TRICKS_CACHE"] = cache
        start = time.perf_counter()
        result = function(*args)
        results.put((time.perf_counter() - start, result))

    process = context.Process(target=run)
    process.start()
    result = results.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        root, cache = f"{folder}/data", f"{folder}/cache"
        write_images(Path(root), args.images)
        time.sleep(2.5)  # a folder that has just changed is read again
        times: dict[str, list[float]] = {}
        _, count = in_process(ours, root, cache=cache)
        assert count == args.images, count
        for _ in range(args.rounds):
            for name, function, place in (
                ("torchvision's DatasetFolder", torchvisions, ""),
                ("ours, without a cache", ours, ""),
                ("ours, with one", ours, cache),
            ):
                times.setdefault(name, []).append(in_process(function, root, cache=place)[0])
        Path(root, "train", "n00000500", "new.jpg").touch()
        changed, more = in_process(ours, root, cache=cache)
        assert more == args.images + 1, more
        Path(root, "train", "n00000500", "new.jpg").unlink()
        sizes = [file.stat().st_size for file in Path(cache).iterdir()]
        rows = {
            name: in_process(memory, root, strings, args.workers, cache=cache)[1]
            for name, strings in (("a list of strings", True), ("tensors", False))
        }
    lines = ["| to list the files | s |", "|---|---|"]
    lines += [f"| {name} | {statistics.median(each):.2f} |" for name, each in times.items()]
    lines += [f"| ours, with one, a file added | {changed:.2f} |", ""]
    lines += ["| the list in a worker | PSS at first | at the end of the epoch | USS at first | at the end |"]
    lines += ["|---|---|---|---|---|"]
    for name, (first, last) in rows.items():
        lines.append(f"| {name} | {first['PSS']:.0f} | {last['PSS']:.0f} | {first['USS']:.0f} | {last['USS']:.0f} |")
    command = f"python benchmarks/scanner.py --images {args.images} --workers {args.workers} --rounds {args.rounds}"
    text = "\n".join(
        [
            f"# {args.images:,} image files in {CLASSES} folders",
            "",
            *lines,
            "",
            f"Listing: medians of {args.rounds} rounds in which all take turns, each in its own process. The "
            f"kernel has the folders in memory. The cache file has {max(sizes) / 2**20:.1f} MB. Memory: MB, mean of "
            f"{args.workers} workers, at the 20th batch and at the last of an epoch over all images. PSS counts shared "
            "pages in proportion to the processes that share them. USS counts only pages that are not shared.",
            "",
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores shared with other work; Python "
            f"{platform.python_version()}, torch {torch.__version__}; {datetime.date.today()}. `{command}`.",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
