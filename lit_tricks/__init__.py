"""The tricks that make image classifiers more accurate, each as one PyTorch Lightning callback.

Each name is imported when it is first used: ``import lit_tricks`` alone does not import torch.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lit_tricks.tasks import TASKS

if TYPE_CHECKING:
    from lit_tricks import callbacks
    from lit_tricks.callbacks import *  # noqa: F403  (its __all__ is the registry)
    from lit_tricks.tasks.classification import Classifier
    from lit_tricks.tasks.detection import Detector
    from lit_tricks.tasks.segmentation import Segmenter

if TYPE_CHECKING:
    __all__ = ["Classifier", "Detector", "Segmenter"]
    __all__ += callbacks.__all__

__version__ = version("lit-tricks")


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 can not subscript it
    """Writes to what ``sys.stderr`` is at the time: a progress bar replaces it, to keep lines apart."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


_log = logging.getLogger("lit_tricks")
_log.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():  # as Lightning does: its lines and ours show without any set-up
    _log.addHandler(_Stderr())
    _log.propagate = False


def __getattr__(name: str) -> Any:
    """Import what a name stands for: a module of a task, the package of the callbacks, or one of these."""
    if name in TASKS:
        return getattr(import_module(TASKS[name]), name)
    if name == "__all__":
        return [*TASKS, *import_module("lit_tricks.callbacks").__all__]
    if not name.startswith("_"):
        callbacks = import_module("lit_tricks.callbacks")
        if name == "callbacks" or name in getattr(callbacks, "__all__", ()):
            return callbacks if name == "callbacks" else getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
