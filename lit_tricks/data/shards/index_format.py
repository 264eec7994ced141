"""The format of shards that ``lit-tricks data shard`` writes. No other format is read.

litdata reads many formats. "pickle" runs code, and other formats import names from the index. Shards may come from a
stranger, so an index is checked before litdata reads it.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["INDEX", "MOST_BYTES", "SCHEMES", "check_index"]

INDEX = "index.json"
MOST_BYTES = 2**28  # of an index
SCHEMES = ("s3://", "gs://")

LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
SAMPLE: list[Any] = [
    1,
    {"type": "builtins.tuple", "context": "null", "children_spec": [LEAF, LEAF, LEAF]},
]  # of litdata's pytree
FORMAT: dict[str, Any] = {"data_format": ["bytes", "int", "str"], "item_loader": "PyTreeLoader", "types": "json"}
SIZES = ("chunk_bytes", "chunk_size")


def check_index(index: Any) -> None:
    """Raise unless an index describes shards as ``write_shards`` makes them.

    Args:
        index: content of ``index.json``.

    Raises:
        ValueError: that names what is wrong.
    """
    if not isinstance(index, dict):
        raise ValueError("the index is not an object")
    config, chunks, classes = (index.get(key) for key in ("config", "chunks", "classes"))
    if not isinstance(config, dict) or not isinstance(chunks, list) or not isinstance(classes, list):
        raise ValueError("the index lacks config, chunks or classes")
    if not chunks or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("the index is empty, or its classes are not names")
    for key in ("data_format", "item_loader", "data_spec"):
        if key not in config:
            raise ValueError(f"the index lacks {key}")
    for key, value in config.items():
        if key == "data_spec":
            if not _is_sample(value):
                raise ValueError(f"data_spec={value!r} does not describe (bytes, label, name)")
        elif key in SIZES:
            if not (value is None or _is_count(value)):
                raise ValueError(f"{key}={value!r} is not a number")
        elif value != FORMAT.get(key) and not (key == "types" and value is None):
            raise ValueError(f"{key}={value!r} is not read, only {FORMAT.get(key)!r} is")
    for chunk in chunks:
        _check_chunk(chunk)
    stamp = index.get("updated_at", "0")
    if not (isinstance(stamp, str) and re.fullmatch(r"\d+(\.\d+)?", stamp)):  # becomes the name of a folder
        raise ValueError(f"updated_at={stamp!r} is not a time")


def _check_chunk(chunk: Any) -> None:
    if not isinstance(chunk, dict):
        raise ValueError(f"a chunk is {chunk!r}, and not an object")
    name = chunk.get("filename")
    if not (isinstance(name, str) and re.fullmatch(r"chunk-\d+-\d+\.bin", name, re.ASCII)):
        raise ValueError(f"a chunk is called {name!r}, and not chunk-0-0.bin or the like")
    for key in SIZES:
        if not _is_count(chunk.get(key)):
            raise ValueError(f"{key}={chunk.get(key)!r} of {name} is not a number")


def _is_sample(text: Any) -> bool:
    try:
        return bool(json.loads(text) == SAMPLE)
    except (ValueError, TypeError, RecursionError):
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
