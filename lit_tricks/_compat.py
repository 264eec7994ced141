"""What is private to other libraries: one function per name, with the reason and where it is defined upstream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["callbacks_of"]


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the Trainer's callbacks. The callback connector sets this attribute, so type checkers do not see it."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]
