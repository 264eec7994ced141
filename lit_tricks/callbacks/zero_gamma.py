"""Zero gamma: the last norm of every residual block starts at scale 0 ("Bag of Tricks", section 3.1).

One caveat: timm's ResNets already start this way. The trick has an effect only with ``zero_init_last=False``.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.optim.initializer import Initializer
from lit_tricks.utils.arguments import texts
from lit_tricks.utils.dtensor import full_tensor, to_local
from lit_tricks.utils.modules import is_norm, own_parameter
from lit_tricks.utils.residual import last_norms

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["ZeroGamma"]


class ZeroGamma(Initializer):
    """Start every residual block as its shortcut ([Goyal et al., 2017](https://arxiv.org/abs/1706.02677)).

    The scale of each residual branch's last norm layer starts at 0. So a deep network begins as a shallow one, which
    is easier to train at first. Blocks are found by tracing: a branch that ends with a norm layer is added to a
    shortcut. A resumed run is not changed.

    Cost: none. Use it for ResNets from scratch, above all at a large learning rate. It does not apply to transformers
    and pre-activation blocks, whose branches do not end with a norm layer. timm's ResNets start this way by default.
    Build them with ``zero_init_last=False``, otherwise the trick only warns that it has no effect.

    Args:
        layers: patterns of names of norm layers, such as ``["*.bn3"]``. Give them if the branches are not found. A
            layer without a shortcut around it outputs 0, and cuts the network there.

    Raises:
        ValueError: if ``layers`` is empty.
        RuntimeError: when the fit starts, if no layer is found, the layers were trained before, or the list has
            another ZeroGamma.

    Example:
        ``- {class_path: ZeroGamma}``
    """

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        self.layers: list[str] | None = texts(
            self, "layers", layers, "Name modules by patterns, as ['*.bn3'].", or_none="a search"
        )
        self._names: list[str] = []  # of the scales
        self._zeroed: list[str] = []  # names of the scales that this object has set to 0, in this run or an earlier one

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the creation of the optimizers.

        Raises:
            RuntimeError: if the list has another ZeroGamma.
        """
        if any(isinstance(c, ZeroGamma) and c is not self for c in callbacks_of(trainer)):
            raise RuntimeError("ZeroGamma is in the list of callbacks twice: keep one, with all layers.")
        super().setup(trainer, pl_module, stage)

    def find(self, pl_module: LightningModule) -> list[nn.Module]:
        """Return the last norm layers of residual branches. Shards could not be traced later."""
        parts = [] if self.layers else pl_module.children()  # the module's own forward need not be the network's
        return [norm for part in parts for norm in last_norms(part).values()]

    def select(self, pl_module: LightningModule, trained: set[Tensor], found: list[nn.Module]) -> None:
        """Select the layers that the patterns name, or that were found.

        Raises:
            RuntimeError: if there are none.
        """
        candidates = {name: part for name, part in pl_module.named_modules() if _scale(part) in trained}
        missed = [pattern for pattern in self.layers or () if not fnmatch.filter(candidates, pattern)]
        if missed:
            raise self._not_found(f"layers like {missed}", pl_module, candidates)
        chosen = self._named(candidates) if self.layers else self._traced(pl_module, candidates, found)
        if not chosen:
            raise self._not_found("residual branches that end with a norm layer", pl_module, candidates)
        self._names = [f"{name}.weight" for name in chosen]

    def _named(self, candidates: dict[str, nn.Module]) -> list[str]:
        """Return the candidates that a pattern matches, in the order of the module."""
        matched = {name for pattern in self.layers or () for name in fnmatch.filter(candidates, pattern)}
        return [name for name in candidates if name in matched]

    def _traced(
        self, pl_module: LightningModule, candidates: dict[str, nn.Module], found: list[nn.Module]
    ) -> list[str]:
        """Return the candidates at the ends of residual branches."""
        norms = {id(norm) for norm in found}
        if norms.isdisjoint(map(id, candidates.values())):  # configure_model has built the network after the search
            norms = {id(norm) for norm in self.find(pl_module)}
        return [name for name, part in candidates.items() if id(part) in norms]

    def _not_found(self, what: str, pl_module: LightningModule, candidates: dict[str, nn.Module]) -> RuntimeError:
        norms = [name for name, part in candidates.items() if is_norm(part)]
        return RuntimeError(
            f"ZeroGamma found no {what} in {type(pl_module).__name__}. Name the last norm layer of each residual "
            "block, as ZeroGamma(layers=['*.bn2']), or remove ZeroGamma: transformers and blocks with "
            f"pre-activation have none. The norm layers that are trained: {_few(norms)}."
        )

    def initialize(self, pl_module: LightningModule) -> str:
        """Set the scales to 0."""
        scales = [pl_module.get_parameter(name) for name in self._names]
        which = f"{len(scales)} ({_few([name.removesuffix('.weight') for name in self._names])})"
        if any(full_tensor(scale.detach()).any() for scale in scales):
            for scale in scales:
                scale.zero_()
            self._zeroed = self._names
            return f"residual branches that start at scale 0: {which}"
        if self._zeroed != self._names:
            rank_zero_only(warnings.warn)(
                f"ZeroGamma changes nothing: the residual branches of {type(pl_module).__name__} start at scale 0 "
                "already, as in timm. To compare, build the network with zero_init_last=False.",
                stacklevel=2,
            )
        return f"residual branches that start at scale 0 already: {which}"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the mean absolute scale, of this process's shards: how far the branches have opened."""
        if not self.should_log(trainer):
            return
        scales = [to_local(pl_module.get_parameter(name).detach()) for name in self._names]
        total = nn.utils.get_total_norm(scales, norm_type=1)
        pl_module.log("zero_gamma/scale", total / sum(scale.numel() for scale in scales))


def _scale(module: nn.Module) -> Tensor | None:
    """Return the weight of a layer, if it is a vector or of a norm layer."""
    weight = own_parameter(module, "weight")
    return weight if weight is not None and (weight.ndim < 2 or is_norm(module)) else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
