"""The linear scaling rule: learning rates in proportion to the batch that makes a step (Goyal et al., 2017).

One caveat: a large learning rate needs a warm-up. Above a batch size of 8192, the paper loses accuracy
even with a warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lit_tricks._compat import callbacks_of, leaves, lightning_classes, saved_hparams, training_source
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.optim.lr_factors import is_one_cycle, scale_one_cycle
from lit_tricks.callbacks.optim.param_groups import Group, on_each_group, optimizers_in
from lit_tricks.utils.arguments import choice, integer
from lit_tricks.utils.batch import describe, images_in_list

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["EffectiveBatchSize", "LinearScaling", "effective_batch_size", "lr_scaling_factor"]

# Keys of the learning rate in a new parameter group. timm's optimizers also store the highest one for weight decay.
_RATES = {"lr", "initial_lr", "max_lr_snapshot"}
_MARK = "lit_tricks: rate before scaling"  # in a parameter group, until configure_optimizers is done


def lr_scaling_factor(batch_size: int, base_batch_size: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """Return the factor of the learning rate for another batch size.

    Args:
        batch_size: samples per optimizer step.
        base_batch_size: samples per step for which the learning rate was chosen.
        rule: "linear" for the ratio, "sqrt" for its square root.

    Example:
        >>> lr_scaling_factor(1024, 256)
        4.0
        >>> lr_scaling_factor(1024, 256, "sqrt")
        2.0
    """
    ratio = batch_size / base_batch_size
    return ratio if rule == "linear" else math.sqrt(ratio)


class LinearScaling(Trick):
    """Scale learning rates with the number of samples per step ([Goyal et al., 2017](https://arxiv.org/abs/1706.02677)).

    Every learning rate becomes ``lr * batch / base_batch_size``. Here ``batch`` is the effective batch size: batch
    size, times processes that get different data, times accumulated batches. The scaling happens when the optimizers
    are built, so schedulers start from the scaled learning rate. The ``max_lr`` of a ``OneCycleLR`` is scaled too.
    Other schedulers that set their own learning rate, such as ``CyclicLR``, are rejected.

    Cost: none. Use it to transfer hyperparameters to another batch size, with a warm-up if the batch size grows. Leave
    it out if the learning rate was found at the batch size of the run, for example by a learning rate finder.

    Args:
        base_batch_size: batch size for which the learning rates were chosen, at least 1. The paper's 0.1 is for 256. A
            smaller number increases the learning rates.
        rule: "linear" for SGD; "sqrt", ``lr * sqrt(batch / base_batch_size)``, for Adam and other adaptive optimizers.
        batch_size: samples in a batch of one process, at least 1. Give it only if the loader, the module and the data
            module have no ``batch_size`` (attribute or hyperparameter).

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the batch size is unknown, nothing was scaled, something else sets the
            learning rates, or a resumed checkpoint used another factor; in the first batch, if it has another size.

    Example:
        ``- {class_path: LinearScaling, init_args: {base_batch_size: 256}}``
    """

    _base: list[float | None]  # learning rates of the groups before scaling, None with a OneCycleLR
    _restored: float | None  # factor of the resumed run
    _is_seen: bool  # whether a batch had the expected size

    def __init__(
        self,
        base_batch_size: int = 256,
        rule: Literal["linear", "sqrt"] = "linear",
        batch_size: int | None = None,
    ) -> None:
        fix = "Give a number of samples."
        self.base_batch_size: int = integer(self, "base_batch_size", base_batch_size, 1, fix)
        self.rule: Literal["linear", "sqrt"] = choice(
            self, "rule", rule, ("linear", "sqrt"), "'sqrt' is for adaptive optimizers."
        )
        self.batch_size: int | None = integer(
            self, "batch_size", batch_size, 1, fix, or_none="the batch size of the loader"
        )
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the creation of the module's optimizers."""
        if stage == "fit":
            self._forget()
            # No hook runs between the creation of optimizers and schedulers, which start from the optimizers' learning
            # rates.
            self.wrap(pl_module, "configure_optimizers", partial(self._scale, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the scaled learning rates, and raise if another object replaced them.

        Raises:
            RuntimeError: if the optimizers have other learning rates.
        """
        schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        found = [rate for optimizer in trainer.optimizers for rate in _rates(optimizer)]
        base = [rate / self._factor if lr is None else lr for lr, rate in zip(self._base, found, strict=False)]
        scaled = [lr * self._factor for lr in base]
        same = len(found) == len(self._base) and all(map(partial(math.isclose, rel_tol=1e-6), found, scaled))
        if not same and self._restored is None:  # a resumed finetuning callback has restored other learning rates
            cause = f"the {schedulers[0]}" if schedulers else "something else"
            raise RuntimeError(
                f"LinearScaling set the learning rates {_text(scaled)}, and {cause} replaced them by {_text(found)}. "
                f"Multiply these by {self._factor:g} and remove LinearScaling, or take a schedule that starts "
                "from the optimizer's rate, as WarmupCosine."
            )
        ratio = f"{self._batch.total}/{self.base_batch_size}"
        times = ratio if self.rule == "linear" else f"sqrt({ratio})"
        product = f" ({self._batch.total} = {self._batch})" if self._batch.total > self._batch.size else ""
        self.announce(f"{_text(base)} x {times} = {_text(scaled)}{product}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the size of the first batch, and log the factor.

        Raises:
            RuntimeError: if the batch has another size than the learning rate was scaled for.
        """
        if not self._is_seen:
            sizes = [leaf.size(0) for leaf in leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim]
            if images := images_in_list(batch):  # each with its channels first
                sizes = [len(images)]
            self._is_seen = self._batch.size in sizes or not sizes
            is_last = batch_idx + 1 == trainer.num_training_batches  # it may be smaller
            if not self._is_seen and (not is_last or min(sizes) > self._batch.size):
                raise RuntimeError(
                    f"LinearScaling scaled the learning rate for batches of {self._batch.size} samples, and the first "
                    f"one is {describe(batch)}. Give LinearScaling(batch_size=...), the samples in a batch of one "
                    "process."
                )
        if self.should_log(trainer):
            pl_module.log("linear_scaling/factor", self._factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the factor that the rates in the checkpoint have."""
        return {"factor": self._factor}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the factor of the resumed run, whose optimizers and schedulers have scaled learning rates."""
        if checkpoint.get("optimizer_states") == []:
            return  # saved before there were optimizers
        restored = checkpoint["callbacks"].get(self.state_key, {"factor": 1.0})["factor"]
        if self._base:
            self._compare(restored)
        else:  # the usual order: the optimizers come later
            self._restored = restored

    def _compare(self, restored: float | None) -> None:
        if restored not in (None, self._factor):
            raise RuntimeError(
                f"LinearScaling multiplies the learning rates by {self._factor:g}, and the checkpoint brings rates "
                f"multiplied by {restored:g}. Resume with the same rule and true batch, which is now {self._batch} "
                "(Trainer(accumulate_grad_batches=...) can replace devices), or load only its weights."
            )

    def _scale(
        self, pl_module: LightningModule, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self._base = []
        self._batch = effective_batch_size(pl_module.trainer, pl_module, self.batch_size, "LinearScaling")
        self._factor = lr_scaling_factor(self._batch.total, self.base_batch_size, self.rule)
        with on_each_group(self._scale_group):
            configured = configure_optimizers(*args, **kwargs)
        for optimizer in optimizers_in(configured):
            base: list[float | None] = [group.pop(_MARK, None) for group in optimizer.param_groups]
            if None in base:
                raise RuntimeError(
                    f"LinearScaling found a {type(optimizer).__name__} without a learning rate that it could scale: "
                    f"build it in configure_optimizers of {type(pl_module).__name__}, with an lr, or remove "
                    "LinearScaling."
                )
            for index, group in enumerate(optimizer.param_groups):
                if is_one_cycle(group):
                    base[index] = None
                    scale_one_cycle(group, self._factor)
            self._base += base
        if not self._base:
            raise RuntimeError(f"LinearScaling found no optimizer to scale: {type(pl_module).__name__} has none.")
        self._compare(self._restored)
        return configured

    def _scale_group(self, optimizer: Optimizer, group: Group, add_param_group: Callable[[Group], None]) -> None:
        before = len(optimizer.param_groups)
        add_param_group(group)
        for new in optimizer.param_groups[before:]:
            if new.get("lr") is None or _MARK in new:  # an optimizer that wraps another one may pass on its groups
                continue
            new[_MARK] = float(new["lr"])
            for name in _RATES & new.keys():
                new[name] = new[name] * self._factor  # a new tensor if it is one: groups share the default's tensor

    def _forget(self) -> None:
        self._factor = 1.0
        self._batch = EffectiveBatchSize()
        self._base = []
        self._restored = None
        self._is_seen = False


def _rates(optimizer: Optimizer) -> list[float]:
    """Return the rates that a schedule starts from, or the peak of a OneCycleLR."""
    return [
        float(group["max_lr"] if is_one_cycle(group) else group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
    ]


def _text(rates: list[float]) -> str:
    distinct = list(dict.fromkeys(rates))
    return ", ".join(f"{lr:g}" for lr in distinct) if len(distinct) < 4 else f"{min(distinct):g} to {max(distinct):g}"


class EffectiveBatchSize(NamedTuple):
    """Samples per step: samples per batch, times processes, times accumulated batches."""

    size: int = 1
    processes: int = 1
    accumulated: int = 1

    @property
    def total(self) -> int:
        """Return the number of samples per step."""
        return self.size * self.processes * self.accumulated

    def __str__(self) -> str:
        parts = {"processes": self.processes, "accumulated batches": self.accumulated}
        return " x ".join([str(self.size), *(f"{n} {what}" for what, n in parts.items() if n > 1)])


def effective_batch_size(
    trainer: Trainer, pl_module: LightningModule, batch_size: int | None, trick: str
) -> EffectiveBatchSize:
    """Find the batch size of a step.

    Args:
        trainer: the Trainer, in or after its ``setup``.
        pl_module: the module.
        batch_size: samples in a batch of one process; None to find it.
        trick: name of the trick, for the messages.

    Raises:
        RuntimeError: if the batch size is unknown, or will change.
    """
    schedulers = lightning_classes("callbacks.GradientAccumulationScheduler")
    if any(isinstance(c, schedulers) for c in callbacks_of(trainer)):
        raise RuntimeError(
            f"{trick} needs one batch size for the run, and the GradientAccumulationScheduler changes it: use "
            f"Trainer(accumulate_grad_batches=...), or remove {trick}."
        )
    size = batch_size or _configured(trainer, pl_module)
    if size is None:
        raise RuntimeError(
            f"{trick} found no batch size: the loader has none, and the module or datamodule that makes it has "
            f"no batch_size. Give {trick}(batch_size=...), the samples in a batch of one process."
        )
    processes = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)  # those that see different data
    return EffectiveBatchSize(size, processes, trainer.accumulate_grad_batches)


def _configured(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Return the batch size of the training loader, without building it: a loader built this early is not restored."""
    # The Trainer takes the loader itself, or the module or data module that will make it.
    source = training_source(trainer)
    if source is trainer.datamodule or source is pl_module:  # type: ignore[union-attr]  # a connector sets it
        sizes = [getattr(source, "batch_size", None), saved_hparams(source).get("batch_size")]
    else:
        sizes = [getattr(loader, "batch_size", None) for loader in (source, getattr(source, "batch_sampler", None))]
    return next((size for size in sizes if isinstance(size, int)), None)
