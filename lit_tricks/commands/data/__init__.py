"""Look at the training data as the model sees it."""

from __future__ import annotations

from lit_tricks.commands.data.preview import preview

__all__ = ["preview"]
