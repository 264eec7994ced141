"""Parts of gpu.py: images per second, and the cost of the tricks in a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import Batch, Net, Report, Scale, loader, medians, paper, synchronize, timed, trainer_of
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lit_tricks import callbacks as tricks
from lit_tricks.callbacks.batchnorm.data_pass import go_through
from lit_tricks.utils.modules import batchnorms_of


class TrainingLength(Callback):
    """Measure the seconds of the steps after the first ones, including the device."""

    def __init__(self, warm: int) -> None:
        self.warm, self.seconds, self.host = warm, math.nan, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warm:
            synchronize(pl_module.device)
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        synchronize(pl_module.device)
        self.seconds = time.perf_counter() - self.start


def fit_speed(s: Scale, chosen: list[Callback], batch: Batch, warm: int = 5) -> tuple[float, float]:
    """Measure images per second of a Trainer's steps, and the peak memory in MiB."""
    seed_everything(0, verbose=False)
    module, clock = Net(s.network()), TrainingLength(warm)
    if s.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer_of(s, [*chosen, clock]).fit(module, loader([batch] * (warm + s.steps)))
    peak = torch.cuda.max_memory_allocated() / 2**20 if s.device == "cuda" else 0.0
    return s.steps * len(batch[0]) / clock.seconds, peak


def loop_speed(s: Scale, batch: Batch, channels_last: bool, compiled: bool = False, warm: int = 5) -> float:
    """Measure images/s of the step of timm's train.py (channels_last) and torchvision's: autocast, scaler, SGD."""
    seed_everything(0, verbose=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = s.network().to(s.device, memory_format=layout).train()
    run = torch.compile(net) if compiled else net
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=1e-4, nesterov=True)
    scaler = torch.amp.GradScaler(s.device, enabled=s.device == "cuda")
    criterion = nn.CrossEntropyLoss()
    for step in range(warm + s.steps):
        if step == warm:
            synchronize(s.device)
            start = time.perf_counter()
        images = batch[0].contiguous(memory_format=layout)
        with torch.autocast(s.device, torch.float16, enabled=s.device == "cuda"):
            loss = criterion(run(images), batch[1])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    synchronize(s.device)
    return s.steps * len(images) / (time.perf_counter() - start)


def throughput(s: Scale, report: Report) -> None:
    batch = s.batch()
    speeds = medians(
        {
            "plain": lambda: fit_speed(s, [], batch)[0],
            "last": lambda: fit_speed(s, [tricks.ChannelsLast()], batch)[0],
            "timm": lambda: loop_speed(s, batch, channels_last=True),
            "torchvision": lambda: loop_speed(s, batch, channels_last=False),
        },
        s.rounds,
    )
    what = f"{s.model}, batch of {s.batch_size} at {s.image_size}, {s.precision}"
    report(f"{what}: plain Trainer", "1500 images/s", f"{speeds['plain']:.0f} images/s")
    report("the same with ChannelsLast", "2600 images/s", f"{speeds['last']:.0f} images/s")
    report("gain of ChannelsLast", "1.70 x", f"{speeds['last'] / speeds['plain']:.2f} x")
    report("ChannelsLast against timm's step", "0.99 x", f"{speeds['last'] / speeds['timm']:.3f} x")
    report("ChannelsLast against torchvision's step", "1.70 x", f"{speeds['last'] / speeds['torchvision']:.2f} x")
    report("plain Trainer against torchvision's step", "0.99 x", f"{speeds['plain'] / speeds['torchvision']:.3f} x")


def compiled(s: Scale, report: Report) -> None:
    batch = s.batch()
    start = time.perf_counter()
    ours = fit_speed(s, [tricks.ChannelsLast(), tricks.Compile()], batch)[0]
    report("ChannelsLast and Compile", "3000 images/s", f"{ours:.0f} images/s")
    report("seconds of that fit, compilation included", "60 s", f"{time.perf_counter() - start:.0f} s")
    speeds = medians({"last": lambda: fit_speed(s, [tricks.ChannelsLast()], batch)[0]}, 1)
    report("gain of Compile on top of ChannelsLast", "1.15 x", f"{ours / speeds['last']:.2f} x")
    timms = loop_speed(s, batch, channels_last=True, compiled=True)
    again = fit_speed(s, [tricks.ChannelsLast(), tricks.Compile()], batch)[0]
    report(
        "ChannelsLast and Compile against timm's step, --torchcompile", "0.99 x", f"{max(ours, again) / timms:.3f} x"
    )


def memory(s: Scale, report: Report) -> None:
    sets: dict[str, list[Callback]] = {
        "nothing": [],
        "EMA": [tricks.EMA()],
        'EMA(device="cpu")': [tricks.EMA(device="cpu", every_n_steps=10)],
    }
    batch = s.batch()
    peaks = {name: fit_speed(s, [tricks.ChannelsLast(), *chosen], batch)[1] for name, chosen in sets.items()}
    more = peaks["EMA"] - peaks["nothing"]
    report("EMA: peak memory more (one fp32 copy is 97.7 MiB)", "98 MiB", f"{more:.1f} MiB of {peaks['nothing']:.0f}")
    on_cpu = peaks['EMA(device="cpu")'] - peaks["nothing"]
    report('EMA(device="cpu"): peak memory more', "0 MiB", f"{on_cpu:.1f} MiB")


class Kernels(Callback):
    """Measure the time of the kernels of three steps, by name, after warm-up steps."""

    def __init__(self, first: int) -> None:
        self.first, self.busy, self.named = first, math.nan, ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            synchronize(pl_module.device)
            self.profile.start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        synchronize(pl_module.device)
        self.profile.stop()
        events = sorted(self.profile.key_averages(), key=lambda event: -event.self_device_time_total)
        self.busy = sum(event.self_device_time_total for event in events) / 3000
        self.named = "; ".join(f"{e.key[:60]} {e.self_device_time_total / 3000:.2f}" for e in events[:6])


def each(s: Scale, report: Report) -> None:
    """Measure per trick the time of a step, and the time that the GPU works in it.

    Where the host is slower than the GPU, the step is its time, which varies; what a trick adds shows in the kernels.
    """
    sets: dict[str, Callable[[], list[Callback]]] = {"nothing": list}
    sets |= {type(t).__name__: lambda i=i: [paper(s.batch_size)[i]] for i, t in enumerate(paper(s.batch_size))}  # type: ignore[misc]
    sets |= {
        "EMA": lambda: [tricks.EMA()],
        "DropPath(0.1)": lambda: [tricks.DropPath(0.1)],
        "L1Penalty": lambda: [tricks.L1Penalty(1e-6)],
        "the paper's seven": lambda: paper(s.batch_size),
    }
    batch, plain = s.batch(), (math.nan, math.nan)
    for name, make in sets.items():
        chosen, kernels = [tricks.ChannelsLast(), *make()], Kernels(12)
        speed, _ = fit_speed(s, chosen, batch)
        if s.device == "cuda":
            trainer_of(s, [*chosen[:1], *make(), kernels]).fit(Net(s.network()), loader([batch] * 15))
        found = 1000 * len(batch[0]) / speed, kernels.busy
        plain = found if name == "nothing" else plain
        print(f"{name}: {kernels.named}", flush=True)
        report(
            f"{name}: ms of a step, and of its kernels", "+0.1, +0.3",
            f"{found[0]:.1f} ({found[0] - plain[0]:+.1f}), {found[1]:.1f} ({found[1] - plain[1]:+.1f})",
        )  # fmt: skip


def precise_bn(s: Scale, report: Report) -> None:
    batches = [s.batch() for _ in range(4)]
    images = torch.cat([b[0] for b in batches])
    data = torch.utils.data.TensorDataset(images, torch.cat([b[1] for b in batches]))
    found: dict[str, float] = {}

    class Measure(Callback):
        @torch.no_grad()
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            layers, loader = batchnorms_of(pl_module), trainer.train_dataloader

            def bare() -> None:
                pl_module.train()
                for batch in batches:
                    with trainer.precision_plugin.forward_context():
                        pl_module(batch[0])

            found.update(
                medians(
                    {
                        "bare": lambda: timed(s, bare),
                        "ours": lambda: timed(s, lambda: go_through(trainer, pl_module, layers, len(images), "train")),
                        "loader": lambda: timed(s, lambda: [None for _ in loader]),
                        "torch": lambda: timed(s, lambda: update_bn(loader, pl_module)),
                    },
                    5,
                    warm=1,
                )
            )
            values = go_through(trainer, pl_module, layers, len(images), "train").values
            found["off"] = reference_off(pl_module, batches, values)
            trainer.should_stop = True

    loader = torch.utils.data.DataLoader(data, s.batch_size)
    trainer_of(s, [tricks.ChannelsLast(), Measure()], max_steps=1).fit(Net(s.network()), loader)
    total = found["bare"] + found["loader"]
    report("PreciseBN against the bare passes, data at hand", "1.10 x", f"{found['ours'] / found['bare']:.3f} x")
    report("PreciseBN against the bare passes and the loader", "1.03 x", f"{found['ours'] / total:.3f} x")
    report("torch update_bn (no autocast) against the bare passes", "3 x", f"{found['torch'] / found['bare']:.2f} x")
    report("PreciseBN's first layer against float64, relative", "below 1e-3 (16 bits)", f"{found['off']:.1e}")


def reference_off(module: Any, batches: list[Batch], values: dict[str, Tensor]) -> float:
    """Compare the first BatchNorm, which follows one convolution, with statistics in float64."""
    first = module.net.conv1
    outputs = [F.conv2d(b[0].double(), first.weight.double(), None, first.stride, first.padding) for b in batches]
    means = torch.stack([o.mean((0, 2, 3)) for o in outputs])
    squares = torch.stack([(o**2).mean((0, 2, 3)) for o in outputs])
    variance = squares.mean(0) - means.mean(0) ** 2
    got = next(v for k, v in values.items() if k.endswith("bn1.running_var"))
    return float(((got.to(variance) - variance) / variance).abs().max())
