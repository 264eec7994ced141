"""Look at the training data as the model sees it, measure how fast it comes, and pack it into shards."""

from __future__ import annotations

from lit_tricks.commands.data.batch_preview import preview
from lit_tricks.commands.data.loader_bench import bench
from lit_tricks.commands.data.sharding import shard

__all__ = ["bench", "preview", "shard"]
