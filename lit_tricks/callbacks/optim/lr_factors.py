"""Multiply the learning rates of some parameters, by splitting parameter groups when an optimizer is built."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_tricks.callbacks.optim.param_groups import Group, on_each_group, optimizers_in

__all__ = ["LRFactors", "set_base_lr"]

_MARK = "lit_tricks: learning rate before factors"  # in a parameter group, until configure_optimizers is done


def set_base_lr(group: Group, lr: Any) -> None:
    """Set the learning rate of a group before an optimizer adds it. Factors that were applied before are kept."""
    group["lr"] = lr
    if _MARK in group:
        group[_MARK] = {**group[_MARK], "": lr}
        group["lr"] = _product(group[_MARK])


class LRFactors:
    """Splits parameter groups by the learning rates of their parameters.

    If a run has several, their factors are multiplied. The product is bitwise independent of their order.

    Args:
        owner: name of the trick or argument, for messages.
        part_of: function of a parameter and its learning rate before factors. It returns the name of the parameter's
            part, and the factor on the learning rate.
    """

    def __init__(self, owner: str, part_of: Callable[[Tensor, float], tuple[str, float]]) -> None:
        self.owner = owner
        self.part_of = part_of
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
                if mark is not None and (expected := float(_product(mark))):
                    ratios.append(float(group.get("initial_lr", group["lr"])) / expected)
        self._split.clear()
        if not all(math.isclose(ratio, ratios[0], rel_tol=1e-6) for ratio in ratios):
            raise RuntimeError(
                f"{self.owner} gave the parameter groups different learning rates, and a scheduler in "
                f"configure_optimizers of {module} set others. Use a scheduler that starts from the optimizer's "
                f"learning rates, as WarmupCosine does, or remove {self.owner}."
            )

    def _add(self, optimizer: Optimizer, group: Group, add_param_group: Callable[[Group], None]) -> None:
        self._split.add(id(optimizer))
        mark = group.get(_MARK, {})
        params = group["params"]
        if self.owner in mark or isinstance(params, set):  # groups of an optimizer in another one; torch rejects sets
            add_param_group(group)
            return
        base = mark.get("", group.get("lr", optimizer.defaults.get("lr")))
        if base is None:
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
            parts.setdefault(self.part_of(parameter, float(base)), []).append(item)
        for (name, factor), part in parts.items():
            new_mark = {**mark, "": base, self.owner: factor}
            new = {**group, "params": part, "lr": _product(new_mark), _MARK: new_mark}
            if len(parts) > 1:
                new["name"] = _unused(f"{group['name']}_{name}" if "name" in group else name, optimizer)
            if "initial_lr" in group:  # set by a scheduler that continues
                new["initial_lr"] = group["initial_lr"] * factor
            add_param_group(new)


def _product(mark: dict[str, Any]) -> Any:
    """Return the learning rate: a float, or a new tensor where the optimizer has one."""
    return mark[""] * math.prod(sorted(factor for name, factor in mark.items() if name))


def _unused(name: str, optimizer: Optimizer) -> str:
    """Return a name that no group of the optimizer has, since monitors of learning rates need distinct names."""
    used = {group.get("name") for group in optimizer.param_groups}
    number = 1
    while (found := name if number == 1 else f"{name}_{number}") in used:
        number += 1
    return found
