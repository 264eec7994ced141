"""Base of the tricks that change parameter groups, when an optimizer adds them.

At this moment every optimizer has its groups, and no scheduler has read them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_tricks._compat import leaves

__all__ = ["Group", "groups_of", "on_each_group", "optimizers_in", "split_group"]

Group = dict[str, Any]


@contextlib.contextmanager
def on_each_group(act: Callable[[Optimizer, Group, Callable[[Group], None]], None]) -> Iterator[None]:
    """Meanwhile, ``act(optimizer, group, add_param_group)`` takes the place of ``optimizer.add_param_group(group)``."""
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: Group) -> None:
        act(self, param_group, partial(original, self))

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in what ``configure_optimizers`` returned, in any of its forms."""
    return [leaf for leaf in leaves(configured) if isinstance(leaf, Optimizer)]


def groups_of(optimizers: list[Optimizer]) -> list[Group]:
    """Return all their parameter groups."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def split_group(group: Group, weight_decay: float | None, is_free: Callable[[Tensor], bool]) -> list[Group]:
    """Return the parameter groups that replace a group: with its weight decay, and without.

    Args:
        group: a group as an optimizer takes it: ``params`` is one tensor or several, or pairs of a name and a tensor.
        weight_decay: weight decay of the group, or of the optimizer if the group has none.
        is_free: returns whether a tensor has no weight decay.

    Returns:
        Two groups with the other options of the group, or the group itself if all of it has weight decay.
    """
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    if not weight_decay or isinstance(params, set):  # torch rejects sets
        return [group]
    items = group["params"] = list(params)
    if "param_names" in group:  # one that was in an optimizer before
        items = list(zip(group["param_names"], items, strict=True))
    parts: dict[bool, list[Any]] = {False: [], True: []}
    for item in items:
        parts[is_free(item[1] if isinstance(item, tuple) else item)].append(item)
    if not parts[True]:
        return [group]
    free = {**group, "params": parts[True], "weight_decay": 0.0}
    if not parts[False]:
        return [free]
    name = {"name": f"{group['name']}_no_decay"} if "name" in group else {}
    return [{**group, "params": parts[False]}, free | name]
