"""The pass over the training data of a Trainer from which the statistics of BatchNorm are estimated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_tricks._compat import (
    apply_before_transfer_hook,
    callbacks_of,
    is_compiled_by_lightning,
    is_overridden,
    lightning_classes,
)
from lit_tricks.callbacks.base import Trick, paused
from lit_tricks.callbacks.batchnorm.statistics import estimate, shift
from lit_tricks.utils.batch import arguments_of, describe
from lit_tricks.utils.dtensor import is_sharded, to_local
from lit_tricks.utils.loaders import fresh_loader
from lit_tricks.utils.modules import is_flattened
from lit_tricks.utils.rng import isolated_random_state

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Found", "Watch", "check", "go_through", "norms"]


@dataclass
class Found:
    """What a pass has found.

    Args:
        values: the statistics, by their names in the ``state_dict``.
        shift: how far they are from those that the layers had.
        samples: what they are from, in all processes together.
    """

    values: dict[str, Tensor]
    shift: float
    samples: int


class Watch:
    """Watches what ``forward`` is given: the inputs of a batch, or others."""

    def __init__(self, pl_module: LightningModule, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.given: set[bool] = set()
        # a hook would be compiled too
        compiled = is_compiled_by_lightning(pl_module)
        self.handle = None if compiled else pl_module.register_forward_pre_hook(self.compare)

    def compare(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Compare the arguments of a call; one without tensors is that of a strategy."""
        tensors = [arg.detach() for arg in args if isinstance(arg, Tensor)]
        if tensors:
            self.given.add(all(map(_same, tensors, self.inputs)))

    def remove(self) -> bool:
        """End it, and tell whether ``forward`` was called, and each time with other inputs."""
        if self.handle:
            self.handle.remove()
        return self.given == {False}


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right.to(left.device, left.dtype))


def check(trick: Trick, trainer: Trainer, pl_module: LightningModule, transform: str) -> None:
    """Check, before anything is trained, that such a pass is possible.

    Raises:
        RuntimeError: if not.
    """
    others = [callback for callback in callbacks_of(trainer) if callback is not trick]
    if any(isinstance(other, type(trick)) for other in others):
        raise RuntimeError("PreciseBN was passed twice. Keep only one.")
    averages = [f"callbacks.{name}" for name in ("WeightAveraging", "StochasticWeightAveraging")]
    for other in others:
        if any(isinstance(other, lightning_classes(average)) for average in averages):
            raise RuntimeError(
                f"PreciseBN and {type(other).__name__} do not know of each other's swaps of the weights: average with "
                "EMA or SWA of lit_tricks, or remove PreciseBN."
            )
    name, strategy = type(pl_module).__name__, type(trainer.strategy).__name__
    if is_flattened(trainer.strategy.model or pl_module):
        raise RuntimeError(f"PreciseBN can not run the layers under {strategy}: use FSDP2 (ModelParallelStrategy).")
    if not is_overridden("forward", pl_module):
        raise RuntimeError(
            f"PreciseBN runs `forward` of {name}, which has none: give it one that takes the inputs of a batch, such "
            "as `def forward(self, images): return self.net(images)`."
        )
    fresh_loader(trainer, "PreciseBN", transform == "eval")


def go_through(
    trainer: Trainer, pl_module: LightningModule, layers: dict[str, Any], num_samples: int, transform: str
) -> Found:
    """Estimate the statistics of layers from training data. Everything else is as before.

    Args:
        trainer: in a fit.
        pl_module: its module, showing the weights.
        layers: BatchNorm layers to estimate, by name.
        num_samples: how many samples to go through, in all processes together.
        transform: "train" or "eval".
    """
    sharded = any(map(is_sharded, pl_module.parameters()))
    in_step = sharded or any(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values())
    channels_last = any(_is_channels_last(to_local(param.detach())) for param in pl_module.parameters())
    wanted = math.ceil(num_samples / trainer.world_size)
    seen = 0

    def inputs() -> Generator[list[Any]]:
        nonlocal seen
        for batch in _batches(trainer, loader, in_step):
            tensors = _inputs(trainer, pl_module, batch)
            if channels_last:
                tensors = [
                    t.contiguous(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.dim() == 4 else t
                    for t in tensors
                ]
            yield tensors
            seen += len(tensors[0])
            if seen >= wanted:
                return

    def forward(tensors: Sequence[Any]) -> None:
        try:
            with trainer.precision_plugin.forward_context():
                pl_module(*tensors)
        except Exception as error:
            shapes = ", ".join(map(describe, tensors))
            raise RuntimeError(
                f"PreciseBN runs `forward` of {type(pl_module).__name__} on the inputs of training batches, here "
                f"{shapes}, and it failed ({type(error).__name__}: {error}). Let it take these, in their order, and "
                "nothing else that has no default."
            ) from error

    _spread_as_ddp(trainer, layers)
    stage = trainer.state.stage
    loader = fresh_loader(trainer, "PreciseBN", transform == "eval")
    device = trainer.strategy.root_device
    with isolated_random_state(device, loader.flattened), paused(trainer):
        try:
            if transform == "train":  # hooks that augment on the device go by this
                trainer.training = True
            else:
                trainer.validating = True
            with contextlib.closing(inputs()) as batches:
                # an exception in the middle of a forward pass would leave FSDP2's shards gathered
                statistics = estimate(pl_module, layers, batches, forward, stop=not sharded, reduce=_sum(trainer))
        finally:
            trainer.state.stage = stage
            loader.reset()
    total = int(trainer.strategy.reduce(torch.tensor(float(seen), device=device), reduce_op="sum"))
    kinds = ("running_mean", "running_var")
    buffers = {name: [getattr(layers[name], kind) for kind in kinds] for name in statistics}
    values = {
        f"{name}.{kind}": value.to(buffer.dtype)
        for name, pair in statistics.items()
        for kind, value, buffer in zip(kinds, pair, buffers[name], strict=True)
    }
    return Found(values, shift(buffers, statistics), total)


def norms(pl_module: LightningModule) -> list[float]:
    """Of the parameters, to tell whether they are still the same."""
    params = [to_local(param.detach()) for param in pl_module.parameters() if param.is_floating_point()]
    return [float(torch.linalg.vector_norm(param)) for param in params]


def _spread_as_ddp(trainer: Trainer, layers: dict[str, Any]) -> None:
    """Give every process the buffers of the first, if DDP would in its next forward pass: training has them then."""
    ddp = trainer.strategy.model
    if getattr(ddp, "broadcast_buffers", False) and getattr(ddp, "require_forward_param_sync", False):
        with torch.inference_mode(False), torch.no_grad():
            for buffer in [buffer for layer in layers.values() for buffer in layer.buffers(recurse=False)]:
                torch.distributed.broadcast(buffer, 0)


def _sum(trainer: Trainer) -> Any:
    return lambda tensor: trainer.strategy.reduce(tensor, reduce_op="sum")


def _batches(trainer: Trainer, loader: Any, in_step: bool) -> Iterator[Any]:
    """The batches of an epoch.

    Args:
        trainer: whose loader it is a copy of.
        loader: a CombinedLoader.
        in_step: end when that of any process has come to its end, because processes wait for each other in a batch.
    """
    expected = trainer.num_training_batches if math.isfinite(trainer.num_training_batches) else 1
    for _ in range(2):  # a loader that was resumed has the rest of its epoch to give first
        given = 0
        iterator = iter(loader)
        while True:
            item = next(iterator, None)
            if in_step and not trainer.strategy.reduce_boolean_decision(item is not None):
                return
            if item is None:
                break
            given += 1
            yield item[0]
        if given >= expected:
            return


def _inputs(trainer: Trainer, pl_module: LightningModule, batch: Any) -> list[Any]:
    """Let a batch go the way of those of training, and take its inputs; images in a list are one."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = apply_before_transfer_hook(pl_module, batch)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return arguments_of(batch, "PreciseBN")


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
