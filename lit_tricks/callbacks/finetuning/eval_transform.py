"""Replace the transforms of a Trainer's data sets, so that images have another size."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lit_tricks._compat import combined_loader, reset_iterator
from lit_tricks.utils.dataset_transforms import Flipped, at_size, changed, nested

if TYPE_CHECKING:
    from lit_tricks._compat import Trainer

__all__ = ["EvalTransforms"]


class EvalTransforms:
    """Sets the evaluation transform at a size in every loader, before its workers start.

    Data sets do not change: loaders get shallow copies of them.

    Args:
        trainer: the Trainer with the loaders.
        size: side of the images in pixels.
        transform: "test" uses a datamodule's ``eval_transform_at``, or the transform of the validation data at the new
            size; "test+flip" also flips half of the training images. A function is used unchanged.
    """

    def __init__(self, trainer: Trainer, size: int, transform: str | Callable[[Any], Any]) -> None:
        self._trainer: Any = trainer
        self._size = size
        self._transform = transform
        # per loader, the data sets before and now; a replaced loader and its workers are freed
        self._loaders: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()

    def around(self, process_dataloader: Callable[..., Any], loader: Any) -> Any:
        """Replace the strategy's method, which processes each loader before its use.

        Raises:
            RuntimeError: if a data set has no transform.
        """
        if not isinstance(loader, DataLoader):
            raise RuntimeError(self._no_transform(type(loader).__name__))
        if loader not in self._loaders or loader.dataset is not self._loaders[loader][1]:
            self._loaders[loader] = loader.dataset, self._switched(loader.dataset)
            _put(loader, self._loaders[loader][1])
        return process_dataloader(loader)

    def restore(self) -> None:
        """Restore the data sets of the loaders."""
        for loader, (before, now) in self._loaders.items():
            if loader.dataset is now:
                _put(loader, before)

    def _switched(self, dataset: Any) -> Any:
        def change(part: Any) -> None:
            part.transform = self._new(part.transform)
            if hasattr(getattr(part, "transforms", None), "transform"):  # torchvision's, which goes with the target's
                part.transforms = copy.copy(part.transforms)
                part.transforms.transform = part.transform

        try:
            return changed(dataset, change)
        except LookupError as error:
            raise RuntimeError(self._no_transform(str(error))) from None

    def _new(self, old: Any) -> Any:
        if callable(self._transform):
            return self._transform
        training = self._trainer.training
        if hasattr(self._trainer.datamodule, "eval_transform_at"):
            new = self._trainer.datamodule.eval_transform_at(self._size)
        else:
            new = self._of_validation() if training else at_size(old, self._size)
        return Flipped(new) if training and self._transform == "test+flip" else new

    def _of_validation(self) -> Any:
        """Return the transform of the validation data, which already has the new size."""
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        if combined_loader(loop) is None:
            self._trainer.validating = True
            loop.setup_data()
            self._trainer.training = True
        combined = combined_loader(loop)
        for loader in [] if combined is None else combined.flattened:
            for dataset in nested(loader.dataset):
                if hasattr(dataset, "transform"):
                    return dataset.transform
        raise RuntimeError(self._no_transform("a run without validation"))

    def _no_transform(self, what: str) -> str:
        return (
            f"FixRes(test_size={self._size}) puts the `transform` of the validation data, at that size, in the place "
            f"of others, and {what} has no such attribute: let the data set have one, give FixRes(transform=...), a "
            "function; or let the loaders give the size, with FixRes(test_size=None)."
        )


def _put(loader: Any, dataset: Any) -> None:
    vars(loader)["dataset"] = dataset  # DataLoader forbids it, as there may be workers that have the old one
    reset_iterator(loader)
