"""Population statistics of BatchNorm: mean and variance of all inputs of the layers, with fixed weights.

One caveat: the variance is the population variance, as in a layer that gets the population as one batch. torch's
running variance also has Bessel's factor n / (n - 1) for n values of a channel, which is 1.0001 for 10,000 values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_tricks._compat import BatchNorm
from lit_tricks.utils.modes import eval_mode
from lit_tricks.utils.processes import world_size

__all__ = ["Statistics", "estimate", "pooled", "shift"]

Statistics = dict[str, tuple[Tensor, Tensor]]  # mean and variance of a layer, in float64


def pooled(means: Sequence[Tensor], variances: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a population that is split into batches.

    ``mu = E[mu_B]`` and ``sigma^2 = E[mu_B^2 + sigma_B^2] - E[mu_B]^2``, weighted by the sizes of the batches.
    The result is exact for any split into batches.

    Args:
        means: means of the batches.
        variances: variances of the batches, without Bessel's correction.
        sizes: number of values per channel in each batch.
    """
    sums = torch.zeros(2, *means[0].shape, dtype=torch.float64, device=means[0].device)
    for mean, variance, size in zip(means, variances, sizes, strict=True):
        _add(sums, mean.double(), variance.double(), size)
    return _moments(sums, sum(sizes))


def shift(old: Mapping[str, Sequence[Tensor]], new: Statistics, eps: float = 1e-5) -> float:
    """Return the distance between two statistics: root mean square over the channels, in new standard deviations.

    The distance of a channel is the Wasserstein distance of the two normal distributions: ``(mu - mu')^2 + (s -
    s')^2``.
    """
    squares = []
    for name, (mean, variance) in new.items():
        old_mean, old_variance = (value.double() for value in old[name])
        std, old_std = (variance + eps).sqrt(), (old_variance + eps).sqrt()
        squares.append(((mean - old_mean).square() + (std - old_std).square()) / std.square())
    return float(torch.cat(squares).mean().sqrt()) if squares else 0.0


def estimate(
    module: nn.Module,
    layers: dict[str, BatchNorm],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    stop: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Statistics:
    """Estimate the statistics of BatchNorm layers, and leave the module as it is.

    The layers use the statistics of each batch, as in training; all else is in evaluation mode. The calls of a layer
    are pooled. A layer that is not called is left out.

    Args:
        module: the whole module.
        layers: layers to estimate, by name.
        batches: arguments of ``forward``.
        forward: function that runs the module. Its result is not used.
        stop: end a forward pass, by an exception, when all layers were called as often as in the first pass.
        reduce: function that sums a tensor over all processes.

    Raises:
        RuntimeError: if no batch came.
    """
    found = list(dict.fromkeys(layers.values()))
    population = _Population(found)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not call the hooks
        stack.enter_context(eval_mode(module))
        stack.enter_context(_tracking(found))
        stack.enter_context(population.listening())
        for batch in batches:
            with contextlib.suppress(_Seen):
                forward(batch)
            population.next(stop)
    statistics = population.statistics(reduce)
    return {name: statistics[layer] for name, layer in layers.items() if layer in statistics}


class _Seen(BaseException):
    """Ends a forward pass. Not an Exception: models catch those."""


class _Population:
    """Sums over the calls of layers."""

    def __init__(self, layers: Sequence[BatchNorm]) -> None:
        self.layers = layers
        means: list[Any] = [layer.running_mean for layer in layers]
        devices = ["cpu" if mean.device.type == "mps" else mean.device for mean in means]  # which has no float64
        self.sums = [
            torch.zeros(2, len(mean), dtype=torch.float64, device=device)
            for mean, device in zip(means, devices, strict=True)
        ]
        self.sizes = [0] * len(layers)
        self.calls = [0] * len(layers)  # of this forward pass
        self.expected: list[int] | None = None  # of a whole one
        self.forwards = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        handles = [layer.register_forward_hook(self._hook(i), with_kwargs=True) for i, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Callable[..., None]:
        def collect(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            size, mean, variance = _of_batch(layer, (*args, *kwargs.values())[0], self.sums[index].device)
            _add(self.sums[index], mean, variance, size)
            self.sizes[index] += size
            self.calls[index] += 1
            if self.expected and self.calls[index] == self.expected[index] and self._complete():
                raise _Seen

        return collect

    def next(self, stop: bool) -> None:
        """End a forward pass."""
        self.forwards += 1
        if stop and self.expected is None:
            self.expected = self.calls
        self.calls = [0] * len(self.layers)

    def statistics(self, reduce: Callable[[Tensor], Tensor] | None) -> dict[BatchNorm, tuple[Tensor, Tensor]]:
        device = self.sums[0].device
        counts = torch.tensor([self.forwards, *self.sizes], dtype=torch.float64, device=device)
        if reduce:  # one sum, however unequal the shares of the processes are
            flat = reduce(torch.cat([counts, *(sums.flatten().to(device) for sums in self.sums)]))
            counts, *parts = torch.split(flat, [len(counts), *(sums.numel() for sums in self.sums)])
            self.sums = [part.view_as(sums) for part, sums in zip(parts, self.sums, strict=True)]
        forwards, *sizes = map(int, counts.tolist())
        if not forwards:
            raise RuntimeError(
                "BatchNorm statistics cannot be estimated: the training loader gave no batch. Lower its batch_size, or "
                "set drop_last=False."
            )
        return {
            layer: _moments(sums, size) for layer, sums, size in zip(self.layers, self.sums, sizes, strict=True) if size
        }

    def _complete(self) -> bool:
        assert self.expected
        return all(map(int.__ge__, self.calls, self.expected))


def _of_batch(layer: Any, batch: Tensor, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """Return the number of values, mean and variance of a channel, after the layer was called."""
    size = batch.numel() // batch.size(1)
    mean, variance = layer.running_mean, layer.running_var
    of_all_ranks = isinstance(layer, nn.SyncBatchNorm) and world_size() > 1
    if not of_all_ranks and torch.finfo(mean.dtype).bits >= 32:  # with momentum 1 it has tracked just this batch
        return size, mean.to(device).double(), variance.to(device).double() * ((size - 1) / size)
    dims = [0, *range(2, batch.dim())]
    precise = batch.to(torch.promote_types(batch.dtype, torch.float32))
    variance, mean = torch.var_mean(precise, dims, correction=0)
    return size, mean.to(device).double(), variance.to(device).double()


def _add(sums: Tensor, mean: Tensor, variance: Tensor, size: int) -> None:
    sums[0].add_(mean, alpha=size)
    sums[1].add_(torch.addcmul(variance, mean, mean), alpha=size)


def _moments(sums: Tensor, size: int) -> tuple[Tensor, Tensor]:
    mean, square = sums / size
    return mean, (square - mean.square()).clamp_(min=0)


@contextlib.contextmanager
def _tracking(layers: Sequence[BatchNorm]) -> Iterator[None]:
    """Set layers to training mode and momentum 1 for a while. Restore momenta and statistics afterwards."""
    momenta = [layer.momentum for layer in layers]
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    try:
        for layer in layers:
            layer.training, layer.momentum = True, 1.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
