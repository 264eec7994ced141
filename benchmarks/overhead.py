"""CPU time that Lightning, logging and each callback of recipes/cifar10_fast add to a training step.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --out benchmarks/results/overhead.md

A network of 2 channels trains on batches of 2 random images, so that overhead is most of a step. The runs take turns.
Then the recipe makes a few steps at its own size.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from evidence_data import Images
from evidence_report import machine
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lit_tricks import Classifier, callbacks
from lit_tricks.models import small_vgg
from lit_tricks.utils.config_files import CONFIGS

CONFIG = yaml.safe_load((CONFIGS / "recipes" / "cifar10_fast.yaml").read_text())
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.85, nesterov=True)
TINY, BATCH, WARMUP = {"width": 1 / 32}, 2, 10  # the first steps are not counted


class Steps(Callback):
    """Notes the CPU time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.process_time())


class Bare(LightningModule):
    """A module that logs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_vgg(10, **TINY)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SGD(self.model.parameters())


def images(batch_size: int, steps: int) -> Any:
    """Return the recipe's data module with random images, for one epoch."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (batch_size * steps, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(len(pixels)) % 10
    data = {"train_x": pixels, "train_y": labels, "val_x": pixels[:20], "val_y": labels[:20]}
    arguments = CONFIG["data"]["init_args"] | {"batch_size": batch_size}
    return Images.of(data, **{k: v for k, v in arguments.items() if k not in ("root", "val_size")})


def loop(steps: int) -> list[float]:
    """Train without Lightning. Return the times at which steps ended."""
    datamodule = images(BATCH, steps)
    datamodule.setup("fit")
    module, ends = Bare(), []
    optimizer = module.configure_optimizers()
    for index, batch in enumerate(datamodule.train_dataloader()):
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
        ends.append(time.process_time())
    return ends


def fit(module: LightningModule, tricks: list[Any], steps: int, batch_size: int = BATCH, **options: Any) -> list[float]:
    """Train with a Trainer. Return the times at which steps ended."""
    clock = Steps()
    trainer = Trainer(
        **{"logger": False, "enable_progress_bar": False, "log_every_n_steps": 50, **options}, accelerator="cpu",
        max_epochs=1, callbacks=[*tricks, clock], enable_checkpointing=False, enable_model_summary=False,
        limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=images(batch_size, steps))
    return clock.ends


def classifier(arguments: dict[str, Any], optimizer: Any = SGD) -> Classifier:
    """Return the module of the command line."""
    return Classifier("small_vgg", 10, model_args=arguments, optimizer=optimizer, input_size=(3, 32, 32))


def trick(entry: dict[str, Any]) -> Any:
    """Return a callback of the recipe."""
    return getattr(callbacks, entry["class_path"])(**entry.get("init_args", {}))


def candidates(steps: int, folder: str) -> dict[str, tuple[str, Callable[[], list[float]]]]:
    """Return runs by their names, each with the name of the run that it is compared with."""
    plain, base = "loop of torch", "`Classifier`, which logs the loss, no logger"
    bare = "Trainer, a module that logs nothing"
    entries = CONFIG["trainer"]["callbacks"]

    def run(tricks: list[Any], **options: Any) -> Callable[[], list[float]]:
        return lambda: fit(classifier(TINY), [trick(entry) for entry in tricks], steps, **options)

    def logged(every: int, tricks: list[Any] | None = None) -> Callable[[], list[float]]:
        return lambda: run(tricks or [], logger=CSVLogger(folder), log_every_n_steps=every)()

    return {
        plain: (plain, lambda: loop(steps)),
        bare: (plain, lambda: fit(Bare(), [], steps)),
        base: (bare, run([])),
        "`CSVLogger` every 50 steps": (base, logged(50)),
        "`CSVLogger` every step": (base, logged(1)),
        "progress bar": (base, run([], enable_progress_bar=True)),
        **{f"`{entry['class_path']}`": (base, run([entry])) for entry in entries},
        "all callbacks of the recipe": (base, run(entries)),
        "all callbacks, with `CSVLogger` every 50 steps": ("`CSVLogger` every 50 steps", logged(50, entries)),
        "all callbacks, with `CSVLogger` every step": ("`CSVLogger` every step", logged(1, entries)),
    }  # fmt: skip


def per_step(ends: list[float]) -> float:
    """Return the milliseconds of a step, with the steps that log or draw."""
    return 1e3 * (ends[-1] - ends[WARMUP]) / (len(ends) - 1 - WARMUP)


def recipe(steps: int) -> float:
    """Return the milliseconds of a step of the recipe at its own size."""
    model = copy.deepcopy(CONFIG["model"]["init_args"])
    optimizer = partial(torch.optim.SGD, **model["optimizer"]["init_args"])
    tricks = [trick(entry) for entry in CONFIG["trainer"]["callbacks"]]
    size = CONFIG["data"]["init_args"]["batch_size"]
    ends = fit(classifier(model["model_args"], optimizer), tricks, steps, size, precision="bf16-mixed")
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(ends))


def report(rounds: int, steps: int, whole_steps: int) -> str:
    """Return the table in Markdown."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        runs = candidates(steps, folder)
        for _ in range(rounds):
            for name, (_, run) in runs.items():
                found.setdefault(name, []).append(per_step(run()))
        whole = recipe(whole_steps)
    rows = []
    for name, (against, _) in runs.items():
        more = statistics.median(a - b for a, b in zip(found[name], found[against], strict=True))
        rows.append(
            f"| {name} | {against} | {statistics.median(found[name]):.2f} | {more:+.2f} | {100 * more / whole:+.3f} |"
        )
    return "\n".join(
        [
            "# Overhead of a training step",
            "",
            "| run | compared with | ms of CPU per step | difference in ms | % of the recipe's step |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"A step of `recipes/cifar10_fast` at its own size takes {whole:,.0f} ms of CPU, on one thread. The other "
            f"runs train a `small_vgg` of 2 channels in batches of 2: medians of {rounds} runs of {steps} steps each.",
            "",
            f"{machine('cpu')}. `OMP_NUM_THREADS=1 python benchmarks/overhead.py --rounds {rounds} --steps {steps}`",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of the table")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--whole-steps", type=int, default=4, help="steps at the recipe's own size")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # advice about workers and logging
    text = report(args.rounds, args.steps, args.whole_steps)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
