"""Look at the training data as the model sees it, and pack it into shards."""

from __future__ import annotations

from lit_tricks.commands.data.preview import preview
from lit_tricks.commands.data.shard import shard

__all__ = ["preview", "shard"]
