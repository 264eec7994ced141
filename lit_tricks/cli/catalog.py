"""What the command line can use, by name: read from source files and configurations, so that nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path

from lit_tricks.utils.config_files import CONFIGS

__all__ = ["LIGHT_COMMANDS", "TRAINER_COMMANDS", "Entry", "commands", "configs", "definition", "plain", "public_names"]

PACKAGE = Path(__file__).parents[1]
TRAINER_COMMANDS = {
    "fit": "Train a model, and leave its checkpoints and a report in a folder of its own.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
}
LIGHT_COMMANDS = {
    "completion": "Print a script that completes commands and options in the shell.",
    "list": "List tricks, configurations, models, data and optimizers, one a line.",
    "show": "Show what a trick, a data module, a model or a configuration does, with its arguments.",
}


@dataclass(frozen=True)
class Entry:
    """A class, a function or a configuration.

    Args:
        name: as it is given on the command line.
        text: its docstring, or the comment at the top of the file.
        signature: its arguments with their defaults, as in Python; empty for a configuration.
        file: where it is defined.
    """

    name: str
    text: str
    signature: str
    file: Path

    @property
    def summary(self) -> str:
        """The first line of the text, without links and full stop."""
        return plain(self.text.partition("\n")[0]).removesuffix(".")


def plain(text: str) -> str:
    """Return Markdown with the names of links instead of the links."""
    return re.sub(r"\[([^\]]+)\](?:\([^)]*\)|\[\w+\])", r"\1", text).replace("``", "`")


def public_names(package: str) -> dict[str, Entry]:
    """Return what a package of ours exports: the classes and functions in its ``__all__``, in this order.

    Args:
        package: name below ``lit_tricks``, such as "callbacks".
    """
    tree = _tree(PACKAGE / package / "__init__.py")
    origins = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found = (definition(name, *origins[name]) for name in _all(tree) if name in origins)
    return {entry.name: entry for entry in found if entry}


def commands() -> dict[str, str]:
    """Return the names of all commands with what they do, the commands that run a Trainer first."""
    others = {name: entry.summary for name, entry in public_names("commands").items()} | LIGHT_COMMANDS
    return TRAINER_COMMANDS | dict(sorted(others.items()))


@cache
def configs() -> dict[str, Entry]:
    """Return the configurations that are installed, by their names; not the sweeps, which are for W&B."""
    files = sorted(CONFIGS.rglob("*.yaml"), key=lambda file: (len(file.relative_to(CONFIGS).parts), file))
    names = {file.relative_to(CONFIGS).with_suffix("").as_posix(): file for file in files}
    return {name: _config(name, file) for name, file in names.items() if not name.startswith("sweeps/")}


def _config(name: str, file: Path) -> Entry:
    """Take the first sentence of the comment at the top as the first line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in _until_blank(lines))
    return Entry(name, re.split(r"(?<=[.]) (?=[A-Z])", comment)[0].rstrip(":"), "", file)


def _until_blank(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#") or line.strip() == "#":
            return
        yield line


def definition(name: str, module: str, original: str = "") -> Entry | None:
    """Return the class or function of a module of ours, or the group of commands that is a package, or None."""
    parts, original = module.split(".")[1:], original or name
    group = PACKAGE.joinpath(*parts, original, "__init__.py")
    if group.is_file():
        return Entry(name, cleandoc(ast.get_docstring(_tree(group)) or ""), "", group)
    file = PACKAGE.joinpath(*parts).with_suffix(".py")
    file = file if file.is_file() else PACKAGE.joinpath(*parts, "__init__.py")
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == original:
            return Entry(name, cleandoc(ast.get_docstring(node) or ""), _signature(node), file)
    return None


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the arguments with their defaults, without types."""
    inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    function = node if isinstance(node, ast.FunctionDef) else next(iter(inits), None)
    if function is None:
        return ""
    arguments = function.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    arguments.args = [each for each in arguments.args if each.arg != "self"]
    return ast.unparse(arguments)


def _all(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
