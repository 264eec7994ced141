"""Base of the tricks that change parameter groups, when an optimizer adds them.

At this moment every optimizer has its groups, and no scheduler has read them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, MultiplicativeLR, OneCycleLR, ReduceLROnPlateau

from lit_tricks._compat import leaves
from lit_tricks.callbacks.base import Trick

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Group", "GroupNames", "GroupSplitting", "groups_of", "on_each_group", "optimizers_in", "split_group"]

Group = dict[str, Any]
Counts = weakref.WeakKeyDictionary[Optimizer, list[int]]  # of the groups that replace each group of an optimizer


# Schedulers that take a list with a value for each parameter group.
_SCHEDULERS: tuple[type[Any], ...] = (LambdaLR, MultiplicativeLR, CyclicLR, OneCycleLR, ReduceLROnPlateau)


@contextlib.contextmanager
def on_each_group(act: Callable[[Optimizer, Group, Callable[[Group], None]], None]) -> Iterator[None]:
    """Replace ``optimizer.add_param_group(group)`` by ``act(optimizer, group, add_param_group)`` for a while.

    Schedulers that are built meanwhile may take lists with a value for each group that was not split.
    """
    original = Optimizer.add_param_group
    counts: Counts = weakref.WeakKeyDictionary()

    def add_param_group(self: Optimizer, param_group: Group) -> None:
        before = len(self.param_groups)
        act(self, param_group, partial(original, self))
        counts.setdefault(self, []).append(len(self.param_groups) - before)

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        with _values_per_group(counts):
            yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _values_per_group(counts: Counts) -> Iterator[None]:
    """Repeat each value in the lists that schedulers get, as often as its group was split."""

    def replaced(init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
            optimizer: Any = args[0] if args else kwargs.get("optimizer")
            parts = counts.get(optimizer, []) if isinstance(optimizer, Optimizer) else []

            def repeated(value: Any) -> Any:
                if not isinstance(value, list | tuple) or len(value) != len(parts):
                    return value
                return [each for each, count in zip(value, parts, strict=True) for _ in range(count)]

            init(self, *map(repeated, args), **{name: repeated(value) for name, value in kwargs.items()})

        return initialize

    with contextlib.ExitStack() as stack:
        for scheduler in _SCHEDULERS:
            stack.callback(setattr, scheduler, "__init__", scheduler.__init__)
            scheduler.__init__ = replaced(scheduler.__init__)
        yield


def optimizers_in(configured: Any) -> list[Optimizer]:
    """Return the optimizers in what ``configure_optimizers`` returned, in any of its forms."""
    return [leaf for leaf in leaves(configured) if isinstance(leaf, Optimizer)]


def groups_of(optimizers: list[Optimizer]) -> list[Group]:
    """Return all parameter groups of the optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


class GroupNames:
    """Names of the parameters in each group. A resumed run must have the same names.

    An optimizer's state is stored in the order of the parameters, and torch compares only the sizes of the groups.

    Args:
        trick: the trick as its call, for messages: "NoBiasDecay(skip=['bias'])".
        settings: the settings that determine the groups, for messages: "skip or network".
    """

    def __init__(self, trick: str, settings: str) -> None:
        self._trick = trick
        self._settings = settings
        self.names: list[list[str]] = []
        self._restored: list[list[str]] | None = None  # names in the resumed checkpoint

    def take(self, module: nn.Module, optimizers: list[Optimizer]) -> None:
        """Store the names of the configured groups.

        Raises:
            RuntimeError: if a loaded checkpoint has other groups.
        """
        names = {parameter: name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
        self.names = [[names.get(p, str(tuple(p.shape))) for p in group["params"]] for group in groups_of(optimizers)]
        if self._restored is not None:
            self._compare(self._restored)

    def load(self, checkpoint: dict[str, Any], key: str) -> None:
        """Compare with the groups of a checkpoint, or keep them until the optimizers are built.

        Args:
            checkpoint: the whole checkpoint.
            key: key of the trick's state, which has the names as "groups".

        Raises:
            RuntimeError: if the groups differ.
        """
        if checkpoint.get("optimizer_states") == []:
            return  # saved before there were optimizers
        restored = checkpoint["callbacks"].get(key, {"groups": []})["groups"]
        if self.names:
            self._compare(restored)
        else:  # the usual order: the optimizers come later
            self._restored = restored

    def _compare(self, restored: list[list[str]]) -> None:
        if restored == self.names:
            return
        then, now = ({name: i for i, names in enumerate(groups) for name in names} for groups in (restored, self.names))
        moved = [name for name in {**then, **now} if then.get(name) != now.get(name)] or ["their order"]
        remedy = f"was made with another {self._settings}: {moved[0]!r} differs. Resume with the same ones"
        if not restored:
            remedy = "was made without it. Remove it"
        raise RuntimeError(f"{self._trick}: the checkpoint {remedy}, or load only its weights.")


class GroupSplitting(Trick):
    """A trick that splits the parameter groups, and requires the same groups of a resumed run."""

    _names: GroupNames

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the parameters in each group."""
        return {"groups": self._names.names}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the groups with the groups of the resumed run.

        Raises:
            RuntimeError: if they differ.
        """
        self._names.load(checkpoint, self.state_key)


def split_group(group: Group, weight_decay: float | None, is_free: Callable[[Tensor], bool]) -> list[Group]:
    """Return the parameter groups that replace a group: with its weight decay, and without.

    Args:
        group: a group as an optimizer takes it: ``params`` is one tensor or several, or pairs of a name and a tensor.
        weight_decay: weight decay of the group, or of the optimizer if the group has none.
        is_free: function that returns whether a tensor has no weight decay.

    Returns:
        Two groups with the other options of the group, or the group itself if all of it has weight decay.
    """
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    if not weight_decay or isinstance(params, set):  # torch rejects sets
        return [group]
    items = group["params"] = list(params)
    if "param_names" in group:  # the group was in an optimizer before
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
