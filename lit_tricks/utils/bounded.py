"""Read untrusted files within limits: YAML aliases, and the real sizes of NumPy archives."""

from __future__ import annotations

import math
import os
import zipfile
from typing import TYPE_CHECKING, Any

import yaml

from lit_tricks.utils.files import open_regular, read_regular

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["parse_yaml", "read_arrays", "read_yaml"]

MOST_NODES = 100_000  # values of a configuration, with its aliases written out
MOST_TEXT = 2**24  # bytes of a configuration
MOST_ARRAYS = 2**28  # bytes of all arrays of an archive
DEEPEST = 100  # lists and dicts in each other


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the content of a YAML file, as ``yaml.safe_load`` does.

    Raises:
        OSError: if the path is not a regular file, or the file is too large.
        ValueError: if its aliases expand to too many values.
        yaml.YAMLError: if the file is not YAML.
    """
    return parse_yaml(read_regular(path, MOST_TEXT).decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text. Its aliases are counted before values are created.

    Raises:
        ValueError: if the aliases expand to too many values, or refer to themselves.
        yaml.YAMLError: if the text is not YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, 0) > MOST_NODES:
            raise ValueError(f"its aliases expand to more than {MOST_NODES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return the number of values below a node, counted once for each alias."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias refers to itself")
        return known[id(node)]
    if depth > DEEPEST:
        raise ValueError("it is nested too deep")
    known[id(node)] = 0  # until it is counted
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = 1 + sum(_size(part, known, depth + 1) for part in inner)
    return known[id(node)]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an ``.npz`` file. Their sizes are checked before memory is taken; nothing is unpickled.

    Raises:
        OSError: if the path is not a regular file.
        ValueError: if the file is not an archive of arrays, or the arrays are larger than its directory states or than
            allowed.
    """
    import numpy as np

    with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > MOST_ARRAYS:
            raise ValueError(f"its arrays have more than {MOST_ARRAYS:,} bytes")
        for part in parts:
            with archive.open(part) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                size = math.prod(shape) * dtype.itemsize
                if dtype.hasobject or min(shape, default=0) < 0 or size != part.file_size - member.tell():
                    raise ValueError(f"{part.filename} is not an array of {size:,} bytes, as its header states")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            return dict(file)
