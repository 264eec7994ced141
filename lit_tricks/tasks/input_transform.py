"""The transform of evaluation that belongs to a module: its data module makes it, which a checkpoint names."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_tricks._compat import CLASS_PATH_KEY

__all__ = ["InputTransform", "input_transform"]

InputTransform = Callable[[Any], Tensor]


def input_transform(module: LightningModule, settings: Mapping[str, Any]) -> InputTransform:
    """Return the transform of the data that a module was trained on.

    Args:
        module: with or without a Trainer.
        settings: hyper-parameters of the data module in the module's checkpoint.

    Raises:
        ValueError: if the data module is unknown, or has no such transform.
    """
    try:
        data: Any = getattr(module.trainer, "datamodule", None)
    except RuntimeError:  # there is no Trainer
        data = None
    if data is None and settings.get(CLASS_PATH_KEY):
        data = _data_module(settings)
    make: Callable[[], InputTransform] | None = getattr(data, "input_transform", None)
    if make is None:
        raise ValueError(
            f"{type(module).__name__}.transform(): the data that the module was trained on is unknown. Load the module "
            "from a checkpoint of `lit-tricks fit`, or use data.input_transform() of your data module."
        )
    return make()


def _data_module(settings: Mapping[str, Any]) -> Any:
    """Make a data module as for prediction, so that its images need not be there."""
    name = str(settings[CLASS_PATH_KEY])
    package, _, cls = name.rpartition(".")
    if not package.startswith("lit_tricks.") and package not in sys.modules:
        raise ValueError(f"the checkpoint names the data module {name}. Import {package} before, if you trust it.")
    kind = getattr(importlib.import_module(package), cls, None)
    if not isinstance(kind, type) or not hasattr(kind, "input_transform"):
        return None
    arguments = {key: value for key, value in settings.items() if not key.startswith("_")}
    return kind(**arguments | {"predict_dir": tempfile.gettempdir()})
