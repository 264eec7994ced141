"""What the tricks that change parameter groups share: a hand on each group as an optimizer takes it in.

That is the one moment when every optimizer has its groups and no scheduler has seen them.
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
    """The optimizers in what ``configure_optimizers`` returned, in any of its forms."""
    return [leaf for leaf in leaves(configured) if isinstance(leaf, Optimizer)]


def groups_of(optimizers: list[Optimizer]) -> list[Group]:
    """All their parameter groups."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def split_group(group: Group, weight_decay: float | None, is_free: Callable[[Tensor], bool]) -> list[Group]:
    """The parameter groups to put in the place of one: what keeps its weight decay, then what goes without.

    Args:
        group: a group as an optimizer takes it: ``params`` is one tensor or several, or pairs of a name and a tensor.
        weight_decay: that of the group, or of the optimizer if it has none of its own.
        is_free: whether a tensor goes without.

    Returns:
        Two groups with its other options; the group itself, if nothing of it goes without.
    """
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    if not weight_decay or isinstance(params, set):  # torch takes no sets, and says so
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
