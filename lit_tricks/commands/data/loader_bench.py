"""``lit-tricks data bench``: find out whether the data or the model limits the speed of training.

One caveat: in training on a CPU, loader and model share the cores, so each is faster by itself than with the other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_tricks._compat import callbacks_of
from lit_tricks.commands.progress import progress
from lit_tricks.utils.batch import tensors_in
from lit_tricks.utils.cpu_seconds import cpu_seconds
from lit_tricks.utils.files import write_whole
from lit_tricks.utils.log import log

__all__ = ["bench"]


WARM_UP = 3  # steps of the model
Advance = Callable[[float], None]


def bench(
    data: LightningDataModule,
    model: LightningModule | None = None,
    trainer: Trainer | None = None,
    out: str = "bench.json",
    seconds: float = 10.0,
) -> Path:
    """Measure the loader of the training data, the model, and both together, on one device.

    The model trains on one batch repeatedly, including transforms on the device and all callbacks except checkpoints.
    No result of the training is kept, and no run folder is made.

    Args:
        data: the data.
        model: the model; without a model or a Trainer, only the loader is measured.
        trainer: the Trainer.
        out: JSON file to write.
        seconds: for each of the three measurements, above 0.

    Returns:
        The path of the file.

    Raises:
        ValueError: if ``seconds`` is not above 0.
        FileNotFoundError: if the folder of ``out`` does not exist.
        RuntimeError: if the training data has no batch.
    """
    path = Path(out)
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"--out {out} lies in a folder that does not exist: make it first.")
    if not seconds > 0:
        raise ValueError(f"--seconds={seconds} is not above 0; 10 to 60 do.")
    stages = 1 if model is None or trainer is None else 3
    with progress("data bench", stages * seconds) as advance:
        result = _loader_alone(data, trainer, seconds, advance)
        if model is not None and trainer is not None:
            result |= _trained(data, model, trainer, seconds, advance)
            result["limit"] = "data" if result["loader"] < result["model"] else "model"
    write_whole(path, json.dumps(result, indent=2) + "\n")
    _tell(result)
    log.info("written to %s", path)
    return path


def _loader_alone(
    data: LightningDataModule, trainer: Trainer | None, seconds: float, advance: Advance
) -> dict[str, Any]:
    data.trainer = trainer  # some loaders make their batches on its device
    device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batches = _endless(loader)
    batch_size = _size(next(batches))  # until here workers start
    _wait(device)
    start, cpu, images = time.perf_counter(), cpu_seconds(), 0
    last = start
    while last - start < seconds:
        images += _size(next(batches))
        now = time.perf_counter()
        advance(now - last)
        last = now
    _wait(device)
    last, used = time.perf_counter(), cpu_seconds() - cpu
    return {
        "batch_size": batch_size,
        "num_workers": getattr(loader, "num_workers", 0),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "loader": images / (last - start),
        "loader_per_core": images / used,
    }


def _endless(loader: Any) -> Iterator[Any]:
    for epoch in range(2**31):
        if hasattr(getattr(loader, "sampler", None), "set_epoch"):
            loader.sampler.set_epoch(epoch)
        count = 0
        for batch in loader:
            count += 1
            yield batch
        if not count:
            raise RuntimeError("the loader of the training data has no batch: see its batch size and drop_last.")


def _size(batch: Any) -> int:
    return next((len(tensor) for _, tensor in tensors_in(batch)), 1)


class _DoneError(Exception):
    """Not an error: all is measured, and the fit may end."""


class _Clock(Callback):
    """Measures the model on one repeated batch, then the model with the loader.

    Args:
        seconds: seconds per measurement.
        advance: function that is called each second.
    """

    def __init__(self, seconds: float, advance: Advance) -> None:
        self.seconds, self.advance = seconds, advance
        self.images = {"model": 0, "together": 0}
        self.times = {"model": 0.0, "together": 0.0}
        self.stage = "model"
        self.skip = WARM_UP
        self.prefetched = 0
        self.last: float | None = None

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches of the Trainer for one epoch."""
        for batch in batches:
            yield batch
            while self.stage == "model":
                yield batch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.skip:
            self.skip -= 1
            if self.skip == 0:
                _wait(pl_module.device)
                self.last = time.perf_counter()
            return
        now = time.perf_counter()
        if self.last is not None:
            if self.times[self.stage] + now - self.last >= self.seconds:
                _wait(pl_module.device)  # for what the device still has to do
                now = time.perf_counter()
            self._add(now - self.last, _size(batch))
        self.last = now

    def _add(self, seconds: float, images: int) -> None:
        self.times[self.stage] += seconds
        self.images[self.stage] += images
        self.advance(seconds)
        if self.times[self.stage] >= self.seconds:
            if self.stage == "together":
                raise _DoneError
            self.stage = "together"
            self.skip = WARM_UP + self.prefetched  # what workers have loaded meanwhile


def _trained(
    data: LightningDataModule, model: LightningModule, trainer: Trainer, seconds: float, advance: Advance
) -> dict[str, Any]:
    clock = _Clock(seconds, advance)
    make_loader, own = data.train_dataloader, {k: v for k, v in vars(data).items() if k == "train_dataloader"}

    def train_dataloader() -> Any:
        loader = make_loader()
        if not isinstance(loader, DataLoader):
            raise RuntimeError(f"train_dataloader gives a {type(loader).__name__}: data bench needs a DataLoader.")
        kind: Any = type(loader)
        clock.prefetched = loader.num_workers * (loader.prefetch_factor or 0)
        # a loader with the attributes of the original, for tricks that read its batch size
        loader.__class__ = type(kind.__name__, (kind,), {"__iter__": lambda self: clock.iterate(kind.__iter__(self))})
        return loader

    callbacks = callbacks_of(trainer)
    callbacks.append(clock)
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 10**6, -1
    data.train_dataloader = train_dataloader  # type: ignore[method-assign]
    try:
        trainer.fit(model, data)
    except _DoneError:
        pass
    finally:
        callbacks.remove(clock)
        del data.train_dataloader  # as before, of the class or its own
        vars(data).update(own)
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name} | {stage: clock.images[stage] / clock.times[stage] for stage in clock.times}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _tell(result: dict[str, Any]) -> None:
    how = f"{result['num_workers']} workers on {result['cores']} cores; a core busy all the time"
    log.info("only loader:   %8.0f images/s (%s: %.0f)", result["loader"], how, result["loader_per_core"])
    if "model" not in result:
        return
    log.info("only model:    %8.0f images/s on %s", result["model"], result["device"])
    log.info("both together: %8.0f images/s", result["together"])
    ratio = result["loader"] / result["model"]
    if result["limit"] == "data":
        log.info("The data limits the run: the loader feeds %.2f of such a device. More num_workers, cores, or", ratio)
        log.info("images that are stored smaller would make it faster.")
    else:
        log.info("The model limits the run: the loader could feed %.1f such devices.", ratio)
