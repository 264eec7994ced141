"""The tricks that make image classifiers more accurate, each as one PyTorch Lightning callback.

Each name is imported when it is first used, so ``import lit_tricks`` does not import torch.

Log lines go to the logger "lit_tricks". Like Lightning's log lines, they appear on stderr in programs that have not set
up logging. Set the level of this logger to show fewer of them: ``logging.getLogger("lit_tricks").setLevel("WARNING")``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lit_tricks.tasks import TASKS

if TYPE_CHECKING:
    from lit_tricks import callbacks, data, functional, models
    from lit_tricks.callbacks import *  # noqa: F403  (its __all__ is the registry)
    from lit_tricks.callbacks.base import Trick
    from lit_tricks.commands.predicting.in_memory import predict
    from lit_tricks.tasks.classification import Classifier
    from lit_tricks.tasks.detection import Detector
    from lit_tricks.tasks.segmentation import Segmenter

    __all__ = ["Classifier", "Detector", "Segmenter", "Trick", "callbacks", "data", "functional", "models", "predict"]
    __all__ += callbacks.__all__

__version__ = version("lit-tricks")

_PACKAGES = ("callbacks", "data", "functional", "models")


if not TYPE_CHECKING:  # type checkers go by the imports above, and find a misspelt name

    def __getattr__(name: str) -> Any:
        """Import the object of a name: a package, a task, the base class of tricks, or a trick."""
        if name in _PACKAGES:
            return import_module(f"lit_tricks.{name}")
        if name in TASKS:
            return getattr(import_module(TASKS[name]), name)
        if name == "Trick":
            return import_module("lit_tricks.callbacks.base").Trick
        if name == "predict":
            return import_module("lit_tricks.commands.predicting.in_memory").predict
        if name == "__all__":
            return sorted([*_PACKAGES, *TASKS, "Trick", "predict", *import_module("lit_tricks.callbacks").__all__])
        if not name.startswith("_"):
            callbacks = import_module("lit_tricks.callbacks")
            if name in callbacks.__all__:
                return getattr(callbacks, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
