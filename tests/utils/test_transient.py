"""Attributes that copies and pickles start anew."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

from lightning.pytorch import LightningModule

from lit_tricks.run.evidence.callback import Evidence
from lit_tricks.run.finite_loss import FiniteLoss
from lit_tricks.utils.transient import Transient


class Cached(Transient):
    transient: ClassVar[dict[str, Any]] = {"cache": {}, "lock": None}

    def __init__(self, size: int) -> None:
        self.size = size
        self.reset()


def test_copies_start_transient_attributes_anew() -> None:
    cached: Any = Cached(3)
    cached.cache["a"], cached.lock = 1, (each for each in "not to be pickled")
    for other in (copy.copy(cached), copy.deepcopy(cached), pickle.loads(pickle.dumps(cached))):
        assert vars(other) == {"size": 3, "cache": {}, "lock": None}
        other.cache["b"] = 2
    assert cached.cache == {"a": 1}
    assert Cached.transient["cache"] == {}


def test_copies_of_callbacks_leave_the_module_behind() -> None:
    for callback in (Evidence(), FiniteLoss("stop")):
        module: Any = LightningModule()
        callback.log, callback.log_dict = module.log, module.log_dict  # as the Trainer does
        assert "log" not in vars(copy.deepcopy(callback))
        assert b"LightningModule" not in pickle.dumps(callback)
