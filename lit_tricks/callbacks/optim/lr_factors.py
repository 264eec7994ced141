"""Multiply the learning rates of some parameters, by splitting parameter groups when an optimizer is built."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_tricks.callbacks.optim.param_groups import Group, on_each_group, optimizers_in

__all__ = ["LRFactors", "is_one_cycle", "scale_one_cycle", "set_base_lr"]

_ONE_CYCLE = ("lr", "initial_lr", "max_lr", "min_lr")  # of a group with a OneCycleLR, which reads the last three
_MARK = "lit_tricks: learning rate before factors"  # in a parameter group, until configure_optimizers is done


@dataclass(frozen=True)
class _Mark:
    """The learning rate of a group before factors, and the factors by owner.

    Attributes:
        lr: of the optimizer: a number, or a tensor where the optimizer has one.
        factors: by owner.
        own: learning rate of the part, which replaces the optimizer's.
    """

    lr: Any
    factors: dict[str, float] = field(default_factory=dict)
    own: float | None = None

    @property
    def factor(self) -> float:
        return math.prod(sorted(self.factors.values()))

    @property
    def product(self) -> Any:
        """Return the learning rate: a number, or a new tensor where the optimizer has one."""
        if self.own is None:
            return self.lr * self.factor
        lr = self.own * self.factor
        return torch.full_like(self.lr, lr) if isinstance(self.lr, Tensor) else lr

    def scaled(self, factor: float) -> _Mark:
        return replace(self, lr=self.lr * factor, own=None if self.own is None else self.own * factor)


def set_base_lr(group: Group, lr: Any) -> None:
    """Set the learning rate of a group before an optimizer adds it. Factors that were applied before are kept."""
    mark = group.get(_MARK)
    group["lr"] = lr
    if mark is not None:
        own = None if mark.own is None else mark.own * float(lr) / float(mark.lr)
        group[_MARK] = replace(mark, lr=lr, own=own)
        group["lr"] = group[_MARK].product


def is_one_cycle(group: Group) -> bool:
    """Return whether a OneCycleLR has set the learning rates of a group. It ignores the optimizer's."""
    return all(name in group for name in _ONE_CYCLE)


def scale_one_cycle(group: Group, factor: float) -> None:
    """Multiply the learning rates of a group with a OneCycleLR. Factors that are not applied yet are kept."""
    for name in _ONE_CYCLE:
        group[name] = group[name] * factor
    if _MARK in group:
        group[_MARK] = group[_MARK].scaled(factor)


class LRFactors:
    """Splits parameter groups by the learning rates of their parameters.

    If a run has several, their factors are multiplied. The product is bitwise independent of their order.

    Args:
        owner: name of the trick or argument, for messages.
        part_of: function of a parameter and its learning rate before factors. It returns the name of the parameter's
            part, and the factor on the learning rate.
        lrs: learning rates of parts whose rate does not depend on the optimizer's, by name. Factors multiply them.
    """

    def __init__(
        self,
        owner: str,
        part_of: Callable[[Tensor, float], tuple[str, float]],
        lrs: Mapping[str, float] | None = None,
    ) -> None:
        self.owner = owner
        self.part_of = part_of
        self.lrs = lrs or {}
        self._split: set[int] = set()  # identities of the optimizers

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Split the groups of all optimizers that are built within this context."""
        with on_each_group(self._add):
            yield

    def finish(self, configured: Any, module: str) -> None:
        """Check the optimizers that were configured, and remove the marks of the groups.

        Args:
            configured: what ``configure_optimizers`` returned.
            module: name of the module's class, for messages.

        Raises:
            RuntimeError: if a group was not split, or something else has set its learning rate.
        """
        ratios: list[float] = []
        for optimizer in optimizers_in(configured):
            name = type(optimizer).__name__
            if id(optimizer) not in self._split:
                raise RuntimeError(
                    f"{self.owner} could not split the parameter groups of {name}, as it was not built in "
                    f"configure_optimizers of {module}. Build it there, or remove {self.owner}."
                )
            for group in optimizer.param_groups:
                mark = group.pop(_MARK, None)
                if mark is not None and is_one_cycle(group):
                    base = 1.0 if mark.own is None else mark.own / group["max_lr"]
                    scale_one_cycle(group, base * mark.factor)
                elif mark is not None and (expected := float(mark.product)):
                    ratios.append(float(group.get("initial_lr", group["lr"])) / expected)
        self._split.clear()
        if not all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios):
            raise RuntimeError(
                f"{self.owner} gave the parameter groups different learning rates, and a scheduler in "
                f"configure_optimizers of {module} set others. Use OneCycleLR, or a scheduler that starts from the "
                f"optimizer's learning rates, as WarmupCosine does, or remove {self.owner}."
            )

    def _add(self, optimizer: Optimizer, group: Group, add_param_group: Callable[[Group], None]) -> None:
        self._split.add(id(optimizer))
        mark = group.get(_MARK)
        params = group["params"]
        # groups of an optimizer in another one; torch rejects sets
        if (mark is not None and self.owner in mark.factors) or isinstance(params, set):
            add_param_group(group)
            return
        if mark is None:
            mark = _Mark(group.get("lr", optimizer.defaults.get("lr")))
        if mark.lr is None:
            raise RuntimeError(
                f"{self.owner} found a {type(optimizer).__name__} without a learning rate. Give it an lr, or remove "
                f"{self.owner}."
            )
        items = [params] if isinstance(params, Tensor) else list(params)
        if "param_names" in group:  # the group was in an optimizer before
            items = list(zip(group["param_names"], items, strict=True))
        parts: dict[tuple[str, float], list[Any]] = {}
        for item in items:
            parameter = item[1] if isinstance(item, tuple) else item
            parts.setdefault(self.part_of(parameter, float(mark.lr)), []).append(item)
        for (name, factor), part in parts.items():
            new_mark = replace(mark, factors={**mark.factors, self.owner: factor}, own=self.lrs.get(name, mark.own))
            new = {**group, "params": part, "lr": new_mark.product, _MARK: new_mark}
            if len(parts) > 1:
                new["name"] = _unused(f"{group['name']}_{name}" if "name" in group else name, optimizer)
            if "initial_lr" in group:  # set by a scheduler that continues
                own = self.lrs[name] / float(mark.product) if name in self.lrs else 1.0
                new["initial_lr"] = group["initial_lr"] * factor * own
            add_param_group(new)


def _unused(name: str, optimizer: Optimizer) -> str:
    """Return a name that no group of the optimizer has, since monitors of learning rates need distinct names."""
    used = {group.get("name") for group in optimizer.param_groups}
    number = 1
    while (found := name if number == 1 else f"{name}_{number}") in used:
        number += 1
    return found
