"""Set and restore random states: the states of the process, and the generators of loaders.

One caveat: a generator that is hidden from Python's attributes (in C, or in a closure) is not restored, if its data set
is loaded in the main process.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["isolated_random_state", "seeded"]

_shared_generators = threading.RLock()


@contextlib.contextmanager
def isolated_random_state(device: torch.device | None = None, loaders: Sequence[Any] = ()) -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch and loaders when the context ends.

    Args:
        device: device whose state is restored in addition to the CPU's.
        loaders: loaders whose samplers, data sets and collate functions may draw from generators of their own.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    seen: set[int] = set()
    own = [generator for owner in _owners(loaders) for generator in _generators(owner, seen)]
    states = [(generator, _state_of(generator)) for generator in own]
    try:
        with _restored(device):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        for generator, state in states:
            _set_state(generator, state)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators of the CPU and of a device for a while, and restore them. Threads take turns.

    ``torch.manual_seed`` would reseed all accelerators, in the middle of training.
    """
    with _shared_generators, _restored(device):
        torch.default_generator.manual_seed(seed)
        if device is not None and device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


def _restored(device: torch.device | None) -> contextlib.AbstractContextManager[None]:
    """Restore torch's generator of the CPU, and of a GPU."""
    return torch.random.fork_rng([device] if device is not None and device.type == "cuda" else [])


def _owners(loaders: Sequence[Any]) -> list[Any]:
    """Return objects of this process with generators. Workers have copies of data sets and collate functions."""
    here = [loader for loader in loaders if not getattr(loader, "num_workers", 0)]
    parts = [getattr(loader, name, None) for loader in here for name in ("dataset", "collate_fn")]
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    attributes = [value for loader in loaders for value in getattr(loader, "__dict__", {}).values()]
    return [*parts, *samplers, *(value for value in attributes if isinstance(value, torch.Generator))]


def _generators(thing: Any, seen: set[int], depth: int = 8) -> Iterator[Any]:
    if id(thing) in seen or depth == 0 or isinstance(thing, Tensor | type | str | bytes | int | float | None):
        return
    seen.add(id(thing))
    if isinstance(thing, (torch.Generator, random.Random, *_numpy_generators())):
        yield thing
    elif isinstance(thing, list | tuple | dict):
        if len(thing) <= 100:  # transforms, parts; not samples
            for child in thing.values() if isinstance(thing, dict) else thing:
                yield from _generators(child, seen, depth - 1)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type(sys)):
        for child in list(vars(thing).values()):
            yield from _generators(child, seen, depth - 1)


def _numpy_generators() -> tuple[type, ...]:
    """Return the classes of NumPy's generators, if it is imported."""
    numpy = sys.modules.get("numpy")
    return (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator) if numpy else ()


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = getattr(generator, "bit_generator", generator)
    return copy.deepcopy(bits.state) if hasattr(bits, "state") else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(bits := getattr(generator, "bit_generator", generator), "state"):
        bits.state = state
    else:
        generator.set_state(state)
