"""Fits of the small module with any loss, for the tricks that change losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.fits import Result, make_trainer, result
from helpers.modules import eval_loader, image_and_label, module_class, train_loader

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and labels


def fit_with(loss: Loss, *tricks: Any, loader: Any = None, namespace: str = "lightning", **kwargs: Any) -> Result:
    """Fit with a loss in training, from seed 0; the step's loss is logged as ``train_loss``."""
    module = module_class(namespace)()

    def of_batch(batch: Any) -> Tensor:
        image, label = image_and_label(batch)
        return loss(module(image), label)

    module.loss = of_batch
    trainer = make_trainer(*tricks, namespace=namespace, **({"limit_val_batches": 0, "max_epochs": 1} | kwargs))
    torch.manual_seed(0)
    trainer.fit(module, train_loader() if loader is None else loader, eval_loader())
    return result(trainer)


def loader_of(*batches: Any) -> DataLoader[Any]:
    """A loader of these batches, as they are."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
