"""Xavier initialization of convolutions and linear layers, as in "Bag of Tricks" (section 2.1).

One caveat: the published code of the paper uses Kaiming normal, and its text names Xavier.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.optim.initializer import Initializer
from lit_tricks.utils.arguments import MAX_SEED, integer
from lit_tricks.utils.dtensor import part_for, to_local
from lit_tricks.utils.modules import check_shapes, has_matrix, own_parameter

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["XavierInit", "xavier_uniform"]


def xavier_uniform(shape: Iterable[int], generator: torch.Generator | None = None) -> Tensor:
    """Return a weight drawn from U(-a, a) with ``a = sqrt(6 / (d_in + d_out))``, on the CPU and in fp32.

    Args:
        shape: shape of the weight, outputs and inputs first. ``d_in`` and ``d_out`` include the kernel's area.
        generator: source of the random numbers, by default torch's global one.

    Example:
        >>> weight = xavier_uniform((64, 32, 3, 3), torch.Generator().manual_seed(0))
        >>> bool(weight.abs().max() <= (6 / (64 * 9 + 32 * 9)) ** 0.5)
        True
    """
    weight = torch.empty(*shape, dtype=torch.float32, device="cpu")
    return nn.init.xavier_uniform_(weight, generator=generator)


class XavierInit(Initializer):
    """Initialize convolutions and linear layers with Xavier's uniform distribution ([Glorot & Bengio, 2010](https://proceedings.mlr.press/v9/glorot10a.html)).

    Weights are drawn from U(-a, a) with ``a = sqrt(6 / (d_in + d_out))``, which preserves the variance of activations
    and gradients. Biases start at 0. All trained weights are drawn at the start of a run from scratch, never in a
    resumed run. Norm layers and frozen weights stay as they are. The trick has its own random generator, so a seed of
    ``seed_everything`` gives the same weights on any number and kind of devices.

    Cost: none. Use it to follow "Bag of Tricks" exactly, or to start networks of different libraries from the same
    weights. Leave it out for ReLU networks that train well from their own (Kaiming) initialization, and for
    transformers.

    Args:
        seed: seed of the weights, 0 or more. None uses the seed of ``seed_everything``.

    Raises:
        ValueError: for a seed out of its range.
        RuntimeError: when the fit starts, if the norm layers show that weights were loaded (networks without norm
            layers cannot show it), if there is nothing to initialize, or if a weight is parametrized.

    Example:
        ``- {class_path: XavierInit}``
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        fix = "Another seed gives other weights."
        self.seed: int | None = integer(
            self, "seed", seed, 0, fix, most=MAX_SEED, or_none="the seed of seed_everything"
        )
        self._weights: list[str] = []
        self._biases: list[str] = []
        self._expected = 0.0

    def select(self, pl_module: LightningModule, trained: set[Tensor], found: Any) -> None:
        """Choose the convolutions and linear layers that are trained."""
        check_shapes(pl_module, "XavierInit")
        layers = {name: part for name, part in pl_module.named_modules() if has_matrix(part)}
        names = {parameter: name for name, parameter in pl_module.named_parameters() if parameter in trained}
        for name, layer in layers.items():
            parametrized = getattr(layer, "parametrizations", {})
            parts = [parameter for part in parametrized for parameter in parametrized[part].parameters()]
            # torch.nn.utils.weight_norm and spectral_norm compute the weight from parameters weight_g, weight_orig, ...
            parts += [part for key, part in layer.named_parameters(recurse=False) if key.startswith("weight_")]
            if any(parameter in trained for parameter in parts):
                raise RuntimeError(
                    f"XavierInit cannot set the weight of {name}: it is parametrized (weight or spectral norm). Remove "
                    "XavierInit, and draw the weights before they are parametrized."
                )
        weights = dict.fromkeys(own_parameter(layer, "weight") for layer in layers.values())  # shared ones once
        biases = dict.fromkeys(own_parameter(layer, "bias") for layer in layers.values())
        self._weights = [names[weight] for weight in weights if weight in names]
        self._biases = [names[bias] for bias in biases if bias in names]
        if not self._weights:
            raise RuntimeError(
                f"XavierInit found no convolution and no linear layer that is trained in {type(pl_module).__name__}: "
                "remove XavierInit."
            )
        self._expected = sum(_variance(w) * to_local(w).numel() for w in map(pl_module.get_parameter, self._weights))

    def initialize(self, pl_module: LightningModule) -> str:
        """Draw the weights, layer by layer, and set the biases to 0."""
        seed = pl_module.trainer.strategy.broadcast(torch.initial_seed() if self.seed is None else self.seed)
        generator = torch.Generator().manual_seed(seed)
        for name in self._weights:
            weight = pl_module.get_parameter(name)
            to_local(weight).copy_(part_for(weight, xavier_uniform(weight.shape, generator)))
        others = {name for c in callbacks_of(pl_module.trainer) if isinstance(c, Initializer) for name in c.biases}
        for name in self._biases:
            if name not in others:
                pl_module.get_parameter(name).zero_()
        return f"{len(self._weights)} weights drawn with seed {seed}, {len(self._biases)} biases at 0"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the norm of all these weights, of this process's shards, as a multiple of what it is at the start."""
        if not self.should_log(trainer):
            return
        norm = nn.utils.get_total_norm([to_local(pl_module.get_parameter(name).detach()) for name in self._weights])
        pl_module.log("xavier_init/growth", norm / math.sqrt(self._expected))


def _variance(weight: Tensor) -> float:
    """Variance of Xavier's distribution: ``a**2 / 3``."""
    fan_out, fan_in = (size * math.prod(weight.shape[2:]) for size in weight.shape[:2])
    return 2 / (fan_in + fan_out)
