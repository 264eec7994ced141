"""The contract table: one row per trick. Tests, and the tables in the README, go by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lit_tricks import callbacks
from lit_tricks.callbacks._base import Trick

# What a trick may be asked to work with. A row can refuse a case; the README shows them as the columns of its table.
CASES = (
    "list",
    "tuple",
    "dict",
    "NamedTuple",
    "functional loss",
    "criterion",
    "manual optimization",
    "accumulation",
    "bf16-mixed",
    "16-mixed",
    "torch.compile",
    "DDP",
    "FSDP2",
    "resume",
)


@dataclass(frozen=True)
class Row:
    """How the contract is tested for a trick.

    Args:
        make: a new one, set up so that it acts within ten steps (three epochs of four batches).
        tests: the file that tests its numbers.
        logs: names of the metrics that it logs in a run with one SGD.
        refused: cases that it refuses, each with a regex of the RuntimeError's message.
    """

    make: Callable[[], Trick]
    tests: str
    logs: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)


TRICKS = {
    "WarmupCosine": Row(
        make=lambda: callbacks.WarmupCosine(warmup_epochs=1),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupExponential": Row(
        make=lambda: callbacks.WarmupExponential(gamma=0.5, every_n_epochs=0.5, warmup_epochs=1),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
    "WarmupStep": Row(
        make=lambda: callbacks.WarmupStep(milestones=[1, 2], gamma=0.5, warmup_epochs=0.5),
        tests="test_schedules.py",
        logs=("lr-SGD",),
    ),
}
