"""A training process that is killed at a random step, and resumed, ends bit for bit as one that was not."""

from __future__ import annotations

import ast
import functools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fits import differences, logger_class, run
from helpers.modules import BATCHES, lightning
from helpers.warm import server

from lit_tricks.callbacks import EMA, SWA, WarmupCosine
from lit_tricks.callbacks.base import Trick

pl = lightning()
STEPS = 3 * BATCHES  # of a run of ``_fits.run``

TRICKS: dict[str, Callable[[], list[Any]]] = {
    "EMA": lambda: [EMA(0.8)],
    "SWA": lambda: [
        SWA(0.05, start=0.5, anneal_epochs=1),
        WarmupCosine(warmup_epochs=1),
        EMA(0.5, validate=False, device="cpu"),
    ],
}


class Die(pl.Callback):
    """Kills the process in a hook of a batch, as a machine that fails does."""

    def __init__(self, hook: str, batches: int) -> None:
        self.batches = batches
        setattr(self, hook, self.die)

    def die(self, *args: Any) -> None:
        self.batches -= 1
        if self.batches < 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Diary(logger_class("lightning")):  # type: ignore[misc]
    """Writes metrics down as they come."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        with self.path.open("a") as file:
            file.write(f"{(step, metrics)}\n")

    def read(self) -> list[tuple[int, dict[str, float]]]:
        return [ast.literal_eval(line) for line in self.path.read_text().splitlines()]


@functools.cache
def full_run(name: str) -> Any:
    return run(*TRICKS[name]())


def fit(folder: Path, name: str, seed: int, *callbacks: Any) -> Any:
    last = folder / "last.ckpt"
    saver = pl.callbacks.ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=1)
    callbacks = (*callbacks, *TRICKS[name]())
    order = random.Random(seed).sample(callbacks, len(callbacks))
    how = {"enable_checkpointing": True, "logger": Diary(folder / "metrics")}
    return run(*order, saver, ckpt_path=last if last.exists() else None, **how)


def fit_and_die(folder: Path, name: str, seed: int) -> None:
    torch.set_num_threads(1)  # as in the tests
    draw = random.Random(seed)
    hook = draw.choice(["on_train_batch_start", "on_after_backward", "on_before_zero_grad", "on_train_batch_end"])
    fit(folder, name, seed, Die(hook, draw.randrange(1, STEPS)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forks of a server, or each would import for seconds")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:SWA averages the statistics of the BatchNorm layers")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", TRICKS)
def test_a_run_that_is_killed_ends_as_one_that_is_not(name, seed, tmp_path):
    child = server().Process(target=fit_and_die, args=(tmp_path, name, seed))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    resumed, full = fit(tmp_path, name, seed), full_run(name)
    assert not differences(resumed.weights, full.weights)
    assert not differences(resumed.optimizers, full.optimizers)
    states = [
        {c.state_key: c.state_dict() for c in r.trainer.callbacks if isinstance(c, Trick)} for r in (resumed, full)
    ]
    assert not differences(*states)
    written = Diary(tmp_path / "metrics").read()
    assert {step for step, _ in written} == set(full.logged)
    for step, metrics in written:
        assert not differences(metrics, {key: full.logged[step][key] for key in metrics}), step
