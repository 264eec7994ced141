"""``lit-tricks list`` and ``lit-tricks show``: find out what there is, without loading torch where possible."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import NoReturn

from lit_tricks.cli.catalog import Entry, configs, definition, plain, public_names
from lit_tricks.tasks import TASKS
from lit_tricks.utils.config_files import among, nearest

__all__ = ["KINDS", "LightParser", "show_names", "show_one"]


class LightParser(argparse.ArgumentParser):
    """A parser whose errors are raised."""

    def error(self, message: str) -> NoReturn:
        """Raise an error instead of printing the usage."""
        raise argparse.ArgumentError(None, message)


PACKAGES = {"tricks": "callbacks", "data": "data"}  # kinds of names that are classes of a package
KINDS = ("tricks", "configs", "models", "data", "optimizers")


def show_names(words: list[str]) -> None:
    """Run ``lit-tricks list``."""
    parser = LightParser("lit-tricks list", description="List what there is, one name a line.")
    parser.add_argument("kind", nargs="?", help=f"{', '.join(KINDS)}. All but the models of timm by default.")
    parser.add_argument("pattern", nargs="?", default="*", help='Names to list, such as "resnet*".')
    given = parser.parse_args(words)
    if given.kind not in (None, *KINDS):
        close = nearest(given.kind, KINDS) or among(list(KINDS))
        raise argparse.ArgumentError(None, f"there is no list of {given.kind!r}{close}")
    kinds = [given.kind] if given.kind else list(KINDS)
    for number, kind in enumerate(kinds):
        if not given.kind:
            _print([f"\n{kind}" if number else kind])
        rows = _rows(kind, timm=bool(given.kind))
        rows = {name: text for name, text in rows.items() if fnmatch(name.lower(), given.pattern.lower())}
        if not rows:
            raise argparse.ArgumentError(None, f"there are no {kind} like {given.pattern!r}.")
        _print(_columns(rows, indent="" if given.kind else "  "))


def show_one(words: list[str]) -> None:
    """Run ``lit-tricks show``."""
    parser = LightParser("lit-tricks show", description="Show the definition of a name.")
    parser.add_argument("name", help="A trick, data module, task, model or configuration, as `lit-tricks list` has it.")
    _print(_card(parser.parse_args(words).name))


def _rows(kind: str, timm: bool) -> dict[str, str]:
    """Return names with what they are."""
    if kind in PACKAGES:
        return {name: entry.summary for name, entry in public_names(PACKAGES[kind]).items()}
    if kind == "models":
        ours = {name: entry.summary for name, entry in _networks().items()}
        return ours | (_timm_models() if timm else {"...": "`lit-tricks list models` adds the models of timm"})
    found = {name: entry.summary for name, entry in configs().items()}
    return {name: text for name, text in found.items() if kind == "configs" or name.startswith("optimizers/")}


def _networks() -> dict[str, Entry]:
    """Return the networks that ``--model.model`` accepts by name, in addition to timm's."""
    return {name: public_names("models")[name] for name in ("resnet", "small_vgg")}


def _timm_models() -> dict[str, str]:
    """Return the models of timm, with their pretrained weights."""
    import timm

    weights: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for each in timm.list_pretrained():
        name, _, tag = each.partition(".")
        weights.setdefault(name, []).append(tag or "default")
    return {name: f"timm, weights: {', '.join(tags)}" if tags else "timm" for name, tags in weights.items()}


def _card(name: str) -> Iterator[str]:
    """Yield the lines of a card.

    Raises:
        argparse.ArgumentError: if there is no such name.
    """
    entry = _find(name)
    if entry is None:
        yield from _timm_card(name)
    elif not entry.signature and entry.file.suffix == ".yaml":
        yield f"On the command line: --config {entry.name}"
        yield f"File: {entry.file}"
        yield ""
        yield entry.file.read_text(encoding="utf-8").rstrip()
    else:
        yield f"{entry.name}({entry.signature})"
        yield ""
        yield plain(entry.text)
        yield ""
        yield f"On the command line: {_use(entry)}"


def _use(entry: Entry) -> str:
    if entry.name in public_names("callbacks"):
        line = f"class_path: {entry.name}\n"
        files = [
            name for name, each in configs().items() if name.startswith("tricks/") and line in each.file.read_text()
        ]
        return " or ".join([*(f"--config {name}" for name in files), f"--trainer.callbacks+={entry.name}"])
    flag = "data" if entry.name in public_names("data") else "model" if entry.name in TASKS else "model.model"
    return f"--{flag} {entry.name}"


def _find(name: str) -> Entry | None:
    """Return the object of a name. Case, hyphens and underscores are ignored if the name is unique."""
    classes, files = _classes(), configs()
    short = {each.rpartition("/")[2]: entry for each, entry in files.items()}
    for known in (classes, files):
        if name in known:
            return known[name]
    for known in (classes, files, short):
        if found := [entry for each, entry in known.items() if _letters(each) == _letters(name)]:
            return found[0]
    return None


def _classes() -> dict[str, Entry]:
    tasks = {name: definition(name, module) for name, module in TASKS.items()}
    found = {**public_names("callbacks"), **public_names("data"), **tasks, **_networks()}
    return {name: entry for name, entry in found.items() if entry}


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _timm_card(name: str) -> Iterator[str]:
    """Yield the card of a model of timm."""
    import timm

    model = name.partition(".")[0]
    if not timm.is_model(model):
        close = nearest(name, [*_classes(), *configs(), *timm.list_models()])
        raise argparse.ArgumentError(None, f"there is nothing called {name!r}{close or '; see `lit-tricks list`.'}")
    config = timm.get_pretrained_cfg(name)
    yield f"{name}: a model of timm"
    yield ""
    if config is not None:
        yield f"Input size: {' x '.join(map(str, config.input_size))}"
        yield f"Mean and standard deviation: {config.mean}, {config.std}"
    yield f"Pretrained weights: {', '.join(timm.list_pretrained(f'{model}.*')) or 'none'}"
    yield ""
    yield f"On the command line: --model.model {model}"


def _columns(rows: dict[str, str], indent: str) -> Iterator[str]:
    """Yield a line per row, cut to the width of a terminal."""
    left = max(map(len, rows))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for name, text in rows.items():
        line = f"{indent}{name:{left}}  {text}"
        yield f"{line[: width - 1]}…" if 0 < width < len(line) else line.rstrip()


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201
    sys.stdout.flush()  # an error of `lit-tricks list | head` belongs here
