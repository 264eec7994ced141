"""Measure the cost of averaging the weights of a ResNet-50, relative to one ``torch._foreach_lerp_``.

    OMP_NUM_THREADS=1 python benchmarks/weights.py --out benchmarks/results/weights.md

All candidates take turns, round by round, in one process; the medians of the rounds are compared.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_tricks.callbacks import EMA, SWA
from lit_tricks.callbacks.averaging.callback import Averaging
from lit_tricks.callbacks.averaging.store import AveragedWeights

DECAY = 0.9999


def candidates() -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Return updates and swaps, each with its own model."""
    updates, swaps = {}, {}

    model = timm.create_model("resnet50")
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    shadows = [tensor.clone() for tensor in tensors]
    updates["one torch._foreach_lerp_"] = lambda: torch._foreach_lerp_(shadows, tensors, 1 - DECAY)

    weights = AveragedWeights(timm.create_model("resnet50"))
    updates["EMA of lit_tricks"] = lambda: weights.update(1 - DECAY)
    updates["SWA of lit_tricks, at the end of a cycle"] = lambda: weights.update(1 / 3)
    swaps["EMA and SWA of lit_tricks"] = lambda: weights.swap(not weights.swapped)

    aside = AveragedWeights(timm.create_model("resnet50"), on_cpu=True)
    updates['EMA of lit_tricks, device="cpu"'] = lambda: aside.update(1 - DECAY)

    timms_model = timm.create_model("resnet50")
    timms = timm.utils.ModelEmaV3(timms_model, decay=DECAY)
    updates["timm ModelEmaV3"] = lambda: timms.update(timms_model)

    torchs_model = timm.create_model("resnet50")
    torchs = AveragedModel(torchs_model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    updates["torch AveragedModel, multi_avg_fn"] = lambda: torchs.update_parameters(torchs_model)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("resnet50")

    module, theirs = Module(), EMAWeightAveraging(decay=DECAY)
    theirs.setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    assert theirs._average_model is not None
    updates["Lightning EMAWeightAveraging"] = lambda: theirs._average_model.update_parameters(module)
    swaps["Lightning EMAWeightAveraging"] = lambda: theirs._swap_models(module)
    return updates, swaps


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def allocated(function: Callable[[], object]) -> int:
    """Return the number of bytes allocated in one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet50")

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(tricks: list[Averaging], image_size: int, batch_size: int, steps: int) -> Trainer:
    data = torch.utils.data.TensorDataset(
        torch.randn(batch_size * steps, 3, image_size, image_size), torch.zeros(batch_size * steps, dtype=torch.long)
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(tricks),
    )  # fmt: skip
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=batch_size))
    return trainer


class Timed:
    """Measures the time of the methods of an object, step by step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def time(self, owner: object, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.steps[-1] += time.perf_counter() - start

        return timed


def share_of_a_step(batch_size: int, steps: int) -> tuple[float, float, float]:
    """Return the seconds of a training step, and of the hooks of EMA and SWA and their optimizer hooks in it."""
    ema, swa, ends = EMA(DECAY), SWA(0.01, start=0, every_n_steps=10**6, validate=False), []
    timed = {ema: Timed(), swa: Timed()}

    class TrainingLength(Callback):
        def on_fit_start(self, *args: object) -> None:  # before the hooks of the tricks
            timed[ema].time(ema, "_on_step", "on_train_batch_end")
            timed[swa].time(swa, "_on_step", "on_train_batch_end", "on_before_optimizer_step")

        def on_train_start(self, *args: object) -> None:
            timed[swa].time(swa._rates, "lend", "give_back")

        def on_train_batch_start(self, *args: object) -> None:
            for one in timed.values():
                one.steps.append(0.0)
            ends.append(time.perf_counter())

    fit([TrainingLength(), ema, swa], 224, batch_size, steps)  # type: ignore[list-item]
    step = statistics.median(b - a for a, b in itertools.pairwise(ends))
    return step, *(statistics.median(timed[trick].steps[1:-1]) for trick in (ema, swa))  # SWA averages after the last


def checkpoint_sizes() -> tuple[int, int]:
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for tricks in ([], [EMA(DECAY)]):
            trainer = fit(tricks, 64, 4, 2)
            trainer.save_checkpoint(Path(folder) / "x.ckpt", weights_only=False)
            sizes.append((Path(folder) / "x.ckpt").stat().st_size)
    return sizes[0], sizes[1]


def report(rounds: int, steps: int) -> str:
    updates, swaps = candidates()
    seconds = interleaved(updates | {f"swap: {name}": swap for name, swap in swaps.items()}, rounds)
    unit = seconds["one torch._foreach_lerp_"]
    size = sum(p.numel() * 4 for p in timm.create_model("resnet50").parameters())
    lines = ["| | x foreach_lerp | ms | bytes allocated / model |", "|---|---|---|---|"]
    for name, function in (updates | {f"swap: {name}": swap for name, swap in swaps.items()}).items():
        kind = name if name.startswith("swap") else f"update: {name}"
        lines.append(
            f"| {kind} | {seconds[name] / unit:.2f} | {1000 * seconds[name]:.2f} | {allocated(function) / size:.2f} |"
        )
    del updates, swaps
    step, ema, swa = share_of_a_step(16, steps)
    without, with_ema = checkpoint_sizes()
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return "\n".join(
        [
            "# Averaging the weights of a ResNet-50 on the CPU",
            "",
            *lines,
            "",
            f"- A training step (batch of 16 at 224 x 224): {step:.2f} s. In it, all hooks included, EMA takes "
            f"{1000 * ema:.1f} ms, {100 * ema / step:.2f} %; SWA {1000 * swa:.2f} ms, {100 * swa / step:.4f} %, and an "
            "update once a cycle.",
            f"- Checkpoint (SGD with momentum): {without / 2**20:.1f} MiB without, {with_ema / 2**20:.1f} MiB with, "
            f"{with_ema / without:.2f} x.",
            "",
            f"Medians of {rounds} rounds in which all candidates take turns, {torch.get_num_threads()} thread(s). "
            f"{model or platform.processor()}, {os.cpu_count()} cores shared with other work (load average "
            f"{os.getloadavg()[0]:.1f} at the end); Python "
            f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}, timm "
            f"{timm.__version__}; {datetime.date.today()}. `OMP_NUM_THREADS={torch.get_num_threads()} python "
            f"benchmarks/weights.py --rounds {rounds}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = report(arguments.rounds, arguments.steps)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
