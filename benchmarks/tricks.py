"""Measure what each trick costs in a training step of a ResNet-50: CPU time, as a share of the step, and memory.

    OMP_NUM_THREADS=1 python benchmarks/tricks.py --out benchmarks/results/tricks.md

Whole steps with and without a trick cannot be compared to 2 % on a machine that does other work: two runs without a
trick differ by 7 %. So the work of a trick is timed where it is done: in its hooks; in its part of the loss, forward
and backward, against the same loss of plain labels; in the branches that DropPath drops, twice, for their backward; and
in the methods that Lookahead and Muon put around schedulers and optimizers. Lookahead acts in every fifth step, so its
row is a mean, of a multiple of five steps. The update of Muon replaces a step of SGD, which is not subtracted.

Memory is the size of all tensors which are alive after a step, compared with a run without the trick. The images are
small, so that it does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import schedulefree
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_tricks import callbacks
from lit_tricks.callbacks import drop_path
from lit_tricks.callbacks.soft_targets.target import SoftTarget

COUNTS = list(range(1, 1001))  # the images of the benchmark are of few classes
MAKE: dict[str, Callable[[], Callback]] = {
    "ClassBalanced": lambda: callbacks.ClassBalanced(counts=COUNTS),
    "FixRes": lambda: callbacks.FixRes(test_size=None),
    "Freeze": lambda: callbacks.Freeze(["layer4"]),
    "KnowledgeDistillation": lambda: callbacks.KnowledgeDistillation(timm.create_model("resnet50")),
    "LinearScaling": lambda: callbacks.LinearScaling(base_batch_size=256),
    "LogitAdjustment": lambda: callbacks.LogitAdjustment(counts=COUNTS),
    "SWA": lambda: callbacks.SWA(lr=0.01, start=0.0),
    "Unfreeze": lambda: callbacks.Unfreeze({"layer4": 1}),
    "WarmupCosine": lambda: callbacks.WarmupCosine(warmup_epochs=1),
    "WarmupExponential": lambda: callbacks.WarmupExponential(gamma=0.94, every_n_epochs=1, warmup_epochs=1),
    "WarmupStep": lambda: callbacks.WarmupStep(milestones=[2], warmup_epochs=1),
}
# They trade time, so their cost is not overhead: freezing.py measures what freezing saves.
ASIDE = {"ChannelsLast", "Compile", "FixRes", "Freeze", "KnowledgeDistillation", "Muon", "Unfreeze", "WhitenedStem"}
PERIODIC = {"Lookahead"}  # in some steps only
WORK = {"_changed", "_around_schedulers", "_after_step"}  # methods with the work of a trick that are no hooks
PAPER = ("LinearScaling", "WarmupCosine", "ZeroGamma", "XavierInit", "NoBiasDecay", "LabelSmoothing", "MixUp")
EXPECTED = {  # % of a step, from passes over weights (EMA, L1Penalty) and activations (DropPath), not from runs
    "EMA": 1, "DropPath": 2, "L1Penalty": 2, "KnowledgeDistillation": 33, "NoBiasDecay": 0.2,
    "CutMix": 0.2, "MixUp": 0.2, "LabelSmoothing": 0.1, "LogitAdjustment": 0.1, "ClassBalanced": 0.2,
    "BinaryCrossEntropy": 0.2, "FocalLoss": 0.2, "GeneralizedCrossEntropy": 0.2, "the paper's seven, and EMA": 1.6,
    "Lookahead": 0.5, "Muon": 58, "all tricks that can be combined": 6,  # Muon with 16 images of 224 pixels
}  # fmt: skip
UNMEASURED = {  # they do nothing in a step
    "Compile",  # before the fit
    "PreciseBN",  # between epochs, see precise_bn.py
    "TemperatureScaling",  # in validation, and after the fit
}
CONFLICTING = {  # with WarmupCosine, EMA, KnowledgeDistillation and LogitAdjustment
    "WarmupExponential", "WarmupLinear", "WarmupPoly", "WarmupStableDecay", "WarmupStep", "SWA", "Lookahead",
    "BinaryCrossEntropy", "ClassBalanced", "ScheduleFree",
}  # fmt: skip


def make(name: str) -> Callback:
    return MAKE.get(name, getattr(callbacks, name))()


def candidates() -> dict[str, list[str]]:
    """Return the tricks of each run by its name."""
    rows = {name: [name] for name in callbacks.__all__ if name not in UNMEASURED}
    rows["the paper's seven, and EMA"] = [*PAPER, "EMA"]
    left_out = ASIDE | CONFLICTING | UNMEASURED
    rows["all tricks that can be combined"] = [name for name in callbacks.__all__ if name not in left_out]
    return rows


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("resnet50", zero_init_last=False)
        self.schedule_free = False  # whether the optimizer is

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # of ScheduleFree's estimate
        return self.net(images)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.schedule_free:
            return schedulefree.SGDScheduleFree(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)


class TrainingLength(Callback):
    """Measures steps, and the share of the tricks in them. It must be the last callback."""

    def __init__(self, tricks: list[Callback]) -> None:
        self.depth, self.inside, self.start = 0, 0.0, 0.0
        self.steps: list[float] = []
        self.shares: list[float] = []  # seconds of the tricks in each step
        for trick in tricks:
            for name in dir(type(trick)):
                method = getattr(type(trick), name)
                if (name.startswith("on_") or name in WORK) and method.__module__.startswith("lit_tricks"):
                    setattr(trick, name, self.timed(getattr(trick, name)))

    def timed(self, function: Callable[..., Any], times: int = 1) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                self.inside += times * (time.process_time() - start) if not self.depth else 0

        return call

    def loss(self, target: torch.Tensor) -> float:
        """Return the extra seconds of the loss and gradient with a soft target instead of labels."""
        took = []
        for labels in (target, target.parts["value"]) if isinstance(target, SoftTarget) else ():
            logits = torch.randn(len(labels), 1000, requires_grad=True)
            start = time.process_time()
            F.cross_entropy(logits, labels).backward()
            took.append(time.process_time() - start)
        return took[0] - took[1] if took else 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.start:
            self.steps.append(time.process_time() - self.start)
            self.shares.append(self.inside + self.loss(batch[1]))
        self.inside, self.start = 0.0, time.process_time()


class Memory(Callback):
    """Adds up the bytes of all tensors that are alive after a step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self.bytes = sum(storages.values())


def kept(names: list[str]) -> float:
    """Return the MB of the tensors that are alive after a step with these tricks."""
    module, memory = Classifier(), Memory()
    module.schedule_free = "ScheduleFree" in names
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8))
    trainer = Trainer(
        max_epochs=3, max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*map(make, names), memory],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    return memory.bytes / 1e6


def measure(names: list[str], image_size: int, batch_size: int, steps: int, module: Classifier) -> tuple[float, float]:
    """Return the median seconds of a step, and of the tricks in it."""
    tricks, size = list(map(make, names)), batch_size * (steps + 1)
    module.schedule_free = "ScheduleFree" in names
    clock, drop = TrainingLength(tricks), drop_path.drop_path
    data = torch.utils.data.TensorDataset(torch.randn(size, 3, image_size, image_size), torch.arange(size) % 1000)
    trainer = Trainer(
        max_epochs=3, max_steps=steps + 1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*tricks, clock],
    )  # fmt: skip
    drop_path.drop_path = clock.timed(drop, times=2)
    try:
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=batch_size))
    finally:
        drop_path.drop_path = drop
    center = statistics.fmean if PERIODIC & set(names) else statistics.median
    return statistics.median(clock.steps), center(clock.shares)


def report(image_size: int, batch_size: int, steps: int) -> str:
    before = os.getloadavg()[0]
    module = Classifier()
    start = copy.deepcopy(module.state_dict())
    missing = [work for work in WORK if not any(hasattr(getattr(callbacks, name), work) for name in callbacks.__all__)]
    assert not missing, f"no trick has the method {missing[0]}: its work would not be timed"
    lines, plain = ["| | ms (lower is better) | % of a step | expected % | memory in MB |", "|---|---|---|---|---|"], []
    without = kept([])
    weights = sum(weight.nbytes for weight in start.values()) / 1e6
    for name, names in candidates().items():
        module.load_state_dict(start)
        step, inside = measure(names, image_size, batch_size, steps, module)
        step -= inside
        plain.append(step)
        extra = kept(names) - without
        cells = [f"{1000 * inside:.1f}", f"{100 * inside / step:.2f}", str(EXPECTED.get(name, 0)), str(round(extra))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    return "\n".join(
        [
            "# Cost of the tricks in a training step of a ResNet-50 on the CPU",
            "",
            *lines,
            "",
            f"Memory: tensors that are kept between steps, next to the weights, which take {weights:.0f} MB. Freeze "
            "and Unfreeze freeze layer4. The teacher is another ResNet-50, of which KnowledgeDistillation trains with "
            "a copy.",
            "",
            f"A step without tricks (batch of {batch_size} at {image_size} x {image_size}, SGD): "
            f"{statistics.median(plain):.2f} s of CPU time. Medians of {steps} steps, "
            f"{torch.get_num_threads()} thread(s). {model or platform.processor()}, {os.cpu_count()} cores shared with "
            f"other work, load average {before:.1f} before and {os.getloadavg()[0]:.1f} after; Python "
            f"{platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}, timm "
            f"{timm.__version__}; {datetime.date.today()}. `OMP_NUM_THREADS={torch.get_num_threads()} python "
            f"benchmarks/tricks.py --image-size {image_size} --batch-size {batch_size} --steps {steps}`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    text = report(arguments.image_size, arguments.batch_size, arguments.steps)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
