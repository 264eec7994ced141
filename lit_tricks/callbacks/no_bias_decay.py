"""Weight decay only for weights: none for biases and parameters of norm layers ("Bag of Tricks", section 3.1).

One caveat: in timm's Lars and Lamb, parameters without weight decay also have no layer-wise adaptation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_tricks.callbacks.optim.param_groups import (
    Group,
    GroupNames,
    GroupSplitting,
    groups_of,
    on_each_group,
    optimizers_in,
    split_group,
)
from lit_tricks.utils.arguments import invalid, texts
from lit_tricks.utils.modules import Kind, check_shapes, kinds

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["NoBiasDecay"]


class NoBiasDecay(GroupSplitting):
    """Remove weight decay from biases and norm layers ([He et al., 2019](https://arxiv.org/abs/1812.01187)).

    Weights of convolutions, linear layers and embeddings keep their decay. Each parameter group with weight decay is
    split in two when an optimizer is built. Both parts keep the other options (learning rate, betas, ...), and
    schedulers get both. Groups that the module defines with ``weight_decay=0`` stay as they are.

    Cost: none. Use it with large batches and networks with norm layers. Leave it out to reproduce a training that
    decays all parameters, such as torchvision's V1 weights. Expect no difference at small batches.

    Args:
        skip: kinds of parameters without decay. "bias": all biases. "norm": scales and biases of norm layers, and all
            other vectors and scalars (layer scales, PReLU slopes, temperatures). "embedding": embedding tables, and
            what the network lists in ``no_weight_decay()``, as timm's transformers do.

    Raises:
        ValueError: if ``skip`` is empty or has an unknown kind.
        RuntimeError: when the fit starts, if no parameter lost its decay, an optimizer was not built in
            ``configure_optimizers``, the strategy flattens parameters, or a resumed checkpoint was split in another
            way; later, if a group with decay on such parameters is added.

    Example:
        ``- {class_path: NoBiasDecay, init_args: {skip: [bias, norm]}}``
    """

    _group_count: int

    def __init__(self, skip: Sequence[Kind] = ("bias", "norm")) -> None:
        fix = "Choose one or more of 'bias', 'norm' and 'embedding'."
        self.skip: list[str] = texts(self, "skip", skip, fix)
        if unknown := set(self.skip) - {"bias", "norm", "embedding"}:
            raise invalid(self, f"there is no kind {min(unknown)!r}. {fix}", skip=skip)
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the creation of the module's optimizers."""
        if stage == "fit":
            self._forget()
            # No hook runs between the creation of optimizers and schedulers, which count the optimizers' groups.
            self.wrap(pl_module, "configure_optimizers", partial(self._split, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce which parameters have weight decay."""
        sizes: dict[bool, list[int]] = {True: [], False: []}
        for group in groups_of(trainer.optimizers):
            sizes[bool(group.get("weight_decay"))] += [parameter.numel() for parameter in group["params"]]
        decayed, free = sizes[True], sizes[False]
        self._share = sum(free) / (sum(free) + sum(decayed))
        self.announce(
            f"weight decay on {len(decayed)} tensors ({sum(decayed):,} parameters), "
            f"none on {len(free)} tensors ({sum(free):,} parameters)"
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check groups that were added later, and log the share of the parameters without weight decay.

        Raises:
            RuntimeError: if such a group has weight decay on parameters that should have none.
        """
        groups = len(groups_of(trainer.optimizers))
        if groups != self._group_count:
            self._check(trainer.optimizers, _rule(pl_module, self.skip))
            self._group_count = groups
        if self.should_log(trainer):
            pl_module.log("no_bias_decay/share", self._share)

    def _split(
        self, pl_module: LightningModule, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        check_shapes(pl_module, "NoBiasDecay")
        is_free = _rule(pl_module, self.skip)
        has_split = False

        def split(optimizer: Optimizer, group: Group, add_param_group: Callable[[Group], None]) -> None:
            nonlocal has_split
            weight_decay = group.get("weight_decay", optimizer.defaults.get("weight_decay"))
            parts = split_group(group, weight_decay, is_free)
            if len(parts) == 2 and "name" not in group:
                _name_parts(parts, optimizer)
            for part in parts:
                add_param_group(part)
            has_split |= parts[-1] is not group

        with on_each_group(split):
            configured = configure_optimizers(*args, **kwargs)
        optimizers = optimizers_in(configured)
        self._check(optimizers, is_free)
        if not has_split:
            raise RuntimeError(
                f"NoBiasDecay(skip={self.skip}) took no weight decay away: either configure_optimizers of "
                f"{type(pl_module).__name__} gives its optimizers none (set their weight_decay), or only to parameters "
                "that keep it (remove NoBiasDecay)."
            )
        self._names.take(pl_module, optimizers)
        self._group_count = len(self._names.names)
        return configured

    def _check(self, optimizers: list[Optimizer], is_free: Callable[[Tensor], bool]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if group.get("weight_decay") and any(map(is_free, group["params"])):
                    raise RuntimeError(
                        f"NoBiasDecay could not split a parameter group of {type(optimizer).__name__}: it was added "
                        "before or after configure_optimizers. Build the optimizer there, or give biases and norm "
                        "layers a group of their own, with weight_decay=0."
                    )

    def _forget(self) -> None:
        self._names = GroupNames(f"NoBiasDecay(skip={self.skip})", "skip or network")
        self._group_count = 0
        self._share = 0.0


def _name_parts(parts: list[Group], optimizer: Optimizer) -> None:
    """Name the groups for what monitors learning rates. Names are unique in an optimizer."""
    number = 1 + sum(str(group.get("name", "")).startswith("no_decay") for group in optimizer.param_groups)
    for part, name in zip(parts, ("decay", "no_decay"), strict=True):
        part["name"] = name if number == 1 else f"{name}_{number}"


def _rule(module: nn.Module, skip: Sequence[str]) -> Callable[[Tensor], bool]:
    """Return whether a parameter has no weight decay. For parameters outside the module, only the shape decides."""
    free: dict[Tensor, bool] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):  # shared ones come more than once
            free[parameter] = free.get(parameter, False) or not kinds(name, parameter, owner).isdisjoint(skip)
        if "embedding" in skip and callable(listed := getattr(owner, "no_weight_decay", None)):
            names = set(listed())
            free |= {parameter: True for name, parameter in owner.named_parameters() if name in names}
    return lambda parameter: free.get(parameter, parameter.ndim < 2 and "norm" in skip)
