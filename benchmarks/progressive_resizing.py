"""ProgressiveResizing on CIFAR-10: time and accuracy with and without it, for the same number of epochs.

    OMP_NUM_THREADS=1 python benchmarks/progressive_resizing.py --data FOLDER --out benchmarks/results

FOLDER, or a tar file, has train/CLASS/*.jpg and val/CLASS/*.jpg. The library's data module keeps the images in memory,
and makes batches on the device, so that the network is what costs time. Seed by seed, the runs of all candidates take
turns.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning
import torch
from evidence_data import Arrays, Images, load
from evidence_runs import BASE_BATCH, CROP_SCALE, Net, Settings, trainer_of, validate
from lightning.pytorch import Callback, seed_everything

from lit_tricks import callbacks as tricks

SIDE, MULTIPLE_OF = 32, 8
CANDIDATES: dict[str, tuple[float, float] | None] = {  # start_scale, end
    "without": None,
    "start_scale 0.5, end 0.8": (0.5, 0.8),
}


def run(resizing: tuple[float, float] | None, seed: int, data: Arrays, device: str, s: Settings) -> tuple[float, float]:
    """Return top-1 in % on the full validation images, and the seconds of the training without validation."""
    seed_everything(seed, verbose=False)
    module = Net(s.network())
    images = Images.of(data, batch_size=s.batch_size, image_size=SIDE, crop_scale=CROP_SCALE)
    callbacks: list[Callback] = [
        tricks.LinearScaling(base_batch_size=BASE_BATCH),
        tricks.ChannelsLast(),
        tricks.WarmupCosine(warmup_epochs=1),
    ]
    if resizing:
        callbacks.append(tricks.ProgressiveResizing(start_scale=resizing[0], end=resizing[1], multiple_of=MULTIPLE_OF))
    clock = time.perf_counter if device == "cuda" else time.process_time  # excludes other work on the CPU
    trainer = trainer_of(s, device, s.epochs, callbacks, limit_val_batches=0)
    start = clock()
    trainer.fit(module, datamodule=images)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    found = validate(module, images, device, s)
    return 100 * found[f"val/{SIDE}"], seconds


def report(found: dict[str, list[tuple[float, float]]], images: int, s: Settings, device: str) -> str:
    lines = [
        f"| ProgressiveResizing | top-1 in % | {'seconds' if device == 'cuda' else 'CPU seconds'} | x without |",
        "|---|---|---|---|",
    ]
    without = found["without"]
    for name, runs in found.items():
        top1, seconds = ([r[i] for r in runs] for i in (0, 1))
        ratio = statistics.mean(r[1] / w[1] for r, w in zip(runs, without, strict=False))
        each = ", ".join(f"{x:.2f}" for x in top1)
        lines.append(
            f"| {name} | {statistics.mean(top1):.2f} ({each}) | {statistics.mean(seconds):.1f} | {ratio:.2f} |"
        )
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{model or platform.processor()}, {torch.get_num_threads()} thread(s)"
    )
    return "\n".join(
        [
            "# Progressive resizing on CIFAR-10",
            "",
            *lines,
            "",
            f"Means over {len(without)} seed(s), with the top-1 per seed in brackets, on the 5,000 images of val at "
            f"{SIDE} pixels. ResNet-18-D of width {s.width:g} for small images, {images:,} training images, {s.epochs} "
            f"epochs each, batches of {s.batch_size}, SGD with half a cosine after one epoch of warm-up, "
            f"RandomResizedCrop of 25 to 100 % of the area. Sides are multiples of {MULTIPLE_OF} pixels. Seconds "
            "are the time of the training, without validation.",
            "",
            f"{machine}; Python {platform.python_version()}, torch {torch.__version__}, lightning "
            f"{lightning.__version__}; {datetime.date.today()}. `OMP_NUM_THREADS={torch.get_num_threads()} python "
            f"benchmarks/progressive_resizing.py --data CIFAR10 --limit {images} --epochs {s.epochs} --width "
            f"{s.width:g} --seeds {len(without)}`.",
            "",
        ]
    )


def main() -> None:
    defaults = Settings(epochs=8, batch_size=128, train_size=SIDE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or tar file of the images")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "evidence-cifar10.npz")
    parser.add_argument("--limit", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--width", type=float, default=defaults.width)
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--out", type=Path, help="folder for progressive_resizing.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # advice about workers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    s = Settings(args.epochs, 128, args.width, train_size=SIDE, precision="16-mixed" if device == "cuda" else "32-true")
    data = load(args.data, args.cache)
    chosen = torch.randperm(len(data["train_y"]), generator=torch.Generator().manual_seed(0))[: args.limit].numpy()
    data = {name: array[chosen] if name.startswith("train") else array for name, array in data.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CANDIDATES}
    for seed in range(args.seeds):
        for name, resizing in CANDIDATES.items():
            found[name].append(run(resizing, seed, data, device, s))
            print(f"seed {seed}, {name}: {found[name][-1][0]:.2f} %, {found[name][-1][1]:.1f} s", flush=True)
    text = report(found, len(chosen), s, device)
    print(text)
    if args.out:
        (args.out / "progressive_resizing.md").write_text(text)


if __name__ == "__main__":
    main()
