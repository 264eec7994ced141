"""A second pass over the training data that does not affect the pass in progress."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lit_tricks._compat import combined_loader, reset_iterator
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.dataset_transforms import changed, nested

if TYPE_CHECKING:
    from lit_tricks._compat import Trainer

__all__ = ["copied_train_loader"]


def copied_train_loader(trainer: Trainer, trick: str, like_validation: bool = False) -> Any:
    """Return a copy of the training loaders that starts from the beginning, with its own workers.

    Samplers are copied with their state. Data sets are shared, except iterable data sets that the main process reads.

    Args:
        trainer: Trainer in a fit, after its loaders are set up.
        trick: name of the trick, for messages.
        like_validation: load with the ``transform`` of the validation data set.

    Raises:
        RuntimeError: if a loader cannot be copied, or a data set has no ``transform`` to replace.
    """
    combined = combined_loader(trainer.fit_loop)
    copied = copy.copy(combined)
    reset_iterator(copied)
    loaders = [_copied(loader, trick) for loader in combined.flattened]
    if like_validation:
        transforms = _transforms_of(trainer, trick)
        for loader in loaders:
            if isinstance(loader, DataLoader):
                vars(loader)["dataset"] = _with(transforms, loader.dataset, trick)
            else:
                raise RuntimeError(_no_transform(trick, f"the {type(loader).__name__} of the training batches"))
    copied.flattened = loaders
    return copied


def _copied(loader: Any, trick: str) -> Any:
    if isinstance(loader, Iterator) and not isinstance(loader, DataLoader):
        raise RuntimeError(
            f"{trick} reads training data a second time, and a {type(loader).__name__} can be read once only: give the "
            "Trainer a DataLoader, or an object whose __iter__ starts anew."
        )
    shared: list[Any] = []
    twin = loader
    if isinstance(loader, DataLoader):
        twin = copy.copy(loader)
        reset_iterator(twin)
        vars(twin)["persistent_workers"] = False
        shared = [loader.collate_fn, loader.worker_init_fn, loader.multiprocessing_context]
        if loader.num_workers or not isinstance(loader.dataset, IterableDataset):
            shared += nested(loader.dataset)
    else:
        shared = [value for value in getattr(loader, "__dict__", {}).values() if isinstance(value, Tensor | Dataset)]
    try:
        return copy.deepcopy(twin, {id(thing): thing for thing in shared if thing is not None})
    except Exception as error:  # an object that cannot be copied fails with any type
        if not is_about_input(error):
            raise
        what = type(loader.dataset if isinstance(loader, DataLoader) and not loader.num_workers else loader).__name__
        raise RuntimeError(
            f"{trick} reads training data a second time, through a copy of the {type(loader).__name__}, and that "
            f"cannot be copied ({type(error).__name__}: {error}): keep what is open (files, connections, locks) out of "
            f"the attributes of {what} and its samplers, or give them a __deepcopy__; or load with num_workers=1."
        ) from error


# The transform of the validation data


def _transforms_of(trainer: Trainer, trick: str) -> dict[str, Any]:
    combined = combined_loader(trainer.fit_loop.epoch_loop.val_loop)
    loaders = combined.flattened if combined is not None else []
    for loader in loaders:
        for dataset in nested(getattr(loader, "dataset", None)):
            if hasattr(dataset, "transform"):
                return {name: getattr(dataset, name) for name in ("transform", "transforms") if hasattr(dataset, name)}
    raise RuntimeError(_no_transform(trick, "the validation data set" if loaders else "a run without validation"))


def _with(transforms: dict[str, Any], dataset: Any, trick: str) -> Any:
    """Return a copy of a data set with another transform."""

    def change(part: Any) -> None:
        vars(part).update({name: value for name, value in transforms.items() if hasattr(part, name)})

    try:
        return changed(dataset, change)
    except LookupError as error:
        raise RuntimeError(_no_transform(trick, str(error))) from None


def _no_transform(trick: str, what: str) -> str:
    return (
        f'{trick}(transform="eval") replaces the `transform` of the training data by the one of the validation data, '
        f'but {what} has no such attribute. Use transform="train", or name the attribute `transform`.'
    )
