"""The transfer of a batch to a device, outside of a fit."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["transfer"]


def transfer(batch: Any, device: torch.device, module: LightningModule, data: LightningDataModule) -> Any:
    """Return a batch on a device, as the Trainer would give it to the module.

    As in Lightning, each of the three hooks is the data module's if that overrides it, and else the module's.
    """

    def call(hook: str, *args: Any) -> Any:
        owner = data if is_overridden(hook, data) else module
        return getattr(owner, hook)(*args)

    batch = call("on_before_batch_transfer", batch, 0)
    batch = call("transfer_batch_to_device", batch, device, 0)
    return call("on_after_batch_transfer", batch, 0)
