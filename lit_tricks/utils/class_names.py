"""Compare the class names of checkpoints, models and data.

Comparing only the number of classes is not enough: renaming a folder keeps the number and shifts every label.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from lit_tricks._compat import saved_hparams

__all__ = ["apart", "composed", "names_of", "permutation", "require_same_classes"]

SHOWN = 5  # names in a message
LISTED = 30  # names in an order that the message gives as a whole


def names_of(thing: Any) -> list[str] | None:
    """Return the names of the classes that a model, data module or checkpoint has; None if it has none.

    Args:
        thing: a module whose ``hparams`` have ``class_names``, data with ``classes``, the content of a checkpoint, or
            the list of names.
    """
    names: Any
    if isinstance(thing, list | tuple):
        names = thing
    elif isinstance(thing, Mapping):
        settings = thing.get("hyper_parameters")
        names = settings.get("class_names") if isinstance(settings, Mapping) else None
    elif hasattr(thing, "classes"):
        names = thing.classes
    else:
        names = saved_hparams(thing).get("class_names")
    names = names.tolist() if callable(getattr(names, "tolist", None)) else names  # of NumPy or pandas
    return [composed(str(name)) for name in names] if isinstance(names, list | tuple) and names else None


def composed(name: str) -> str:
    """Return a name in the one Unicode form: file names of macOS have accents as characters of their own."""
    return unicodedata.normalize("NFC", name)


def require_same_classes(left: Any, right: Any, left_name: str, right_name: str, remedy: str = "") -> None:
    """Raise unless two objects with class names have the same classes in the same order.

    Args:
        left: see ``names_of``; what sets the order.
        right: see ``names_of``.
        left_name: for messages, such as "the checkpoint".
        right_name: for messages, such as "the data".
        remedy: end of the message if the classes themselves differ.

    Raises:
        ValueError: that names the classes that only one of them has, or the order.
    """
    ours, theirs = names_of(left), names_of(right)
    if ours is None or theirs is None or ours == theirs:
        return
    if sorted(ours) == sorted(theirs):
        place = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        order = json.dumps(ours, ensure_ascii=False) if len(ours) <= LISTED else f"the class_names of {left_name}"
        raise ValueError(
            f"{left_name} and {right_name} have the same classes in another order: label {place} is {ours[place]!r} "
            f"in {left_name} and {theirs[place]!r} in {right_name}. Map the labels of the data to the order of "
            f"{left_name}: classes={order} (on the command line --data.classes)."
        )
    ending = f" {remedy}" if remedy else ""
    raise ValueError(
        f"the classes of {left_name} and of {right_name} differ: {apart(ours, theirs, left_name, right_name)}.{ending}"
    )


def apart(left: Sequence[str], right: Sequence[str], left_name: str, right_name: str) -> str:
    """Return which names only one of two has, for a message."""
    parts = []
    for names, others, where in ((left, right, left_name), (right, left, right_name)):
        known = set(others)
        if only := [name for name in names if name not in known]:
            more = f" and {len(only) - SHOWN} more" if len(only) > SHOWN else ""
            parts.append(f"only in {where}: {', '.join(only[:SHOWN])}{more}")
    return "; ".join(parts)


def permutation(names: Sequence[str], order: Sequence[str]) -> list[int]:
    """Return the new label of each name.

    Args:
        names: by their old label.
        order: the same names, by their new label.

    Raises:
        ValueError: if the names are not the same.
    """
    names, order = [composed(name) for name in names], [composed(name) for name in order]
    if sorted(names) != sorted(order) or len(set(order)) < len(order):
        found = apart(order, names, "classes", "the data") or "a name occurs twice"
        raise ValueError(f"classes must be the data's, in any order: {found}.")
    label_of = {name: label for label, name in enumerate(order)}
    return [label_of[name] for name in names]
