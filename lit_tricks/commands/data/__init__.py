"""Check images and labels, preview batches, measure their speed, and write images into shards."""

from __future__ import annotations

from lit_tricks.commands.data.batch_preview import preview
from lit_tricks.commands.data.checking.check import check
from lit_tricks.commands.data.loader_bench import bench
from lit_tricks.commands.data.sharding import shard

__all__ = ["bench", "check", "preview", "shard"]
