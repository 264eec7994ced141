"""Attributes that copies and pickles of an object start anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = ["Transient"]


class Transient:
    """Base of classes that do not copy or pickle threads, caches, hooks and open files. ``Trick`` has its own.

    Attributes:
        transient: initial values of these attributes by name. Each copy gets its own lists and dicts.
    """

    transient: ClassVar[Mapping[str, Any]]

    def reset(self) -> None:
        """Set the attributes to their initial values."""
        vars(self).update({name: copy.copy(value) for name, value in self.transient.items()})

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer sets the module's `log` and `log_dict` on each callback, which would copy the whole module.
        kept = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
        return kept | {name: copy.copy(value) for name, value in self.transient.items()}
