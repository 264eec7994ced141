"""Channels last: store the channels of each pixel next to each other in memory (NHWC), as fast convolutions need it.

One caveat: this saves time with mixed precision on GPUs with tensor cores, and on CPUs. In float32 on a GPU, training
can become slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from lit_tricks._compat import is_overridden
from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.arguments import flag
from lit_tricks.utils.batch import replace, tensors_in
from lit_tricks.utils.dtensor import is_sharded, to_local
from lit_tricks.utils.modules import own_parameter, require_initialized

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["ChannelsLast"]


class ChannelsLast(Trick):
    """Store images and filters with channels last in memory ([PyTorch](https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html)).

    Filters of two-dimensional convolutions and images of training batches change their order in memory. Shapes and
    values stay as they are, so results differ by rounding only. Checkpoints load anywhere. In validation the filters
    keep the order, and the batches are not changed.

    Cost: one copy of each batch. It can save up to a third of a ResNet's training step. Use it with
    ``precision="16-mixed"`` or ``"bf16-mixed"`` on a GPU, or on a CPU. Leave it out for networks without convolutions.
    A network that calls ``view`` on feature maps raises an error: use ``reshape`` or ``flatten`` there. On a CPU, torch
    2.14 crashes in the backward pass of 1 x 1 convolutions of stride 2 with at most 8 input channels, on maps of 64
    pixels or more: leave it out of such tiny networks.

    Args:
        weights: whether the filters also change their order. True saves a conversion in each step. Under FSDP2 the
            shards keep their order, and only the images change.

    Raises:
        RuntimeError: when the fit starts, if the module has no two-dimensional convolution.

    Example:
        ``- {class_path: ChannelsLast}``
    """

    transient: ClassVar[tuple[str, ...]] = ("_laid_out",)
    _laid_out: tuple[Any, ...] = ()  # weights

    def __init__(self, weights: bool = True) -> None:
        self.weights: bool = flag(self, "weights", weights)
        self._count = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the memory format of the weights, before a strategy or an optimizer uses them."""
        if stage != "fit" or not self.weights:
            return
        if is_overridden("configure_model", pl_module):  # which may build layers, or shard them
            # No hook comes between configure_model, which builds layers, and the strategy, which wraps them.
            self.wrap(pl_module, "configure_model", partial(self._configured, pl_module))
        else:
            self._lay_out(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the change.

        Raises:
            RuntimeError: if there is nothing to do.
        """
        require_initialized(pl_module, "ChannelsLast")
        if not (filters := _filters(pl_module)):
            has_layers = any(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in pl_module.modules())
            why = "there is no two-dimensional convolution"
            if has_layers:
                why = "all two-dimensional convolutions are parametrized (weight or spectral norm)"
            raise RuntimeError(f"ChannelsLast has no effect: {why} in {type(pl_module).__name__}. Remove it.")
        self._count = sum(to_local(weight).is_contiguous(memory_format=torch.channels_last) for weight in filters)
        self.announce(f"images of training batches, and {self._count} of {len(filters)} filters")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out training batches, after all that other tricks, which begin in ``on_fit_start``, do to them."""
        self.change_training_batches(trainer, _lay_out_images, when_paused=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the number of filters that are in this order."""
        if self.should_log(trainer):
            pl_module.log("channels_last/filters", float(self._count))

    def _configured(self, pl_module: LightningModule, configure_model: Callable[..., Any], *args: Any) -> Any:
        configured = configure_model(*args)
        self._lay_out(pl_module)
        return configured

    def _lay_out(self, module: nn.Module) -> None:
        require_initialized(module, "ChannelsLast")
        for weight in _filters(module):
            if not is_sharded(weight) and not weight.is_contiguous(memory_format=torch.channels_last):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                self._laid_out += (weight,)

    def _lay_back(self) -> None:
        for weight in self._laid_out:
            weight.data = weight.data.contiguous()
        self._laid_out = ()

    def unwrap(self) -> None:
        """Also lay the weights out as before."""
        super().unwrap()
        self._lay_back()


def _lay_out_images(batch: Any) -> Any:
    for path, tensor in list(tensors_in(batch)):
        if tensor.dim() == 4 and (tensor.is_floating_point() or tensor.dtype == torch.uint8):
            batch = replace(batch, path, tensor.contiguous(memory_format=torch.channels_last))
    return batch


def _filters(module: nn.Module) -> list[Any]:
    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    weights = [own_parameter(layer, "weight") for layer in layers]  # a parametrized one has none
    return [weight for weight in weights if weight is not None]
