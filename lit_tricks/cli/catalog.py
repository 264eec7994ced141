"""List the names for the command line, from source files and configurations, without imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from inspect import cleandoc
from pathlib import Path

from lit_tricks.utils.config_files import CONFIGS

__all__ = [
    "LIGHT_COMMANDS",
    "TRAINER_COMMANDS",
    "Argument",
    "Entry",
    "commands",
    "configs",
    "definition",
    "plain",
    "public_names",
]

PACKAGE = Path(__file__).parents[1]
FIT_PARTS = ("data", "model", "trainer")  # arguments of a function that the options of `lit-tricks fit` make
TRAINER_COMMANDS = {
    "fit": "Train a model, and write its checkpoints and a report to a new run folder.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "test": "Evaluate a checkpoint on the test images.",
}
LIGHT_COMMANDS = {
    "completion": "Print a script that completes commands and options in the shell.",
    "list": "List tricks, configurations, models, data and optimizers, one per line.",
    "show": "Show what a trick, a data module, a model or a configuration does, with its arguments.",
}


@dataclass(frozen=True)
class Argument:
    """An argument of a class or a function.

    Args:
        name: of the argument.
        kind: its type, as in Python; empty if it has none.
        default: its default, as in Python; None if it must be given.
        keyword_only: whether it cannot be positional.
    """

    name: str
    kind: str
    default: str | None
    keyword_only: bool = False

    @property
    def choices(self) -> list[str]:
        """The values of a ``Literal`` in the type."""
        literals = ",".join(re.findall(r"Literal\[([^\]]*)\]", self.kind))
        return [str(value) for value in ast.literal_eval(f"[{literals}]")]

    @property
    def is_switch(self) -> bool:
        """Return whether it is off by default, and needs no value on the command line of a function."""
        return self.kind == "bool" and self.default == "False"


@dataclass(frozen=True)
class Entry:
    """A class, a function or a configuration.

    Args:
        name: as it is given on the command line.
        text: its docstring, or the comment at the top of the file.
        arguments: of the class or function.
        file: where it is defined.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    file: Path

    @property
    def takes_fit(self) -> bool:
        """Return whether it is a command that takes the options of `lit-tricks fit`."""
        return any(each.name == "trainer" for each in self.arguments)

    @property
    def own_arguments(self) -> list[Argument]:
        """The arguments of a command without the parts of a fit."""
        return [each for each in self.arguments if not (self.takes_fit and each.name in FIT_PARTS)]

    @property
    def signature(self) -> str:
        """The arguments with their defaults, as in Python."""
        parts = [each.name if each.default is None else f"{each.name}={each.default}" for each in self.arguments]
        keywords = [place for place, each in enumerate(self.arguments) if each.keyword_only]
        return ", ".join([*parts[: keywords[0]], "*", *parts[keywords[0] :]] if keywords else parts)

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
    origins = _origins(tree)
    found = (definition(name, *origins[name]) for name in _all(tree) if name in origins)
    return {entry.name: entry for entry in found if entry}


def _origins(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return module and name of what a module imports from others."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


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
    return Entry(name, re.split(r"(?<=[.]) (?=[A-Z])", comment)[0].rstrip(":"), (), file)


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
        return Entry(name, cleandoc(ast.get_docstring(_tree(group)) or ""), (), group)
    file = PACKAGE.joinpath(*parts).with_suffix(".py")
    file = file if file.is_file() else PACKAGE.joinpath(*parts, "__init__.py")
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == original:
            function = node if isinstance(node, ast.FunctionDef) else _init(node)
            own = tuple(_arguments(function, _literals(_tree(file)))) if function else ()
            entry = Entry(name, cleandoc(ast.get_docstring(node) or ""), own, file)
            base = _base(node, file) if function is None or function.args.kwarg else None
            return _with_arguments_of(base, entry) if base else entry
    return None


def _with_arguments_of(base: Entry, entry: Entry) -> Entry:
    """Add the arguments that a class passes on to its base class, and their descriptions."""
    known = {each.name for each in entry.arguments}
    passed = tuple(replace(each, keyword_only=True) for each in base.arguments if each.name not in known)
    passed = passed if entry.arguments else base.arguments
    head, own, rest = _sections(entry.text)
    _, described, _ = _sections(base.text)
    own.pop("kwargs", None)
    arguments = own | {name: text for name, text in described.items() if name not in own and name not in known}
    text = "".join([head, "Args:\n", *arguments.values(), rest]) if arguments else entry.text
    return replace(entry, text=text, arguments=entry.arguments + passed)


def _sections(text: str) -> tuple[str, dict[str, str], str]:
    """Split a docstring at its arguments: the text before, the description of each argument, and the text after."""
    match = re.search(r"^Args:\n((?: {4}.*\n?)+)", text, re.MULTILINE)
    if not match:
        head, mark, rest = text.partition("\nRaises:\n") if "\nRaises:\n" in text else text.partition("\nExample:\n")
        return f"{head.rstrip()}\n\n", {}, f"{mark}{rest}"
    blocks = re.findall(r"^ {4}(\w+)(: .*(?:\n {5,}.*)*)", match[1], re.MULTILINE)
    described = {name: f"    {name}{block}\n" for name, block in blocks}
    return text[: match.start()], described, text[match.end() :]


def _literals(tree: ast.Module) -> dict[str, str]:
    """Return the types that a module defines as a ``Literal``, by name."""
    found = {
        node.targets[0].id: ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return {name: text for name, text in found.items() if text.startswith("Literal[")}


def _init(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)


def _base(node: ast.ClassDef | ast.FunctionDef, file: Path) -> Entry | None:
    """Return the first base class of ours."""
    here = ".".join(("lit_tricks", *file.relative_to(PACKAGE).with_suffix("").parts))
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        module, name = _origins(_tree(file)).get(ast.unparse(base), (here, ast.unparse(base)))
        if module.startswith("lit_tricks.") and (found := definition(name, module)):
            return found
    return None


def _arguments(function: ast.FunctionDef, literals: dict[str, str]) -> Iterator[Argument]:
    found = function.args
    free = [*found.posonlyargs, *found.args]
    defaults: list[ast.expr | None] = [None] * (len(free) - len(found.defaults)) + found.defaults
    pairs = [*zip(free, defaults, strict=True), *zip(found.kwonlyargs, found.kw_defaults, strict=True)]
    for each, default in pairs:
        if each.arg != "self":
            kind = ast.unparse(each.annotation) if each.annotation else ""
            kind = re.sub(r"\w+", lambda word: literals.get(word[0], word[0]), kind)
            yield Argument(each.arg, kind, ast.unparse(default) if default else None, each in found.kwonlyargs)


def _all(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
