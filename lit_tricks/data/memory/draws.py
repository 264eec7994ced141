"""Counter-based random numbers: the draws of an image depend only on (seed, epoch, index), on any device.

A generator with a state gives its numbers one after another, so that an image's draws depend on what was drawn before.
Here a hash of the key is the draw. The hash is the output function of
[SplitMix64](https://doi.org/10.1145/2714064.2660195). It uses only integers, which are the same on CPU and GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LANES", "Key", "below", "draw"]

LANES = 8  # numbers per image

_BITS = 2**64 - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Key(NamedTuple):
    """The key of the draws of a batch.

    Attributes:
        seed: seed of the run, any integer; only 64 bits are used.
        epochs: epoch of each image, int64, shape (N,).
        indices: index of each image in its data set, int64, shape (N,), on the device of ``epochs``.
    """

    seed: int
    epochs: Tensor
    indices: Tensor


def draw(key: Key) -> Tensor:
    """Return numbers in [0, 2**32), int64, shape (LANES, N), on the device of the key."""
    state = torch.add(key.epochs * _signed(_STEP), _signed(_mixed(key.seed)))
    state = _mix(state).add_(key.indices * _signed(_STEP))
    lanes = torch.arange(1, LANES + 1, device=state.device) * _signed(_STEP)
    return _mix(_mix(state) + lanes[:, None]) >> 32 & 0xFFFFFFFF


def below(numbers: Tensor, limit: int | Tensor) -> Tensor:
    """Turn numbers in [0, 2**32) into integers in [0, limit); ``limit`` is at most 2**31."""
    return numbers * limit >> 32


def _mix(state: Tensor) -> Tensor:
    """Scramble 64 bits, in int64, whose products wrap around and whose shifts keep the sign."""
    state = state ^ (state >> 30 & (1 << 34) - 1)
    state.mul_(_signed(_FIRST))
    state ^= state >> 27 & (1 << 37) - 1
    state.mul_(_signed(_SECOND))
    state ^= state >> 31 & (1 << 33) - 1
    return state


def _mixed(number: int) -> int:
    """Scramble the lowest 64 bits of an integer, as ``_mix`` does."""
    state = number & _BITS
    state = (state ^ state >> 30) * _FIRST & _BITS
    state = (state ^ state >> 27) * _SECOND & _BITS
    return state ^ state >> 31


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
