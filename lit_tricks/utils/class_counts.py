"""Count the labels of each class in a whole training set, not only the part that a process or a run loads.

Data sets that list their labels are not loaded: ``targets`` and ``labels`` of torchvision and of many others, the pairs
of ``samples`` and ``imgs``, ``TensorDataset``, label columns of Hugging Face, and subsets and concatenations of these.
A few items are loaded to check such a list, since a data set may change labels as it loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from lit_tricks._compat import TORCHVISION_LABELS, combined_loader, unwrapped_sampler
from lit_tricks.utils.batch import find
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.rng import isolated_random_state

if TYPE_CHECKING:
    from lit_tricks._compat import Trainer

__all__ = ["Counts", "count_classes", "listed_counts", "listed_labels", "training_items"]

CHECKED = 8  # items that are loaded to check a list of labels
BATCH = 64  # items in a batch, where the loader makes its own batches
NAMES = ("targets", "labels", "samples", "imgs", "y", *TORCHVISION_LABELS)
COLUMNS = ("label", "labels", "target", "targets", "class", "fine_label")


@dataclass(frozen=True)
class Counts:
    """The labels of a training set.

    Args:
        classes: number of labels of each class, by class, without the labels below 0.
        items: number of items that were counted.
        is_dense: whether an item has a label per pixel.
    """

    classes: list[int]
    items: int
    is_dense: bool = False


def count_classes(trainer: Trainer, owner: str, passes: Callable[[str], None]) -> Counts:
    """Count the labels of the Trainer's training set, on rank zero, for all processes.

    Args:
        trainer: Trainer in a fit, after its loaders are set up.
        owner: name of the object that needs the counts, for messages.
        passes: is called with one line if the items must be loaded.

    Raises:
        RuntimeError: if the labels cannot be counted. The remedy is to give ``counts``.
    """
    found: tuple[Counts | None, str] = None, ""
    if trainer.global_rank == 0:
        try:
            found = _count(_loader_of(trainer, owner), owner, passes), ""
        except Exception as error:  # the other processes wait for the counts; items fail with any type
            if not isinstance(error, RuntimeError) and not is_about_input(error):
                raise
            known = isinstance(error, RuntimeError) and str(error).startswith(owner)
            reason = f"loading them failed ({type(error).__name__}: {error})"
            found = None, str(error) if known else _needs_counts(owner, reason)
    counts, failure = trainer.strategy.broadcast(found)
    if counts is None:
        raise RuntimeError(failure)
    return counts


def training_items(trainer: Trainer) -> int | None:
    """Return the number of items that ``count_classes`` counts; None if it is not known."""
    loaders = combined_loader(trainer.fit_loop).flattened
    try:
        return sum(len(loader.dataset) if (chosen := _chosen(loader)) is None else len(chosen) for loader in loaders)
    except (TypeError, AttributeError):
        return None


def listed_counts(trainer: Trainer) -> list[int] | None:
    """Return the number of training images per class from the list of their labels, without loading any.

    None where there is no such list, or where an item has several labels. A list is not checked, unlike in
    ``count_classes``.
    """
    loaders = combined_loader(trainer.fit_loop).flattened
    dataset = getattr(loaders[0], "dataset", None) if len(loaders) == 1 else None
    try:
        labels = listed_labels(dataset)
    except Exception as error:  # attributes of the user's data set may fail with any type
        if not is_about_input(error):
            raise
        return None
    if labels is None or labels.dim() != 1:
        return None
    chosen = _chosen(loaders[0])
    return _of_batches([labels if chosen is None else labels[torch.as_tensor(chosen, dtype=torch.long)]]).classes


def listed_labels(dataset: Any, size: int | None = None) -> Tensor | None:
    """Return the integer labels that a data set lists, in the order of its items; None if it lists none.

    Args:
        dataset: any data set of a known length.
        size: length of the list; None is the data set's.
    """
    try:
        size = len(dataset) if size is None else size
    except TypeError:
        return None
    if isinstance(dataset, Subset):
        whole = listed_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices), dtype=torch.long)]
    if isinstance(dataset, ConcatDataset):
        parts = [listed_labels(part) for part in dataset.datasets]
        kept = [part for part in parts if part is not None and part.dim() == 1]
        return torch.cat(kept) if len(kept) == len(parts) else None
    for labels in _lists_in(dataset):
        if labels is not None and len(labels) == size:
            return labels
    inner = getattr(dataset, "dataset", None)  # a wrapper with other transforms
    return None if inner is None or inner is dataset else listed_labels(inner, size)


def _lists_in(dataset: Any) -> Iterator[Tensor | None]:
    if isinstance(dataset, TensorDataset):
        try:
            yield find(dataset.tensors, "")[2]
        except RuntimeError:
            return
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, Sequence) and isinstance(getattr(dataset, "features", None), Mapping):
        plain = dataset.with_format(None)
        named = [name for name in columns if hasattr(dataset.features[name], "names")]  # ClassLabel
        for name in [*named, *(name for name in COLUMNS if name in columns)]:
            yield _integers(list(plain[name]))
        return
    change = getattr(dataset, "target_transform", None)
    for name in NAMES:
        value = getattr(dataset, name, None)
        if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple) and len(value[0]) == 2:
            value = [pair[1] for pair in value]
        yield _changed(_integers(value), change)


def _integers(value: Any) -> Tensor | None:
    """Return a list, array or tensor of integers as a tensor of shape (N,), or None."""
    is_list = isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Integral | Tensor)
    if not is_list and not hasattr(value, "__array__"):  # torch would load the items of another data set
        return None
    try:
        labels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    labels = labels.flatten(1).squeeze(1) if labels.dim() == 2 and labels.size(1) == 1 else labels
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long().cpu() if labels.dim() == 1 and is_integer else None


def _changed(labels: Tensor | None, change: Callable[[int], Any] | None) -> Tensor | None:
    """Apply a ``target_transform``, once per class."""
    if labels is None or change is None:
        return labels
    values, places = torch.unique(labels, return_inverse=True)
    try:
        mapped = _integers([int(change(value)) for value in values.tolist()])
    except Exception as error:  # the user's function, which may need what the data set gives
        if not is_about_input(error):
            raise
        return None
    return None if mapped is None else mapped[places]


def _loader_of(trainer: Trainer, owner: str) -> Any:
    loaders = combined_loader(trainer.fit_loop).flattened
    if len(loaders) != 1:
        raise RuntimeError(_needs_counts(owner, f"the Trainer has {len(loaders)} training loaders"))
    return loaders[0]


def _count(loader: Any, owner: str, passes: Callable[[str], None]) -> Counts:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        what = type(loader if dataset is None else dataset).__name__
        raise RuntimeError(_needs_counts(owner, f"a {what} does not list its items"))
    chosen = _chosen(loader)
    if weighted := next((name for name in map(_weights_of, _samplers(loader)) if name), ""):
        raise RuntimeError(
            f"{owner}: the {weighted} of the training loader draws by weights, so its images have other class "
            f"frequencies than the training set. Leave {owner} or the weights out, or give the frequencies that "
            "training has: counts=[...]."
        )
    with isolated_random_state(loaders=[loader]):
        labels = listed_labels(dataset)
        if labels is not None and not (len(labels) == len(dataset) and _matches(loader, labels, owner)):
            labels = None
        if labels is None:
            places = range(len(dataset)) if chosen is None else chosen
            passes(
                f"counts the classes in one pass over {len(places)} training items, since a {type(dataset).__name__} "
                "does not list its labels. counts=[...] saves this pass"
            )
            return _of_batches(_targets(loader, places, loader.num_workers, owner))
    return _of_batches([labels if chosen is None else labels[torch.as_tensor(chosen, dtype=torch.long)]])


def _samplers(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [unwrapped_sampler(getattr(owner, "sampler", None)) for owner in (loader, batches)]


def _weights_of(sampler: Any) -> str:
    """Return the name of a sampler that draws by weights, or an empty text."""
    return "" if getattr(sampler, "weights", None) is None else type(sampler).__name__


def _chosen(loader: Any) -> list[int] | None:
    """Return the items that a sampler chooses from, as ``SubsetRandomSampler`` does; None for all."""
    for sampler in _samplers(loader):
        indices = getattr(sampler, "indices", None)
        if isinstance(indices, Sequence | Tensor):
            chosen: list[int] = torch.as_tensor(indices).tolist()
            return chosen
    return None


def _targets(loader: Any, places: Sequence[int], num_workers: int, owner: str) -> Iterator[Tensor]:
    """Load the targets of items in batches, as the loader makes them."""
    has_batches = loader.batch_sampler is not None
    batches = DataLoader(
        Subset(loader.dataset, places),
        batch_size=(loader.batch_size or BATCH) if has_batches else None,
        num_workers=num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if num_workers else None,
        generator=torch.Generator(),
    )
    for batch in batches:
        yield find(batch, owner)[2]


def _matches(loader: Any, labels: Tensor, owner: str) -> bool:
    """Return whether a few items have the labels that the data set lists."""
    step = max(1, len(labels) // CHECKED)
    places = list(range(0, len(labels), step))[:CHECKED]
    found = [target.reshape(len(target), -1) for target in _targets(loader, places, min(1, loader.num_workers), owner)]
    given = torch.cat(found)
    listed = labels[places].reshape(len(places), -1)
    return given.shape == listed.shape and torch.equal(given.long().cpu(), listed.long())


def _of_batches(targets: Iterator[Tensor] | Sequence[Tensor]) -> Counts:
    total, items, is_dense = torch.zeros(0, dtype=torch.long), 0, False
    for target in targets:
        known = target.flatten().long()
        found = known[known >= 0].bincount(minlength=len(total))
        found[: len(total)] += total
        total, items, is_dense = found.cpu(), items + len(target), target.dim() > 2
    return Counts(total.tolist(), items, is_dense)


def _needs_counts(owner: str, reason: str) -> str:
    return (
        f"{owner} needs the number of training images of each class, and {reason}. Give them: {owner}(counts=[...]), "
        "one number per class."
    )
