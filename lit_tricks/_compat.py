"""Names that are private to other libraries: one function a name, with the reason and where it is defined upstream.

Lightning is distributed as two packages, ``lightning`` and ``pytorch_lightning``, whose classes are not the same
objects. Everything that has to work with both of them stands here too.
"""

from __future__ import annotations

import importlib
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["callbacks_of", "lightning_classes", "lightning_packages"]


# ---------------------------------------------------------------------------------------------------------------------
# Two packages of Lightning


def lightning_packages() -> list[ModuleType]:
    """Return ``lightning.pytorch`` and ``pytorch_lightning``, as far as they are installed.

    Raises:
        ModuleNotFoundError: if neither of them is.
    """
    packages = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            packages.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    if not packages:
        raise ModuleNotFoundError("lit_tricks needs PyTorch Lightning: pip install lightning", name="lightning")
    return packages


def lightning_classes(path: str) -> tuple[type[Any], ...]:
    """Return a public class in every installed Lightning package, for ``isinstance``.

    Args:
        path: where the class is in the package, such as ``"Callback"`` or ``"callbacks.WeightAveraging"``.

    Raises:
        AttributeError: if a package has no such class.
    """
    return tuple(attrgetter(path)(package) for package in lightning_packages())


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the Trainer's callbacks. The callback connector sets this attribute, so type checkers do not see it."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
