"""Short runs of the Trainer, and their comparison, bit by bit."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers import once as _once  # noqa: F401
from helpers.modules import eval_loader, lightning, module_class, sgd, train_loader
from lit_tricks.callbacks.base import Trick


@functools.cache
def logger_class(namespace: str) -> type[Any]:
    """A logger that keeps what it is given: ``metrics[step][name]``."""

    class Memory(lightning(namespace).loggers.logger.Logger):  # type: ignore[misc]
        name, version = "memory", 0

        def __init__(self) -> None:
            super().__init__()
            self.metrics: dict[int, dict[str, float]] = {}

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert step is not None
            self.metrics.setdefault(step, {}).update(metrics)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Memory


def make_trainer(*callbacks: Any, namespace: str = "lightning", **kwargs: Any) -> Any:
    """A quiet Trainer on the CPU: 3 epochs, every step logged, in memory."""
    precision = kwargs.pop("precision", None)
    if precision == "16-mixed":  # on the CPU it wants a scaler of the CPU; this one's first steps overflow: skipped
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)
        plugin = lightning(namespace).plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        kwargs["plugins"] = [plugin]
    elif precision:
        kwargs["precision"] = precision
    defaults = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": logger_class(namespace)(),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning(namespace).Trainer(callbacks=list(callbacks), **(defaults | kwargs))


@dataclass
class Result:
    """The results of a run."""

    trainer: Any
    module: Any
    weights: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]
    tricks: list[dict[str, Any]]  # their state_dict
    logged: dict[int, dict[str, float]]


def result(trainer: Any) -> Result:
    return Result(
        trainer,
        trainer.lightning_module,
        weights_of(trainer.lightning_module),
        deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        deepcopy([c.state_dict() for c in trainer.callbacks if isinstance(c, Trick)]),
        getattr(trainer.logger, "metrics", {}),
    )


def run(
    *callbacks: Any,
    namespace: str = "lightning",
    layout: str = "list",
    criterion: bool = False,
    manual: bool = False,
    quiet: bool = False,
    optimizers: Any = sgd,
    raises: dict[str, BaseException] | None = None,
    loader: Any = None,
    ckpt_path: Any = None,
    **trainer_kwargs: Any,
) -> Result:
    """Fit the small module from seed 0."""
    module = module_class(namespace)(
        criterion=criterion, manual=manual, quiet=quiet, optimizers=optimizers, raises=raises
    )
    trainer = make_trainer(*callbacks, namespace=namespace, **trainer_kwargs)
    torch.manual_seed(0)
    trainer.fit(
        module,
        train_loader(layout) if loader is None else loader,
        eval_loader(layout),
        ckpt_path=ckpt_path,
        **({} if ckpt_path is None else {"weights_only": True}),
    )
    return result(trainer)


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights and buffers, whole where they are sharded."""
    whole = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in module.state_dict().items()}
    return {name: value.detach().clone() for name, value in whole.items()}


@contextlib.contextmanager
def log_lines() -> Iterator[list[logging.LogRecord]]:
    """Collect the lines that the library logs meanwhile."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("lit_tricks").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("lit_tricks").removeHandler(handler)


class Saver(lightning().Callback):
    """Saves a checkpoint after every optimizer step, every validation and every epoch. To be the last callback."""

    def __init__(self, folder: Path, steps: Collection[int] | None = None) -> None:
        """Take the folder, and the steps to save at, if not all."""
        self.folder, self.steps = folder, steps
        self.paths: list[Path] = []
        self.last = 0

    def save(self, trainer: Any, moment: str) -> None:
        if self.steps is None or trainer.global_step in self.steps:
            self.paths.append(self.folder / f"{trainer.global_step}-{moment}.ckpt")
            trainer.save_checkpoint(self.paths[-1], weights_only=False)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step != self.last:  # gradients that are being accumulated are in no checkpoint
            self.last = trainer.global_step
            self.save(trainer, "batch")

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self.save(trainer, "epoch")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the items of nested collections with their paths, and the type and length of each collection."""
    if isinstance(value, dict | list | tuple):
        yield path, f"{type(value).__name__} of {len(value)}"
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, value


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right) or (left != left and right != right)  # NaN is NaN here


def differences(left: Any, right: Any) -> list[str]:
    """Return the paths where two nested values differ, bit by bit."""
    lefts, rights = dict(leaves(left)), dict(leaves(right))
    return [
        f"{path}: {lefts.get(path, 'nothing')} and {rights.get(path, 'nothing')}"
        for path in lefts | rights
        if path not in lefts or path not in rights or not same(lefts[path], rights[path])
    ]
