"""Apply flags of one trick to the list of callbacks while the command line is parsed."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from lightning_utilities.core.rank_zero import rank_zero_info

from lit_tricks._compat import option_action
from lit_tricks.utils.config_files import nearest
from lit_tricks.utils.trick_flags import CALLBACKS, REMOVE, find_trick_flags

__all__ = ["add_trick_flags"]

KEY = "trainer.callbacks"


def add_trick_flags(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Add the flags of a command line for one callback, and the flag that removes a callback.

    Args:
        parser: with an argument ``trainer.callbacks``.
        words: of the command line.
    """
    whole = option_action(parser, CALLBACKS)
    added = {REMOVE}
    parser.add_argument(REMOVE, action=_Remove, **_HIDDEN)
    for each in find_trick_flags(words):
        if each.flag not in added:
            added.add(each.flag)
            action = type("Set", (_Set,), {"whole": whole, "name": each.name, "argument": each.argument})
            parser.add_argument(each.flag, action=action, **_HIDDEN)


_HIDDEN: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}


class _Remove(argparse.Action):
    """Takes a callback out of the list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        callbacks = _callbacks(namespace)
        del callbacks[_place(callbacks, str(values), f"{REMOVE}={values}")]
        namespace[KEY] = callbacks


class _Set(argparse.Action):
    """Sets an argument of one callback: the parser itself sets arguments of the last one, so it becomes that."""

    whole: argparse.Action  # of the list
    name: str
    argument: str

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        callbacks = _callbacks(namespace)
        place = _place(callbacks, self.name, str(option_string)) if self.name else len(callbacks) - 1
        _require_argument(callbacks, place, self.argument, str(option_string))
        named = callbacks[place]
        namespace[KEY] = [*callbacks[:place], *callbacks[place + 1 :], named]
        try:
            self.whole(parser, namespace, values, f"{CALLBACKS}.{self.argument}")
        except TypeError as error:  # it names the list
            raise TypeError(str(error).replace(f'"{KEY}"', f'"{_full(self.name)}"')) from error
        *others, changed = namespace[KEY]
        namespace[KEY] = [*others[:place], changed, *others[place:]]
        if not self.name:
            rank_zero_info(f"{option_string} is about {_name(changed)}, the last of the callbacks")


def _full(name: str) -> str:
    return f"{KEY}.{name}" if name else KEY


def _callbacks(namespace: Any) -> list[Any]:
    """Return the callbacks that were given so far; a single one need not be in a list."""
    found = namespace.get(KEY)
    return list(found) if isinstance(found, list) else [] if found is None else [found]


def _place(callbacks: list[Any], name: str, flag: str) -> int:
    """Find a callback by name or import path.

    Raises:
        argparse.ArgumentError: if it is not there, or twice.
    """
    names = [_name(each) for each in callbacks]
    if not name:
        listed = f" The callbacks are {', '.join(names)}." if names else ""
        raise argparse.ArgumentError(None, f"{flag}: give the name of a callback.{listed}")
    short = name.rpartition(".")[2]
    found = [i for i, each in enumerate(names) if each == short]
    if "." in name:
        found = [i for i in found if _class_of(callbacks[i]) is _import(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise argparse.ArgumentError(
            None, f"{flag}: {name} is in the list of callbacks {len(found)} times. Change the configuration instead."
        )
    remedy = nearest(short, names) or ("." if flag.startswith(REMOVE) else f". Add it with {CALLBACKS}+={name}.")
    listed = f", which are {', '.join(names)}" if names else ", as there are none"
    raise argparse.ArgumentError(None, f"{flag}: {name} is not among the callbacks{listed}{remedy}")


def _require_argument(callbacks: list[Any], place: int, argument: str, flag: str) -> None:
    """Raise an error that names the callback, unless it has the argument."""
    if not callbacks:
        raise argparse.ArgumentError(None, f"{flag}: there is no callback yet. Add one with {CALLBACKS}+=NAME before.")
    first = argument.removeprefix("init_args.").partition(".")[0]
    if first in ("class_path", "dict_kwargs"):
        return
    known = _arguments(callbacks[place])
    if known is None or first in known:
        return
    name = _name(callbacks[place])
    which = "" if f".{name}." in f"{flag}." else ", the last of the callbacks,"
    if not first:
        raise argparse.ArgumentError(None, f"{flag}: which argument? {name} has {', '.join(known)}.")
    by_name = {_name(each).lower(): _name(each) for each in callbacks}
    if first.lower() in by_name:
        meant = f"{CALLBACKS}.{by_name[first.lower()]}.{argument.removeprefix('init_args.').partition('.')[2]}"
        raise argparse.ArgumentError(None, f"{flag}: there is no such option; did you mean {meant}?")
    others = [_name(each) for each in callbacks if first in (_arguments(each) or ())]
    close = nearest(first, known)
    if which and others:
        close = f"; did you mean {CALLBACKS}.{others[-1]}.{argument}?"
    raise argparse.ArgumentError(None, f"{flag}: {name}{which} has no argument {first!r}{close or '.'}")


def _arguments(callback: Any) -> list[str] | None:
    """Return the arguments of a callback, or None where it takes any."""
    cls = _class_of(callback)
    parameters = inspect.signature(cls).parameters if cls else {}
    if (not parameters and cls is None) or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return list(parameters)


def _name(callback: Any) -> str:
    return str(getattr(callback, "class_path", callback)).rpartition(".")[2]


def _class_of(callback: Any) -> Any:
    return _import(str(getattr(callback, "class_path", callback)))


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
