"""The base of every trick: a Lightning callback, whichever package Lightning was installed as."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

__all__ = ["Trick"]

log = logging.getLogger("lit_tricks")

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
else:
    # `lightning` and `pytorch_lightning` are two packages with two `Callback` classes; each one's Trainer and CLI take
    # only their own, so a trick is both.
    _bases = []
    for _package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            _bases.append(importlib.import_module(_package).Callback)
        except ModuleNotFoundError as error:
            if error.name != _package.partition(".")[0]:
                raise
    if not _bases:
        raise ModuleNotFoundError("lit_tricks needs PyTorch Lightning: pip install lightning", name="lightning")
    _Callback = type("_Callback", tuple(_bases), {})


class Trick(_Callback):
    """Base of the tricks: a ``Callback`` of every installed Lightning package that says what it does."""

    def _say(self, effect: str) -> None:
        """Say once, on rank zero, what the trick does in this run, as a line of the start-up summary."""
        rank_zero_only(log.info)(f"{type(self).__name__}: {effect}")

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer hangs the module's `log` and `log_dict` on each callback. They are not part of the trick, and
        # would drag the whole module into every copy and pickle of it.
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}
