"""Find what a trick leaves behind on the objects that it changed."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lit_tricks.callbacks.base import Trick


def traces(trainer: Any, module: Any, datamodule: Any) -> dict[str, str]:
    """Attributes, hooks and flags of a run's objects, and the random states: to be compared with another run's."""
    found = {"callbacks": str([type(callback).__name__ for callback in trainer.callbacks if not ours(callback)])}
    objects = {
        "trainer": trainer,
        "fit_loop": trainer.fit_loop,
        "epoch_loop": trainer.fit_loop.epoch_loop,
        "strategy": trainer.strategy,
        "precision": trainer.precision_plugin,
        "datamodule": datamodule,
        "loader": datamodule.loader,
    }
    objects |= {f"module.{name}": part for name, part in module.named_modules()}
    objects |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(trainer.optimizers)}
    for path, thing in objects.items():
        for name, value in vars(thing).items():
            if name not in ("callbacks", "param_groups", "state", "_results"):  # tricks may group, and log
                found[f"{path}.{name}"] = describe(value)
    for name, parameter in module.named_parameters():
        found[f"{name}.requires_grad"] = str(parameter.requires_grad)
        found[f"{name}.hooks"] = describe(parameter._backward_hooks)
    for part in map(importlib.import_module, ("torch.optim.optimizer", "torch.nn.modules.module")):
        found |= {f"{part.__name__}.{name}": describe(value) for name, value in vars(part).items() if "_hooks" in name}
    found["random"] = str(hash(random.getstate()))
    found["numpy.random"] = str(hash(np.random.get_state()[1].tobytes()))
    found["torch.random"] = str(hash(torch.get_rng_state().numpy().tobytes()))
    return found


def class_attributes(*instances: Any) -> dict[str, int]:
    """Identities of what classes hold, theirs and those that tricks may patch: to be compared with those of later."""
    classes = {cls for instance in instances for cls in ancestors(type(instance))}
    classes |= {torch.optim.Optimizer, torch.optim.SGD, nn.CrossEntropyLoss, nn.Module, torch.Tensor, DataLoader}
    found = {f"{cls.__qualname__}.{name}": id(value) for cls in classes for name, value in vars(cls).items()}
    found = {name: value for name, value in found.items() if not name.endswith(".__slotnames__")}  # copies leave it
    return found | {f"F.{name}": id(value) for name, value in vars(F).items()}


def ours(callback: Any) -> bool:
    return isinstance(callback, Trick)


def ancestors(cls: type[Any]) -> Iterator[type[Any]]:
    return (ancestor for ancestor in cls.__mro__ if ancestor is not object)


def describe(value: Any) -> str:
    """Return the value of flags and texts, the name of functions, the size of collections, and the type of others."""
    if isinstance(value, bool | int | str | None):
        return repr(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    size = f" of {len(value)}" if isinstance(value, dict | list | tuple | set) else ""
    return f"{type(value).__name__}{size}"
