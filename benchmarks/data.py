"""Measure the cost of an image in the paper's pipeline, from JPEG file to batch, and compare with other libraries.

    OMP_NUM_THREADS=1 python benchmarks/data.py cpu FOLDER --out benchmarks/results/data.md
    python benchmarks/data.py loader FOLDER --workers 2
    python benchmarks/data.py gpu FOLDER --workers 16 --seconds 8
    python benchmarks/data.py small --out benchmarks/results/data_small.md

FOLDER holds CLASS/*.jpg. "cpu" is CPU time in one thread; all candidates take turns on the same images, batch by batch.
"loader" is images per second of whole loaders, by itself and with a training step. "gpu" times the colors on a GPU and
trains a ResNet-50 in bf16 from the files, which takes two minutes; without a GPU it runs, for a test, on the CPU.
"small" is for images of 32 x 32 pixels in memory, on the CPU and, where there is one, on a GPU; it needs no FOLDER.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import data_dali
import data_small
import numpy as np
import simplejpeg
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_loader, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.transforms import v2

from lit_tricks.data import ImageFolder
from lit_tricks.data.color import Jitter, apply_matrices
from lit_tricks.data.crops import RandomCrop, generator_at
from lit_tricks.data.io import jpeg, turbojpeg
from lit_tricks.data.io.jpeg import pixels_of, read_image
from lit_tricks.data.samples import Samples
from lit_tricks.data.shards.writer import image_bytes
from lit_tricks.data.transforms import PCANoise, to_pixels

SIZE, RESIZE = 224, 256
MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)
FLOATS = [channel / 255 for channel in MEAN], [channel / 255 for channel in STD]
JITTER = {"brightness": 0.4, "saturation": 0.4, "hue": 0.2}

Step = Callable[[list[int]], object]


def folders(source: Path, root: Path, copies: int) -> str:
    """Link a folder of classes as train and val, several times for longer epochs."""
    for split in ("train", "val"):
        (root / split).mkdir()
        for folder in sorted(path for path in source.resolve().iterdir() if path.is_dir()):
            for copy in range(copies):
                (root / split / f"{folder.name}-{copy}").symlink_to(folder)
    return str(root)


def shrunk(root: str) -> str:
    """Write the images anew at a short side of 256 pixels, as FFCV stores them, and `lit-tricks data shard` can."""
    for path in sorted(Path(root).glob("*/*/*")):
        target = Path(root, "small", path.relative_to(root))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image_bytes(str(path), RESIZE))
    return str(Path(root, "small"))


def torchvision_v1() -> Any:
    crop, flip, jitter = v1.RandomResizedCrop(SIZE), v1.RandomHorizontalFlip(), v1.ColorJitter(**JITTER)
    return v1.Compose([crop, flip, jitter, to_pixels, PCANoise(0.1), v1.Normalize(MEAN, STD)])


def torchvision_v2() -> Any:
    crop, flip, jitter = v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(**JITTER)
    return v2.Compose([crop, flip, jitter, Tensor.float, PCANoise(0.1), v2.Normalize(MEAN, STD)])


def read_tensor(path: str) -> Tensor:
    return torchvision.io.decode_image(path, mode="RGB")


def read_pil(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


# CPU time of one thread


def candidates(root: str, batch_size: int) -> dict[str, Step]:
    data, small_data = (ImageFolder(path, batch_size=batch_size, num_workers=0) for path in (root, shrunk(root)))
    train, val, small = (
        data.train_dataloader().dataset,
        data.val_dataloader().dataset,
        small_data.train_dataloader().dataset,
    )
    assert isinstance(train, Samples)
    assert isinstance(val, Samples)
    assert isinstance(small, Samples)
    paths = [path for path, _ in torchvision.datasets.ImageFolder(f"{root}/train").samples]

    def peer(read: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> Step:
        return lambda indices: torch.stack([transform(read(paths[index])) for index in indices])

    def ours(samples: Samples, colored: bool) -> Step:
        def step(indices: list[int]) -> object:
            batch = samples.__getitems__(indices).whole  # type: ignore[attr-defined]
            return data.on_after_batch_transfer(batch, 0) if colored else batch

        return step

    def without_regions(step: Step) -> Step:
        def by_simplejpeg(indices: list[int]) -> object:
            with mock.patch.object(jpeg, "decode_region", return_value=False):
                return step(indices)

        return by_simplejpeg

    def decoded(indices: list[int]) -> None:
        """Only decode the crops of training."""
        for index in indices:
            image = read_image(paths[index])
            pixels_of(image, RandomCrop.box(*image.size, generator_at(train.seed, 0, index)))

    v1_val = v1.Compose([v1.Resize(RESIZE), v1.CenterCrop(SIZE), v1.ToTensor(), v1.Normalize(*FLOATS)])
    crop = [v2.Resize(RESIZE, antialias=True), v2.CenterCrop(SIZE)]
    v2_val = v2.Compose([*crop, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*FLOATS)])
    arguments = {"input_size": SIZE, "mean": FLOATS[0], "std": FLOATS[1], "interpolation": "bilinear"}
    hue = create_transform(**arguments, is_training=True, color_jitter=(0.4, 0.0, 0.4, 0.2))
    center = create_transform(**arguments, crop_pct=SIZE / RESIZE)
    return {
        "train: torchvision v1": peer(read_pil, torchvision_v1()),
        "train: torchvision v2, tensors": peer(read_tensor, torchvision_v2()),
        "train: timm, jitter with hue, no PCA noise": peer(read_pil, hue),
        **data_dali.steps(paths, SIZE, batch_size),
        "train: lit_tricks, all color transforms on the CPU": ours(train, True),
        "train: lit_tricks, uint8 out": ours(train, False),
        "train: lit_tricks, uint8 out, without TurboJPEG": without_regions(ours(train, False)),
        "train: lit_tricks, uint8 out, from images of short side 256": ours(small, False),
        "train: only decoding, same decoder and crop": decoded,
        "validation: torchvision v1": peer(read_pil, v1_val),
        "validation: torchvision v2, tensors": peer(read_tensor, v2_val),
        "validation: timm": peer(read_pil, center),
        "validation: lit_tricks": ours(val, True),
        "validation: lit_tricks, without TurboJPEG": without_regions(ours(val, True)),
    }


def cpu(root: str, rounds: int, batch_size: int) -> str:
    torch.set_num_threads(1)
    steps = candidates(root, batch_size)
    count = sum(path.is_file() for path in Path(root, "train").glob("*/*"))
    order, times = np.random.RandomState(0).permutation(count), {name: [] for name in steps}  # type: ignore[var-annotated]
    for turn in range(rounds + 1):
        indices = np.resize(np.roll(order, -turn * batch_size), batch_size).tolist()
        for name in np.random.RandomState(turn).permutation(list(steps)):
            start = time.process_time()
            steps[name](indices)
            times[name].append(1000 * (time.process_time() - start) / batch_size)
    rows = []
    for name, found in times.items():
        base = times[f"{name.partition(':')[0]}: torchvision v1"]
        ratio = statistics.median(theirs / mine for theirs, mine in zip(base[1:], found[1:], strict=True))
        rows.append(f"| {name} | {statistics.median(found[1:]):.2f} | {ratio:.2f} |")
    part, whole = times["train: only decoding, same decoder and crop"], times["train: lit_tricks, uint8 out"]
    share = statistics.median(mine / least for mine, least in zip(whole[1:], part[1:], strict=True))
    head = ["| | ms of CPU per image | x faster than torchvision v1 |", "|---|---|---|"]
    tail = f'\n"uint8 out" takes {share:.2f} times as long as decoding. Medians of {rounds} x {batch_size} images.'
    return "\n".join([*head, *rows, tail])


# Whole loaders


def loaders(root: str, workers: int, batch_size: int) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Return per kind: a function that makes a loader, and a function from its batches to (images, labels)."""
    cuda = torch.cuda.is_available()

    def ours(kind: Any) -> tuple[Any, Any]:
        data = ImageFolder(root, SIZE, batch_size, workers, workers=kind)
        return data.train_dataloader(), lambda batch: data.on_after_batch_transfer(batch, 0)

    def by_torchvision() -> tuple[Any, Any]:
        dataset = torchvision.datasets.ImageFolder(f"{root}/train", torchvision_v1())
        args = {"num_workers": workers, "shuffle": True, "drop_last": True, "pin_memory": cuda}
        return DataLoader(dataset, batch_size, persistent_workers=workers > 0, **args), lambda batch: batch

    def by_timm() -> tuple[Any, Any]:
        loader = create_loader(
            torchvision.datasets.ImageFolder(f"{root}/train"), (3, SIZE, SIZE), batch_size, is_training=True,
            color_jitter=(0.4, 0.0, 0.4, 0.2), interpolation="bilinear", num_workers=workers, use_prefetcher=cuda,
            device=torch.device("cuda" if cuda else "cpu"), persistent_workers=workers > 0,
        )  # fmt: skip
        return loader, lambda batch: batch

    return {
        "lit_tricks, processes": lambda: ours("process"),
        "lit_tricks, threads": lambda: ours("thread"),
        "timm, jitter with hue, no PCA noise": by_timm,
        "torchvision v1": by_torchvision,
    }


def forever(loader: Any) -> Iterator[Any]:
    for epoch in range(10**6):
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        yield from loader


def trained(loader: Any, finish: Any, model: nn.Module | None, device: torch.device, seconds: float) -> list[float]:
    """Return images per second, the share of time spent waiting for a batch, and the utilization of the GPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if model else None
    batches, utilization = forever(loader), []
    begin = waited = images = 0
    for number in range(10**6):
        requested = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        batch = finish([part.to(device, non_blocking=True) for part in batch])
        if model and optimizer:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = nn.functional.cross_entropy(model(batch[0]), batch[1] % 1000)  # copies of a folder are classes
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # waits for the GPU, so that the time above is the wait for the loader
        if number == 5:  # the first batches find workers that are starting, and what was read ahead
            begin, waited, images = time.perf_counter(), 0, 0  # type: ignore[assignment]
        elif number > 5:
            waited, images = waited + got - requested, images + len(batch[1])  # type: ignore[assignment]
            if device.type == "cuda" and number % 10 == 0:
                utilization.append(gpu_utilization())
            if time.perf_counter() - begin > seconds:
                break
    elapsed = time.perf_counter() - begin
    batches.close()  # type: ignore[attr-defined]
    return [images / elapsed, 100 * waited / elapsed, statistics.mean(utilization) if utilization else float("nan")]


def gpu_utilization() -> float:
    try:
        return float(torch.cuda.utilization())
    except Exception:  # needs nvidia-ml-py
        return float("nan")


def table(rows: dict[str, list[float]]) -> str:
    head = ["| | images/s | % of time waiting for data | % GPU utilization |", "|---|---|---|---|"]
    body = [f"| {name} | {found[0]:.0f} | {found[1]:.0f} | {found[2]:.0f} |" for name, found in rows.items()]
    return "\n".join([*head, *body]).replace(" nan |", " - |")


def loader_speed(root: str, workers: int, batch_size: int, seconds: float, rounds: int) -> str:
    """Measure the loader, by itself and with a training step of a tiny ResNet in the main process."""
    torch.set_num_threads(1)
    text = []
    for title, name in (
        ("Only the loader", None),
        ("Next to a training step on the CPU, of timm's test_resnet", "test_resnet"),
    ):
        found: dict[str, list[list[float]]] = {}
        for _ in range(rounds):
            for kind, make in loaders(root, workers, batch_size).items():
                model = timm.create_model(name) if name else None
                found.setdefault(kind, []).append(trained(*make(), model, torch.device("cpu"), seconds))
        medians = {kind: np.median(runs, axis=0).tolist() for kind, runs in found.items()}
        text += [f"{title}, {workers} workers, batch of {batch_size}, median of {rounds}:\n\n{table(medians)}\n"]
    return "\n".join(text)


# On a GPU


def color_kernel(device: torch.device, batch_size: int) -> str:
    jitter, rows = Jitter(MEAN, STD), []
    images = torch.randint(0, 256, (batch_size, SIZE, SIZE, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    draws = np.stack([jitter.draw(np.random.default_rng(seed)) for seed in range(batch_size)])
    matrices = jitter.matrices(draws).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            times = []
            for _ in range(30):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                result = apply_matrices(images, matrices, dtype, channels_last)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - start))
            reference = apply_matrices(images[:2].cpu(), matrices[:2].cpu(), torch.float32, False)
            error = (result[:2].cpu().float() - reference).abs().max().item()
            layout = "channels last" if channels_last else "contiguous"
            rows.append(f"| {dtype}, {layout} | {statistics.median(times):.3f} | {error:.1e} |")
    head = [f"| colors of {batch_size} x 3 x {SIZE} x {SIZE} | ms | largest difference to the CPU |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def gpu(root: str, workers: int, batch_size: int, seconds: float, name: str) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    kernel = color_kernel(device, batch_size)
    print(kernel, flush=True)
    model = timm.create_model(name).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    still = [[images, torch.zeros(batch_size, dtype=torch.int64, device=device)]]
    rows = {"the same batch again and again": trained(still, lambda batch: batch, model, device, seconds / 2)}
    for kind, make in loaders(root, workers, batch_size).items():
        rows[kind] = trained(*make(), model, device, seconds)
        print(kind, rows[kind], flush=True)
    text = f"{name} in bf16, channels last, {workers} workers, batch of {batch_size}, {seconds} s each"
    return f"{kernel}\n\n{text}:\n\n{table(rows)}"


def machine() -> str:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    return (
        f"{card}{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores shared with other "
        f"work (load average {os.getloadavg()[0]:.1f} at the end); Python {platform.python_version()}, {versions}, "
        f"simplejpeg {simplejpeg.__version__}, {'a' if turbojpeg._library() else 'no'} TurboJPEG 3; "
        f"{datetime.date.today()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["cpu", "loader", "gpu", "small"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--copies", type=int, default=50, help="how often the folder is in an epoch of a loader")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.mode == "small":
        finish(data_small.report(given.rounds, given.seconds), given.out)
        return
    if given.folder is None:
        parser.error(f"{given.mode} needs a FOLDER of CLASS/*.jpg")
    with tempfile.TemporaryDirectory() as folder:
        root = folders(given.folder, Path(folder), 1 if given.mode == "cpu" else given.copies)
        if given.mode == "cpu":
            text = cpu(root, given.rounds, given.batch_size)
        elif given.mode == "loader":
            text = loader_speed(root, given.workers, given.batch_size, given.seconds, given.rounds)
        else:
            text = gpu(root, given.workers, given.batch_size, given.seconds, given.model)
    finish(text, given.out)


def finish(text: str, out: Path | None) -> None:
    command = f"`OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} python {' '.join(sys.argv)}`"
    text = f"{text}\n\n{machine()}\n{command}\n"
    print(text)
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
