"""Look at the training data as the model sees it, and measure how fast it comes."""

from __future__ import annotations

from lit_tricks.commands.data.bench import bench
from lit_tricks.commands.data.preview import preview

__all__ = ["bench", "preview"]
