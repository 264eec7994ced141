"""Parts of gpu.py: averages against references, host syncs, 16-mixed, resuming, recompilation."""

from __future__ import annotations

import copy
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.utils
import torch
from gpu_common import Net, Report, Scale, loader, medians, paper, synchronize, timed, trainer_of
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_tricks import callbacks as tricks
from lit_tricks.callbacks.averaging.callback import Averaging
from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.callbacks.ema import ema_decay


def updates_of(s: Scale) -> dict[str, Callable[[], object]]:
    """Return per average a function that updates it. Each average has its own model."""

    def network() -> nn.Module:
        return s.network().to(s.device)

    base = network()
    tensors = [t.detach() for t in [*base.parameters(), *base.buffers()] if t.is_floating_point()]
    shadows = [t.clone() for t in tensors]
    weights = AveragedWeights(network())
    models = [network() for _ in range(3)]
    timms = timm.utils.ModelEmaV3(models[0], decay=0.9999)
    torchs = AveragedModel(models[1], multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    lightnings = EMAWeightAveraging(decay=0.9999)
    module = Net(models[2])
    lightnings.setup(None, module, "fit")  # type: ignore[arg-type]
    average = lightnings._average_model
    assert average is not None
    return {
        "one foreach_lerp": lambda: torch._foreach_lerp_(shadows, tensors, 1e-4),
        "EMA of lit_tricks": lambda: weights.update(1e-4),
        "timm ModelEmaV3": lambda: timms.update(models[0]),
        "torch AveragedModel": lambda: torchs.update_parameters(models[1]),
        "Lightning EMAWeightAveraging": lambda: average.update_parameters(module),
    }


def ema(s: Scale, report: Report) -> None:
    updates = updates_of(s)
    weights = AveragedWeights(s.network().to(s.device))
    aside = AveragedWeights(s.network().to(s.device), on_cpu=True)
    candidates = updates | {"swap": lambda: weights.swap(not weights.swapped)}
    took = medians({name: lambda u=u: timed(s, u) for name, u in candidates.items()}, 20, 3)  # type: ignore[misc]
    unit = took.pop("one foreach_lerp")
    report("one foreach_lerp, its launches included", "0.3 ms", f"{1000 * unit:.3f} ms")
    expected = {"EMA of lit_tricks": "1.1 x", "timm ModelEmaV3": "2 x", "torch AveragedModel": "2 x", "swap": "1 x"}
    for name, seconds in took.items():
        what = "swap of EMA (no kernel, host time)" if name == "swap" else f"update, {name}"
        report(f"{what}, x foreach_lerp", expected.get(name, "20 x"), f"{seconds / unit:.2f} x")
    pinned = all(t.is_pinned() for t in aside._arriving) if s.device == "cuda" else False
    report('EMA(device="cpu"): its copies are pinned', "True", str(pinned))
    synchronize(s.device)
    start = time.perf_counter()
    aside.update(0.5)
    queued = time.perf_counter() - start
    synchronize(s.device)
    report('EMA(device="cpu"): the host is free after', "2 ms", f"{1000 * queued:.2f} ms")
    start = time.perf_counter()
    aside.finish()
    report('EMA(device="cpu"): averaging on the CPU', "15 ms", f"{1000 * (time.perf_counter() - start):.1f} ms")
    report("EMA on the device and on the CPU in one fit, largest difference", "below 1e-6", f"{two_averages(s):.1e}")


def launches(s: Scale, report: Report) -> None:
    counts = {name: launched(s, update) for name, update in updates_of(s).items()}
    unit = counts.pop("one foreach_lerp")
    report("launches of one foreach_lerp", "4", str(unit))
    expected = {"EMA of lit_tricks": "+0", "timm ModelEmaV3": "+60", "torch AveragedModel": "+60"}
    for name, count in counts.items():
        report(f"launches of an update, {name}, above that", expected.get(name, "+900"), f"{count - unit:+d}")


def launched(s: Scale, function: Callable[[], object]) -> int:
    """Count kernels and copies of a call after the first call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if s.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(2):
        with torch.profiler.profile(activities=activities) as profile:
            function()
            synchronize(s.device)
    names = ("LaunchKernel", "MemcpyAsync", "MemsetAsync")
    return sum(event.count for event in profile.key_averages() if any(name in event.key for name in names))


class Syncs(Callback):
    """Counts how often the host waits for the GPU in four steps. It must be the first callback."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda" and batch_idx in (4, 8):
            torch.cuda.set_sync_debug_mode("warn" if batch_idx == 4 else "default")


def syncs(s: Scale, report: Report) -> None:
    def count(precision: str, *chosen: Callback) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            net, data = Net(s.little.network()), loader([s.little.batch(16)] * 9)
            trainer_of(s, [Syncs(), *chosen], precision=precision).fit(net, data)
        found = [w for w in caught if "synchroniz" in str(w.message)]
        places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in found})
        return f"{len(found) / 4:g} " + " ".join(places[:4])

    scaled = "16-mixed" if s.device == "cuda" else "bf16-mixed"
    report("host syncs a step, no trick, bf16-mixed", "0", count("bf16-mixed"))
    report("host syncs a step, no trick, 16-mixed (its scaler)", "1", count(scaled))
    teacher = tricks.KnowledgeDistillation(s.little.network())
    single = [
        tricks.WarmupCosine(warmup_epochs=0.1), tricks.LabelSmoothing(), tricks.MixUp(), tricks.CutMix(),
        tricks.FocalLoss(), teacher, tricks.EMA(), tricks.SWA(lr=0.01, start=0), tricks.DropPath(), tricks.L1Penalty(),
        tricks.ChannelsLast(),
    ]  # fmt: skip
    for trick in single:
        report(f"host syncs a step, {type(trick).__name__}, bf16-mixed", "0", count("bf16-mixed", trick))
    report("host syncs a step, the paper's seven and EMA", "0", count("bf16-mixed", *paper(16), tricks.EMA()))


def two_averages(s: Scale) -> float:
    small = s.little
    here = tricks.EMA(0.9, name="here", validate=False)
    there = tricks.EMA(0.9, name="there", validate=False, device="cpu")
    trainer_of(small, [here, there]).fit(Net(small.network(), lr=0.1), loader([small.batch(16)] * 8))
    both = [trick.state_dict()["average"] for trick in (here, there)]
    return max(float((both[0][k].cpu() - both[1][k].cpu()).abs().max()) for k in both[1])


class Reference(Callback):
    """Follows EMA and SWA in float64, from the weights after each step that was not skipped."""

    def __init__(self, decay: float) -> None:
        self.decay, self.skipped, self.rates = decay, 0, []
        self.average: list[Tensor] = []
        self.visited: list[list[Tensor]] = []  # at the ends of steps
        self.updates = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        now = [p.detach() for p in pl_module.parameters()]
        self.visited.append([p.double() for p in now])
        if all(torch.equal(a, b) for a, b in zip(now, self.before, strict=True)):
            self.skipped += 1
            return
        keep = ema_decay(self.decay, self.updates) if self.updates else 0.0
        self.average = [keep * a + (1 - keep) * p.double() for a, p in zip(self.average or now, now, strict=True)]
        self.updates += 1


def scaler(s: Scale, report: Report) -> None:
    """Train in 16-mixed from a loss scale that is too high. Steps are skipped at the start and after growth."""
    small = s.little

    def fit(trick: Averaging, reference: Reference) -> Net:
        seed_everything(0, verbose=False)
        grad_scaler = torch.amp.GradScaler(s.device, init_scale=2.0**32, growth_interval=3)
        plugin = MixedPrecision("16-mixed", s.device, grad_scaler)
        module = Net(small.network(), lr=0.05)
        schedule = tricks.WarmupCosine(warmup_epochs=0.2)
        trainer_of(small, [reference, schedule, trick], plugins=[plugin]).fit(module, loader([small.batch(16)] * 60))
        return module

    reference = Reference(0.95)
    trick = tricks.EMA(0.95)
    module = fit(trick, reference)
    off = distance(list(module.parameters()), reference.average)
    report("skipped steps (scale 2^32, growing every 3)", "about 25 of 60", f"{reference.skipped} of 60")
    report("EMA's updates, and steps not skipped", "equal", f"{trick._updates} and {reference.updates}")
    report("EMA against float64 of the steps not skipped", "below 1e-6", f"{off:.1e}")
    form = [0.05 * (i + 1) / 12 if i < 12 else 0.025 * (1 + math.cos(math.pi * (i - 12) / 48)) for i in range(60)]
    worst = max(abs(a - b) for a, b in zip(reference.rates, form, strict=True))
    report("WarmupCosine against its closed form, skipped steps counted", "below 1e-12", f"{worst:.1e}")
    reference = Reference(0.95)
    module = fit(tricks.SWA(lr=0.01, start=0.5, every_n_steps=5), reference)
    ends = [reference.visited[i] for i in range(34, 60, 5)]
    mean = [torch.stack(values).mean(0) for values in zip(*ends, strict=True)]
    off = distance(list(module.parameters()), mean)
    report("SWA of 6 cycles against float64", "below 1e-6", f"{off:.1e}, {reference.skipped} steps skipped")


def distance(tensors: list[Any], reference: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of the tensor."""
    pairs = zip(tensors, reference, strict=True)
    return max(float((t.detach().to(r) - r).abs().max() / r.abs().max().clamp(min=1e-3)) for t, r in pairs)


def resume(s: Scale, report: Report) -> None:
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    small = s.little
    seed_everything(0, verbose=False)
    batches = [small.batch(32)] * 8  # equal batches, since a plain loader restarts the epoch on resume
    chosen = lambda: [*paper(32), tricks.EMA(0.9), tricks.ChannelsLast(), tricks.DropPath(0.1)]  # noqa: E731

    def fit(epochs: int, ckpt: Path | None, save: Path | None) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        module, extra = Net(small.network(), 0.05), []
        if save:
            extra = [ModelCheckpoint(save, filename="x", every_n_train_steps=11, save_top_k=-1)]
        trainer = trainer_of(small, [*chosen(), *extra], epochs, enable_checkpointing=bool(save))
        trainer.fit(module, loader(batches), ckpt_path=str(ckpt) if ckpt else None)
        return copy.deepcopy(module.state_dict())

    with tempfile.TemporaryDirectory() as folder:
        whole = fit(2, None, Path(folder))
        same = all(torch.equal(v, whole[k]) for k, v in fit(2, None, None).items())
        report("two runs alike, bit for bit (16-mixed, deterministic cuDNN)", "True", str(same))
        again = fit(2, Path(folder) / "x.ckpt", None)
    off = [k for k, v in again.items() if not torch.equal(v, whole[k])]
    report(
        "resumed within an epoch, bit for bit: paper's seven, EMA, DropPath",
        "True",
        str(not off) + f" {off[:2]}" * bool(off),
    )


def distillation(s: Scale, report: Report) -> None:
    """Count the graphs of a compiled student and teacher under mixup, after the second step and at the end."""
    from torch._dynamo.utils import counters

    small = s.little
    counted: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            counted.append(counters["stats"]["unique_graphs"])

    backend = "inductor" if s.device == "cuda" else "eager"
    seed_everything(0, verbose=False)
    teacher = tricks.KnowledgeDistillation(small.network(), channels_last=True, compiled=s.device == "cuda")
    chosen = [teacher, tricks.MixUp(), tricks.LabelSmoothing(), tricks.EMA(), tricks.ChannelsLast()]
    trainer = trainer_of(small, [*chosen, tricks.Compile(backend=backend), Count()])
    start = time.perf_counter()
    trainer.fit(Net(small.network()), loader([small.batch(64)] * 12))
    took = time.perf_counter() - start
    report(
        "distillation, mixup and EMA compiled: graphs after step 2 and step 12",
        "2 and 2",
        f"{counted[1]} and {counted[-1]}",
    )
    report("seconds of that fit", "40 s", f"{took:.0f} s")
