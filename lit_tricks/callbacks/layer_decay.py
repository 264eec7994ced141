"""Layer-wise learning rate decay: layers far from the output get smaller learning rates (Bao et al., 2022).

One caveat: the first layers hardly move, so images that differ from the pretraining images need a factor near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_tricks._compat import callbacks_of, lightning_classes
from lit_tricks.callbacks.optim.lr_factors import LRFactors
from lit_tricks.callbacks.optim.param_groups import GroupNames, GroupSplitting, groups_of, optimizers_in
from lit_tricks.utils.arguments import number
from lit_tricks.utils.layers import layer_distances
from lit_tricks.utils.modules import check_shapes

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["LayerDecay", "layer_decay_factor", "layer_factors"]


def layer_decay_factor(distance: int, decay: float) -> float:
    """Return the factor on the learning rate of a layer.

    Args:
        distance: layers from this one to the last one, which has 0.
        decay: factor from layer to layer, in (0, 1].

    Example:
        >>> [layer_decay_factor(distance, 0.5) for distance in range(4)]
        [1.0, 0.5, 0.25, 0.125]
    """
    return float(decay**distance)


def layer_factors(owner: str, distances: Mapping[nn.Parameter, int], decay: float) -> LRFactors:
    """Return what gives the learning rate of each layer its factor as optimizers are built.

    Args:
        owner: name of the trick or argument, for messages.
        distances: number of layers from a parameter's layer to the last layer. Other parameters keep their learning
            rate.
        decay: factor from layer to layer, in (0, 1].
    """
    depth = max(distances.values())

    def part_of(parameter: Tensor, _: float) -> tuple[str, float]:
        distance = distances.get(parameter, 0)  # type: ignore[call-overload]
        return f"layer{depth - distance}", layer_decay_factor(distance, decay)

    return LRFactors(owner, part_of)


class LayerDecay(GroupSplitting):
    """Lower the learning rate by a factor per layer, from the last layer to the first ([Bao et al., 2022](https://arxiv.org/abs/2106.08254)).

    The last layer keeps its learning rate. The layer before it gets ``decay`` times the learning rate, the next layer
    ``decay ** 2`` times, and so on. In timm networks, ``group_matcher()`` defines the layers, so the factors equal
    timm's ``param_groups_layer_decay``. In other networks, a residual block, or any block whose class occurs several
    times, counts as one layer. Outside of blocks, each convolution or linear layer counts as one, together with its
    norm layers. Layers are in the order in which the module registers them. Parameter groups are split when an
    optimizer is built, so schedulers get the final groups.

    Cost: no operations in a forward or backward pass. The optimizer launches its kernels once per layer. Use it to
    fine-tune pretrained networks, transformers above all. Leave it out for training from random weights.

    Args:
        decay: ratio of the learning rates of a layer and the next layer, in (0, 1]. 0.65 to 0.85 are usual. 1 changes
            nothing. Near 0 only the last layer is trained. Deep networks need larger values: 0.75 to the power of 24 is
            0.001.

    Raises:
        ValueError: if ``decay`` is out of its range.
        RuntimeError: when the fit starts, if the module has one layer only or its own ``layer_decay``, an optimizer was
            not built in ``configure_optimizers``, something else sets the learning rates, the strategy flattens
            parameters, or a resumed checkpoint was split in another way; later, if a parameter group is added.

    Example:
        ``- {class_path: LayerDecay, init_args: {decay: 0.75}}``
    """

    _lowest: float
    _text: str
    _group_count: int

    def __init__(self, decay: float = 0.75) -> None:
        self.decay: float = number(self, "decay", decay, "(0, 1]", "0.75 is usual, and 1 changes nothing.")
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare to split the parameter groups.

        Raises:
            RuntimeError: if something else sets the learning rates by layer.
        """
        if stage != "fit":
            return
        self._forget()
        own = getattr(pl_module, "layer_decay", 1)
        if own != 1:
            raise RuntimeError(
                f"LayerDecay and layer_decay={own} of {type(pl_module).__name__} would both lower the learning rates. "
                "Remove one of the two."
            )
        if any(isinstance(other, lightning_classes("callbacks.LearningRateFinder")) for other in callbacks_of(trainer)):
            raise RuntimeError(
                "LayerDecay: the LearningRateFinder gives all layers one learning rate. Find it in a run without "
                "LayerDecay."
            )
        # No hook runs between the creation of optimizers and schedulers, which count the optimizers' groups.
        self.wrap(pl_module, "configure_optimizers", partial(self._split, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the layers and their factors."""
        self.announce(self._text)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that no group was added, and log the factor of the first layer.

        Raises:
            RuntimeError: if one was.
        """
        if len(groups_of(trainer.optimizers)) != self._group_count:
            raise RuntimeError(
                "LayerDecay: a parameter group was added to an optimizer during the fit, without the factors of its "
                "layers. Use Unfreeze instead of callbacks that add groups."
            )
        if self.should_log(trainer):
            pl_module.log("layer_decay/lowest", self._lowest)

    def _split(
        self, pl_module: LightningModule, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        name = type(pl_module).__name__
        check_shapes(pl_module, "LayerDecay")
        distances = layer_distances(pl_module)
        depth = max(distances.values(), default=0)
        if not depth:
            raise RuntimeError(
                f"LayerDecay(decay={self.decay}) found one layer only in {name}, so there is no learning rate to "
                "lower. Remove LayerDecay."
            )

        factors = layer_factors("LayerDecay", distances, self.decay)
        with factors.applied():
            configured = configure_optimizers(*args, **kwargs)
        factors.finish(configured, name)
        optimizers = optimizers_in(configured)
        given = {parameter for group in groups_of(optimizers) for parameter in group["params"]}
        used = {distance: None for parameter, distance in distances.items() if parameter in given}
        if len(used) < 2:
            raise RuntimeError(
                f"LayerDecay(decay={self.decay}) has no effect: the optimizers of {name} have one layer only. Train "
                "more layers, or remove LayerDecay."
            )
        first, last = max(used), min(used)
        ends = [
            next(key for key, parameter in pl_module.named_parameters() if distances.get(parameter) == distance)
            for distance in (first, last)
        ]
        ends = [end.rpartition(".")[0] or end for end in ends]
        self._lowest = layer_decay_factor(first, self.decay)
        self._text = (
            f"{depth + 1} layers, learning rate x {self._lowest:.3g} in {ends[0]} to "
            f"x {layer_decay_factor(last, self.decay):.3g} in {ends[1]}"
        )
        self._names.take(pl_module, optimizers)
        self._group_count = len(self._names.names)
        return configured

    def _forget(self) -> None:
        self._names = GroupNames(f"LayerDecay(decay={self.decay})", "network")
        self._lowest = 1.0
        self._text = ""
        self._group_count = 0
