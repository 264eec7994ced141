"""A pass over the training data of a Trainer, from which the statistics of layers are estimated."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn

from lit_tricks._compat import (
    apply_before_transfer_hook,
    callbacks_of,
    is_compiled_by_lightning,
    is_overridden,
    lightning_classes,
)
from lit_tricks.callbacks.base import Trick, paused
from lit_tricks.callbacks.batchnorm.statistics import Statistics, estimate, shift
from lit_tricks.utils.batch import arguments_of, describe
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.dtensor import is_sharded, to_local
from lit_tricks.utils.loaders import copied_train_loader
from lit_tricks.utils.modules import is_flattened
from lit_tricks.utils.processes import broadcasts_buffers
from lit_tricks.utils.rng import isolated_random_state

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Found", "StatisticsPass", "TrainingDataPass", "Watch", "check", "norms", "require_forward"]


@dataclass
class Found:
    """The result of a pass.

    Args:
        values: the statistics, by their names in the ``state_dict``.
        shift: distance of the statistics from the former ones.
        samples: number of samples over all processes.
    """

    values: dict[str, Tensor]
    shift: float
    samples: int


class Watch:
    """Compares the arguments of ``forward`` with the inputs of a batch."""

    def __init__(self, pl_module: LightningModule, inputs: Sequence[Tensor]) -> None:
        self.inputs: Sequence[Tensor] = inputs
        self.given: set[bool] = set()
        # a hook would be compiled too
        compiled = is_compiled_by_lightning(pl_module)
        self.handle = None if compiled else pl_module.register_forward_pre_hook(self.compare)

    def compare(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Compare the arguments of a call. Calls without tensors come from a strategy."""
        tensors = [arg.detach() for arg in args if isinstance(arg, Tensor)]
        if tensors:
            self.given.add(all(map(_same, tensors, self.inputs)))

    def remove(self) -> None:
        """Remove the hook."""
        if self.handle:
            self.handle.remove()

    def finish(self, trick: str, pl_module: LightningModule) -> None:
        """Remove the hook. Warn if ``forward`` was called, and each time with other inputs than the batch has."""
        self.remove()
        if self.given == {False}:
            rank_zero_only(warnings.warn)(
                f"{trick} runs `forward` of {type(pl_module).__name__} on the inputs as they are in the batch, to "
                "estimate the statistics of BatchNorm, and training_step gives it others. If these are more than mixed "
                "or augmented, let `forward` or `on_after_batch_transfer` make them.",
                stacklevel=3,
            )


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right.to(left.device, left.dtype))


def check(trick: Trick, trainer: Trainer, pl_module: LightningModule, transform: str) -> None:
    """Raise before training if a pass is not possible.

    Raises:
        RuntimeError: for a conflicting callback, a strategy that hides the weights, or data that cannot be read twice.
    """
    who = type(trick).__name__
    others = [callback for callback in callbacks_of(trainer) if callback is not trick]
    if any(isinstance(other, type(trick)) for other in others):
        raise RuntimeError(f"{who} was passed twice. Keep only one.")
    averages = [f"callbacks.{name}" for name in ("WeightAveraging", "StochasticWeightAveraging")]
    for other in others:
        if any(isinstance(other, lightning_classes(average)) for average in averages):
            raise RuntimeError(
                f"{who} and {type(other).__name__} do not coordinate their swaps of the weights: average with "
                f"EMA or SWA of lit_tricks, or remove {who}."
            )
    strategy = type(trainer.strategy).__name__
    if is_flattened(trainer.strategy.model or pl_module):
        raise RuntimeError(f"{who} cannot run the layers under {strategy}: use FSDP2 (ModelParallelStrategy).")
    require_forward(who, pl_module)
    copied_train_loader(trainer, who, transform == "eval")


def require_forward(trick: str, pl_module: LightningModule) -> None:
    """Raise if the module has no ``forward``.

    Raises:
        RuntimeError: if it has none.
    """
    if not is_overridden("forward", pl_module):
        raise RuntimeError(
            f"{trick} runs `forward` of {type(pl_module).__name__}, which has none: give it one that takes the inputs "
            "of a batch, such as `def forward(self, images): return self.net(images)`."
        )


class TrainingDataPass:
    """A pass of training data through the network, which leaves everything else as it is.

    Args:
        trick: name of the trick, for messages.
        trainer: the Trainer, in a fit.
        pl_module: the Trainer's module.
        num_samples: number of samples to pass, over all processes.
        transform: "train" or "eval".
    """

    def __init__(
        self, trick: str, trainer: Trainer, pl_module: LightningModule, num_samples: int, transform: str = "train"
    ) -> None:
        self.trick: str = trick
        self.trainer: Trainer = trainer
        self.pl_module: LightningModule = pl_module
        self.transform: str = transform
        self.samples_per_process: int = math.ceil(num_samples / trainer.world_size)
        self.samples: int = 0  # of this process
        parameters = list(pl_module.parameters())
        self.is_sharded: bool = any(map(is_sharded, parameters))
        self.is_channels_last: bool = any(_is_channels_last(to_local(param.detach())) for param in parameters)

    @contextlib.contextmanager
    def batches(self, in_step: bool = False) -> Iterator[Iterator[list[Any]]]:
        """Yield the arguments of ``forward``, batch by batch. Random states and loaders are restored afterwards.

        Args:
            in_step: end in all processes with the first loader that ends, as they wait for each other in ``forward``.
        """
        loader = copied_train_loader(self.trainer, self.trick, self.transform == "eval")
        device = self.trainer.strategy.root_device
        with isolated_random_state(device, loader.flattened), paused(self.trainer), self._stage():
            try:
                with contextlib.closing(self._inputs(loader, in_step or self.is_sharded)) as inputs:
                    yield inputs
            finally:
                loader.reset()

    def forward(self, inputs: Sequence[Any]) -> None:
        """Run the module.

        Raises:
            RuntimeError: if it does not take the inputs.
        """
        try:
            with self.trainer.precision_plugin.forward_context():
                self.pl_module(*inputs)
        except Exception as error:
            if not is_about_input(error):
                raise
            shapes = ", ".join(map(describe, inputs))
            raise RuntimeError(
                f"{self.trick} runs `forward` of {type(self.pl_module).__name__} on the inputs of training batches, "
                f"here {shapes}, and it failed ({type(error).__name__}: {error}). Let it take these, in their order, "
                "and nothing else that has no default."
            ) from error

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        total: Tensor = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        return total

    @contextlib.contextmanager
    def _stage(self) -> Iterator[None]:
        """Set the Trainer's stage for a while: hooks that augment on the device depend on it."""
        stage = self.trainer.state.stage
        if self.transform == "train":
            self.trainer.training = True
        else:
            self.trainer.validating = True
        try:
            yield
        finally:
            self.trainer.state.stage = stage

    def _inputs(self, loader: Any, in_step: bool) -> Generator[list[Any]]:
        """Yield the inputs of batches until this process has its samples."""
        for batch in _batches(self.trainer, loader, in_step):
            inputs = _inputs(self.trainer, self.pl_module, batch, self.trick)
            if self.is_channels_last:
                inputs = [_to_channels_last(each) for each in inputs]
            yield inputs
            self.samples += len(inputs[0])
            if self.samples >= self.samples_per_process:
                return


class StatisticsPass(TrainingDataPass):
    """A pass that estimates the statistics of BatchNorm layers, for the weights that the module has.

    Args:
        trick: name of the trick, for messages.
        trainer: the Trainer, in a fit.
        pl_module: the Trainer's module.
        layers: the layers, by name.
        num_samples: number of samples to pass, over all processes.
        transform: "train" or "eval".
    """

    def __init__(
        self,
        trick: str,
        trainer: Trainer,
        pl_module: LightningModule,
        layers: dict[str, Any],
        num_samples: int,
        transform: str = "train",
    ) -> None:
        super().__init__(trick, trainer, pl_module, num_samples, transform)
        self.layers = layers

    def run(self) -> Found:
        """Pass the data through the network."""
        _broadcast_as_ddp(self.trainer, self.layers)
        # processes exchange statistics
        in_step = any(isinstance(layer, nn.SyncBatchNorm) for layer in self.layers.values())
        with self.batches(in_step) as inputs:
            # an exception in the middle of a forward pass would leave FSDP2's shards gathered
            stop = not self.is_sharded
            statistics = estimate(self.pl_module, self.layers, inputs, self.forward, stop, self.sum)
        samples = int(self.sum(torch.tensor(float(self.samples), device=self.trainer.strategy.root_device)))
        return self._found(statistics, samples)

    def _found(self, statistics: Statistics, samples: int) -> Found:
        kinds = ("running_mean", "running_var")
        buffers = {name: [getattr(self.layers[name], kind) for kind in kinds] for name in statistics}
        values = {
            f"{name}.{kind}": value.to(buffer.dtype)
            for name, pair in statistics.items()
            for kind, value, buffer in zip(kinds, pair, buffers[name], strict=True)
        }
        return Found(values, shift(buffers, statistics), samples)


def norms(pl_module: LightningModule) -> list[float]:
    """Return the norms of the parameters, to detect a change."""
    params = [to_local(param.detach()) for param in pl_module.parameters() if param.is_floating_point()]
    return [float(torch.linalg.vector_norm(param)) for param in params]


def _broadcast_as_ddp(trainer: Trainer, layers: dict[str, Any]) -> None:
    """Copy the buffers of the first process to the others, if DDP would do so in its next forward pass."""
    if broadcasts_buffers(trainer):
        with torch.inference_mode(False), torch.no_grad():
            for buffer in [buffer for layer in layers.values() for buffer in layer.buffers(recurse=False)]:
                torch.distributed.broadcast(buffer, 0)


def _batches(trainer: Trainer, loader: Any, in_step: bool) -> Iterator[Any]:
    """Yield the batches of an epoch.

    Args:
        trainer: the Trainer whose loader was copied.
        loader: the copy, a CombinedLoader.
        in_step: end in all processes with the first loader that ends.
    """
    expected = trainer.num_training_batches if math.isfinite(trainer.num_training_batches) else 1
    for _ in range(2):  # a resumed loader first yields the rest of its epoch
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


def _inputs(trainer: Trainer, pl_module: LightningModule, batch: Any, trick: str) -> list[Any]:
    """Transfer a batch to the device as in training, and return its inputs. A list of images is one input."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = apply_before_transfer_hook(pl_module, batch)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    return arguments_of(batch, trick)


def _to_channels_last(value: Any) -> Any:
    is_map = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_map else value


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
