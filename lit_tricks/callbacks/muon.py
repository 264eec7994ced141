"""Muon: orthogonalized momentum for the weight matrices of a network (Jordan et al., 2024).

One caveat: its gain is largest in short runs. In long runs SGD catches up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS

from lit_tricks._compat import callbacks_of, foreach_lerp_, keep_scheduler_mark, keep_unscaling, lightning_classes
from lit_tricks.callbacks.optim.lr_factors import LRFactors
from lit_tricks.callbacks.optim.lr_override import is_schedule_free
from lit_tricks.callbacks.optim.param_groups import Group, GroupNames, GroupSplitting, groups_of, optimizers_in
from lit_tricks.utils.arguments import number
from lit_tricks.utils.dtensor import is_sharded, part_for, shard_like, to_local
from lit_tricks.utils.modules import check_shapes, find_heads, has_matrix, own_parameter

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Muon", "muon_lr_scale", "orthogonalize"]

_STEPS = 5  # of the iteration; the coefficients are made for this number
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_BUFFER = "momentum_buffer"  # in the state of a parameter, as in torch.optim.Muon


def orthogonalize(matrices: Tensor, steps: int = _STEPS) -> Tensor:
    """Move all singular values of matrices close to 1, by Newton-Schulz iterations of fifth order.

    Args:
        matrices: shape (N, rows, columns), in the precision of the computation.
        steps: number of iterations. After 5, singular values are between about 0.7 and 1.2, except very small ones.

    Returns:
        Matrices of the same shape. A matrix of zeros stays one.

    Example:
        >>> torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([3.0, 1.0]))[None]))
        tensor([[1.1337, 0.7530]])
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the products are smallest with fewer rows than columns
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_lr_scale(rows: int, columns: int) -> float:
    """Return the factor on the learning rate of a matrix, ``sqrt(max(1, rows / columns))``.

    Args:
        rows: outputs of the layer.
        columns: inputs of each output: input channels per group, times the size of a filter.

    Example:
        >>> muon_lr_scale(64, 16), muon_lr_scale(64, 576)
        (2.0, 1.0)
    """
    return float(max(1.0, rows / columns) ** 0.5)


class Muon(GroupSplitting):
    """Train weights of convolutions and linear layers by orthogonalized momentum ([Jordan et al., 2024](https://kellerjordan.github.io/posts/muon/)).

    The momentum of each weight is reshaped to a matrix (outputs, inputs x filter size). An iteration makes its singular
    values close to 1, and the result times the learning rate ``lr`` is subtracted from the weight. So the size of an
    update does not depend on the size of the gradients. Each group of a grouped convolution is its own matrix. The
    classifier (all heads, if there are several), biases, norm layers, embeddings, and filters of depthwise convolutions
    are trained by the optimizer of the module, as before. The module still has one optimizer with one state, so
    schedules act on both learning rates. The update of a matrix equals the update of ``torch.optim.Muon``, which
    rejects filters of convolutions.

    Cost: 3.6 % of a training step of ResNet-50 with 256 images of 224 pixels. The time is the same for every batch
    size, and so a larger share of a step with fewer images. The state has one tensor per weight. Use it in short runs
    from scratch, up to about 30 epochs. Leave it out for fine-tuning, where the optimizer of the pretraining is safer.
    ``lr`` is the peak of a ``OneCycleLR`` that the module brings, whose ``max_lr`` is the peak of all other parameters.
    With SWA, ``SWA(lr=...)`` sets the largest learning rate of all parameter groups, and the others keep their ratio to
    it.

    Args:
        lr: learning rate of the matrices, above 0. It is about the relative change of a weight per step. 0.02 to 0.2
            are usual. Far above, runs diverge; far below, the matrices hardly move.
        momentum: share of the old momentum in the new one, in [0, 1). 0.95 is usual, and 0.6 in very short runs. 0
            orthogonalizes the gradient of each step.
        weight_decay: share of a weight that is subtracted per step and unit of learning rate, 0 or more, as in AdamW.
            0 is none.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if no optimizer has such a weight, an optimizer was not built in
            ``configure_optimizers`` or is schedule-free, something else sets the learning rates, the strategy flattens
            parameters, or a resumed checkpoint was split in another way.

    Example:
        ``- {class_path: Muon, init_args: {lr: 0.05}}``
    """

    _chosen: dict[int, int]  # groups of the layer, by the identity of its weight
    _handles: list[Any]
    _held: dict[int, Tensor]  # gradients of the step in progress, by the identity of the matrix
    _loaded: dict[Tensor, Any]  # states of the matrices while an optimizer loads a checkpoint
    _lr: float | Tensor

    def __init__(self, lr: float = 0.05, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.lr: float = number(self, "lr", lr, "(0, 100]", "0.05 is usual.")
        self.momentum: float = number(self, "momentum", momentum, "[0, 1)", "0.95 is usual.")
        self.weight_decay: float = number(
            self, "weight_decay", weight_decay, "[0, 1000]", "0.05 is usual, and 0 is none."
        )
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare to split the parameter groups.

        Raises:
            RuntimeError: if something else sets the learning rates.
        """
        if stage != "fit":
            return
        self._forget()
        if any(isinstance(other, lightning_classes("callbacks.LearningRateFinder")) for other in callbacks_of(trainer)):
            raise RuntimeError(
                "Muon: the LearningRateFinder gives all parameters one learning rate. Find it in a run without Muon."
            )
        # No hook runs between the creation of optimizers and schedulers, which count the optimizers' groups.
        self.wrap(pl_module, "configure_optimizers", partial(self._split, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the matrices."""
        for optimizer in trainer.optimizers:
            if any(map(_is_matrices, optimizer.param_groups)):
                self._handles.append(keep_unscaling(optimizer))
        groups = groups_of(trainer.optimizers)
        found = [p.numel() for group in groups if _is_matrices(group) for p in group["params"]]
        size = sum(p.numel() for group in groups for p in group["params"])
        names = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in trainer.optimizers))
        self.announce(
            f"{len(found)} weights ({sum(found):,} of {size:,} parameters) with lr={self.lr:g}, "
            f"momentum={self.momentum:g} and weight_decay={self.weight_decay:g}; the others with {names}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the learning rate of the matrices."""
        if self.should_log(trainer):
            self.log_step(pl_module, {"muon/lr": self._lr})

    def unwrap(self) -> None:
        """Also remove the hooks of the optimizers."""
        super().unwrap()
        for handle in self._handles:
            handle.remove()
        self._handles, self._chosen, self._held = [], {}, {}

    def _split(
        self, pl_module: LightningModule, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        name = type(pl_module).__name__
        check_shapes(pl_module, "Muon")
        self._chosen = matrices_in(pl_module)

        def part_of(parameter: Tensor, lr: float) -> tuple[str, float]:
            if id(parameter) not in self._chosen:
                return "rest", 1.0
            if not lr:
                raise RuntimeError(
                    f"Muon found a learning rate of 0 in {name}. Set the learning rate of the other parameters."
                )
            return "muon", 1.0

        factors = LRFactors("Muon", part_of, {"muon": self.lr})
        with factors.applied():
            configured = configure_optimizers(*args, **kwargs)
        factors.finish(configured, name)
        optimizers = optimizers_in(configured)
        for optimizer in optimizers:
            chosen = [
                group for group in optimizer.param_groups if id(next(iter(group["params"]), None)) in self._chosen
            ]
            if chosen and isinstance(optimizer, LBFGS):
                raise RuntimeError(f"Muon: {type(optimizer).__name__} computes one step for all parameters. Use SGD.")
            if chosen and is_schedule_free(optimizer):
                raise RuntimeError(
                    f"Muon: {type(optimizer).__name__} validates an average of its weights, and the weights that Muon "
                    "trains would not be averaged. Use SGD or AdamW, or remove Muon."
                )
            for group in chosen:
                group |= {"muon": True, "weight_decay": self.weight_decay}
            if chosen:
                step = optimizer.step
                # Hooks of the optimizer run inside of its step, and so before the closure, which computes gradients.
                self.wrap(optimizer, "step", partial(self._step, optimizer))
                keep_scheduler_mark(step, optimizer.step)
                # It is the first hook, so that what sets learning rates for a step, as SWA, does so for both parts.
                self._handles += [
                    optimizer.register_step_post_hook(self._after_step),
                    optimizer.register_load_state_dict_pre_hook(self._hold_momenta),
                    optimizer.register_load_state_dict_post_hook(self._load_momenta),
                ]
        if not any(map(_is_matrices, groups_of(optimizers))):
            raise RuntimeError(
                f"Muon has no effect: the optimizers of {name} have no weight of a convolution or linear layer before "
                "the classifier. Train more layers, or remove Muon."
            )
        self._names.take(pl_module, optimizers)
        return configured

    def _step(self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None = None) -> Any:
        """Step. The module's optimizer does not change parameters without a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [p for group in optimizer.param_groups if _is_matrices(group) for p in group["params"]]
        held = [(p, p.grad) for p in matrices if p.grad is not None]
        self._held = {id(p): gradient for p, gradient in held}
        for parameter, _ in held:
            parameter.grad = None
        try:
            step()
        finally:
            self._held = {}
            for parameter, gradient in held:
                parameter.grad = gradient
        return loss

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group in filter(_is_matrices, optimizer.param_groups):
            self._lr = group["lr"]
            trained = [p for p in group["params"] if id(p) in self._held]
            if trained:
                momenta = self._momenta(optimizer, trained)
                groups = [self._chosen[id(weight)] for weight in trained]
                for weight, update in zip(trained, orthogonal_updates(trained, momenta, groups), strict=True):
                    local = to_local(weight)
                    local.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update * group["lr"])

    def _hold_momenta(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Remove the momentum of the matrices: Adam and others fail on a state without entries of their own."""
        matrices = {
            key: parameter
            for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False)
            if _is_matrices(group)
            for key, parameter in zip(saved["params"], group["params"], strict=False)
        }
        state = state_dict["state"]
        self._loaded = {parameter: state[key] for key, parameter in matrices.items() if _BUFFER in state.get(key, {})}
        return {**state_dict, "state": {key: value for key, value in state.items() if key not in matrices}}

    def _load_momenta(self, optimizer: Optimizer) -> None:
        for parameter, state in self._loaded.items():
            momentum = state[_BUFFER].to(device=parameter.device, dtype=parameter.dtype)
            optimizer.state[parameter] = {**state, _BUFFER: momentum}
        self._loaded = {}

    def _momenta(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Tensor]:
        """Update the momentum of weights, and return Nesterov's mixture with the gradients: parts of this process."""
        for weight in weights:
            if _BUFFER not in optimizer.state[weight]:
                optimizer.state[weight][_BUFFER] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        gradients = [to_local(self._held[id(weight)]) for weight in weights]
        buffers = [to_local(optimizer.state[weight][_BUFFER]) for weight in weights]
        foreach_lerp_(buffers, gradients, 1 - self.momentum)
        mixed = [gradient.clone() for gradient in gradients]
        foreach_lerp_(mixed, buffers, self.momentum)
        return mixed

    def _forget(self) -> None:
        self._names = GroupNames(f"Muon(lr={self.lr:g})", "network")
        self._chosen, self._handles, self._held, self._loaded = {}, [], {}, {}
        self._lr = self.lr


def _is_matrices(group: Group) -> bool:
    return bool(group.get("muon"))


def matrices_in(module: nn.Module) -> dict[int, int]:
    """Find the weights of convolutions and linear layers that are matrices, except the classifier.

    Returns the number of matrices in each, by the identity of the parameter.
    """
    layers = [part for part in module.modules() if has_matrix(part)]
    if not layers:
        return {}
    heads: set[int] = set()
    with contextlib.suppress(RuntimeError):  # nothing is trained
        heads = {id(p) for head in find_heads(module).values() for p in head.parameters()}
    found = {}
    for layer in layers:
        weight, groups = own_parameter(layer, "weight"), getattr(layer, "groups", 1)
        if weight is not None and id(weight) not in heads and min(_matrix_shape(weight, groups)) > 1:
            found[id(weight)] = groups
    return found


def _matrix_shape(weight: Tensor, groups: int) -> tuple[int, int]:
    return weight.size(0) // groups, math.prod(weight.shape[1:])


def orthogonal_updates(weights: Sequence[Tensor], momenta: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """Return the updates of weights, parts of this process. Matrices of one shape are one batch."""
    whole: list[Any] = [
        shard_like(weight, momentum).full_tensor() if is_sharded(weight) else momentum  # type: ignore[attr-defined]
        for weight, momentum in zip(weights, momenta, strict=True)
    ]
    batches: dict[Any, list[int]] = {}
    for index, tensor in enumerate(whole):
        batches.setdefault((_matrix_shape(tensor, groups[index]), tensor.device, tensor.dtype), []).append(index)
    updates: list[Tensor] = list(whole)
    for ((rows, columns), device, dtype), indices in batches.items():
        matrices = torch.cat([whole[index].reshape(-1, rows, columns) for index in indices])
        # A GPU multiplies bf16 fastest, which is precise enough. Many CPUs are slow at it.
        wide = torch.bfloat16 if device.type == "cuda" else torch.promote_types(dtype, torch.float32)
        found = (orthogonalize(matrices.to(wide)) * muon_lr_scale(rows, columns)).to(dtype)
        for index, update in zip(indices, torch.split(found, [groups[index] for index in indices]), strict=True):
            updates[index] = part_for(weights[index], update.reshape(whole[index].shape))
    return updates
