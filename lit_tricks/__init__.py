"""The tricks that make image classifiers more accurate, each as one PyTorch Lightning callback.

Callbacks are imported here from ``lit_tricks.callbacks``; the modules, and with them timm, only when asked for.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lit_tricks import callbacks
from lit_tricks.callbacks import *  # noqa: F403  (its __all__ is the registry)

if TYPE_CHECKING:
    from lit_tricks.tasks.classification import Classifier
    from lit_tricks.tasks.detection import Detector
    from lit_tricks.tasks.segmentation import Segmenter

_MODULES = {  # where they are
    "Classifier": "tasks.classification",
    "Detector": "tasks.detection",
    "Segmenter": "tasks.segmentation",
}

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
    if name in _MODULES:
        return getattr(import_module(f"lit_tricks.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
