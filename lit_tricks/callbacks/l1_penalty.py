"""L1 penalty on the weights, which shrinks unimportant weights to about 0 (Tibshirani, 1996).

One caveat: gradient steps do not reach 0. The gradient of ``|w|`` has the same size near 0 as elsewhere, so a weight
oscillates around 0 by up to ``lr * strength``. Only proximal steps or pruning give exact zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_tricks._compat import foreach_add_, foreach_mul_, foreach_sign, unscales_in_step
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.optim.param_groups import groups_of
from lit_tricks.utils.arguments import number
from lit_tricks.utils.dtensor import to_local
from lit_tricks.utils.modules import check_shapes, kinds

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["L1Penalty", "add_l1_gradient", "sparsity"]


def add_l1_gradient(weights: list[Tensor], gradients: list[Tensor], strength: float | Tensor) -> None:
    """Add ``strength * sign(weight)``, the gradient of ``strength * |weight|``, to gradients in place.

    Args:
        weights: the weights. At 0, where any value from -1 to 1 is a subgradient, 0 is taken.
        gradients: their gradients.
        strength: factor of the penalty, 0 or more.

    Example:
        >>> gradient = torch.zeros(3)
        >>> add_l1_gradient([torch.tensor([-2.0, 0.0, 5.0])], [gradient], strength=0.5)
        >>> gradient
        tensor([-0.5000,  0.0000,  0.5000])
    """
    signs = foreach_sign(weights)
    if isinstance(strength, Tensor):
        foreach_mul_(signs, strength)
        foreach_add_(gradients, signs)
    else:
        foreach_add_(gradients, signs, alpha=strength)


def sparsity(weights: list[Tensor], threshold: float) -> Tensor:
    """Return the share of the weights whose absolute value is below a threshold.

    Args:
        weights: the weights.
        threshold: largest value that counts as 0, itself excluded.

    Example:
        >>> sparsity([torch.tensor([0.0, 1e-4, 0.5, -2.0])], threshold=1e-3)
        tensor(0.5000)
    """
    small = torch.stack([(weight.abs() < threshold).sum() for weight in weights]).sum()
    return small / max(1, sum(weight.numel() for weight in weights))


class L1Penalty(Trick):
    """Penalize the absolute size of weights, so that few remain large ([Tibshirani, 1996](https://www.jstor.org/stable/2346178)).

    The gradient of ``strength * sum(|w|)`` is added to the loss gradient before each optimizer step: after unscaling,
    accumulation and the sum over processes, and before clipping. Weights of convolutions, linear and other layers are
    penalized, biases and norm layers are not. The logged loss stays the module's own.

    Cost: two passes over the weights per step. Use it before pruning, with SGD. Adam divides the penalty by the
    gradient's size. Weights become small, not exactly 0: near 0 a step overshoots and returns. So prune below a
    threshold of about ``lr * strength`` at the end.

    Args:
        strength: factor of the penalty, 0 or more. 0 changes nothing, 1e-5 is gentle. If it exceeds the gradients, all
            weights go to 0.
        threshold: absolute value below which a weight counts as zero in the log, above 0.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the strategy flattens parameters; after the first step, or at the end, if
            no weight had a gradient.

    Example:
        ``- {class_path: L1Penalty, init_args: {strength: 1.0e-05}}``
    """

    _weights: dict[Tensor, None]  # in the order of the module

    def __init__(self, strength: float = 1e-5, threshold: float = 1e-3) -> None:
        self.strength: float = number(self, "strength", strength, "[0, 1000]", "1e-5 is usual, and 0 changes nothing.")
        self.threshold: float = number(self, "threshold", threshold, "(0, 1000]", "1e-3 is usual.")
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, and announce them.

        Raises:
            RuntimeError: if the strategy flattens parameters.
        """
        check_shapes(pl_module, "L1Penalty")
        self._forget()
        # Parameters that need no gradient now may be unfrozen later.
        trained = {parameter for group in groups_of(trainer.optimizers) for parameter in group["params"]}
        for owner in pl_module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter in trained and kinds(name, parameter, owner) <= {"embedding"}:
                    self._weights[parameter] = None
        size = sum(weight.numel() for weight in self._weights)
        self.announce(f"{self.strength:g} x |w| on {len(self._weights)} tensors ({size:,} weights)")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the step at which the run starts or resumes."""
        self._first_step = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add to the gradients of this optimizer's weights."""
        there = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        chosen = [parameter for parameter in there if parameter in self._weights]
        if any(parameter.grad.is_sparse for parameter in chosen):
            raise RuntimeError("L1Penalty cannot add to sparse gradients: build the embedding with sparse=False.")
        if not chosen:
            return
        strength: float | Tensor = self.strength
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales_in_step(optimizer):
            strength = scaler.scale(torch.tensor(strength, device=chosen[0].device))
        with torch.no_grad():
            add_l1_gradient([to_local(p) for p in chosen], [to_local(p.grad) for p in chosen], strength)
        self._acted = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the share of small weights, of this process's shards.

        Raises:
            RuntimeError: if there was a step, and nothing to add to.
        """
        if trainer.global_step > self._first_step and pl_module.automatic_optimization:
            self._require_act(pl_module)
        if self._weights and self.should_log(trainer):
            with torch.no_grad():
                share = sparsity([to_local(weight) for weight in self._weights], self.threshold)
            pl_module.log("l1_penalty/sparsity", share)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if the penalty was never applied.

        Raises:
            RuntimeError: if the penalty was never applied.
        """
        if trainer.global_step > self._first_step:
            self._require_act(pl_module)

    def _require_act(self, pl_module: LightningModule) -> None:
        if not self._acted:
            raise RuntimeError(
                f"L1Penalty has no effect: no optimizer step of {type(pl_module).__name__} came with a gradient of a "
                "weight. Step the optimizers of self.optimizers(), train the weights, or remove L1Penalty."
            )

    def _forget(self) -> None:
        self._weights = {}
        self._acted = False
        self._first_step = 0

    def unwrap(self) -> None:
        """Also release the weights of the fit."""
        super().unwrap()
        self._forget()
