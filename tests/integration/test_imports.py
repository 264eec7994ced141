"""Check imports: callbacks need only torch and Lightning, imports go one way, and no modules import each other."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import lit_tricks

PACKAGE = Path(lit_tricks.__file__).parent
LIGHTNING = ("lightning", "pytorch_lightning")


# ---------------------------------------------------------------------------------------------------------------------
# In a new process

IMPORTED = """
import json, logging, sys
import lightning.pytorch, pytorch_lightning
root, before = logging.getLogger(), set(sys.modules)
loggers = len(root.handlers), root.level
import lit_tricks.callbacks
ours = logging.getLogger("lit_tricks")
assert loggers == (len(root.handlers), root.level)
assert (ours.handlers, ours.level, ours.propagate) == ([], logging.NOTSET, True), "the import sets up logging"
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def imported() -> tuple[set[str], set[str]]:
    """Modules that Lightning brings, and those that the callbacks bring beyond it. Warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", IMPORTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, ""), "the import is not silent"
    before, new = json.loads(done.stdout)
    return set(before), set(new)


@pytest.mark.slow
def test_callbacks_bring_nothing_that_lightning_does_not(imported):
    before, new = imported
    assert "torch" in before
    brought = {name.partition(".")[0] for name in new} - {name.partition(".")[0] for name in before}
    assert brought - set(sys.stdlib_module_names) == {"lit_tricks"}
    for heavy in ("timm", "torchvision", "wandb", "jsonargparse", "matplotlib", "sklearn"):
        assert not [name for name in new if name.partition(".")[0] == heavy]


def test_callbacks_bring_no_other_part_of_ours(imported):
    ours = {name for name in imported[1] if name.startswith("lit_tricks")}
    assert "lit_tricks.callbacks" in ours
    others = {name for name in ours if not name.startswith(("lit_tricks.callbacks", "lit_tricks.utils"))}
    assert others == {
        "lit_tricks",
        "lit_tricks._compat",
        "lit_tricks.tasks",
    }  # the names of the tasks, not their modules


def test_package_lists_every_public_name():
    listed = dir(lit_tricks)
    assert {"Trick", "callbacks", "data", "functional", "models", *lit_tricks.callbacks.__all__} <= set(listed)
    assert set(lit_tricks.__all__) <= set(listed)
    for name in lit_tricks.__all__:
        assert getattr(lit_tricks, name) is not None
    with pytest.raises(AttributeError, match="Triks"):
        _ = lit_tricks.Triks


# ---------------------------------------------------------------------------------------------------------------------
# With one Lightning, or none


def base_without(missing: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> type:
    class Missing:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name in missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    for package in missing:
        monkeypatch.delitem(sys.modules, package)
        monkeypatch.delitem(sys.modules, f"{package}.pytorch", raising=False)
    spec = importlib.util.spec_from_file_location("another_base", PACKAGE / "callbacks" / "base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Trick


def test_trick_is_a_callback_of_both_packages():
    from lit_tricks.callbacks.base import Trick

    for package in ("lightning.pytorch", "pytorch_lightning"):
        assert issubclass(Trick, importlib.import_module(package).Callback)


@pytest.mark.parametrize(("missing", "there"), [LIGHTNING, LIGHTNING[::-1]])
def test_trick_is_a_callback_of_the_one_that_is_installed(missing, there, monkeypatch):
    packages = {cls.__module__.partition(".")[0] for cls in base_without((missing,), monkeypatch).__mro__}
    assert there in packages
    assert missing not in packages


def test_no_lightning_is_an_error_that_says_what_to_install(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        base_without(LIGHTNING, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# As written

# What these parts may import of ours. The others, and what is private to them, stand further down the stream.
ALLOWED: dict[str, set[str]] = {
    "_compat": set(),
    "utils": {"_compat", "utils"},
    "callbacks": {"_compat", "callbacks", "utils"},
    "models": {"models", "utils"},
    "data": {"_compat", "data", "utils"},
    "tasks": {"_compat", "callbacks", "models", "tasks", "utils"},
    "classifier": {"tasks"},
    "detector": {"tasks"},
    "segmenter": {"tasks"},
    "functional": {"callbacks", "utils"},
    "run": {"_compat", "callbacks", "run", "tasks", "utils"},
    "__init__": {"callbacks", "commands", "data", "functional", "models", "tasks"},
}
# What a teacher is built with where it is given by name or file; the tests above see that it is not imported before.
LAZY = {"teacher.py": {"timm", "lit_tricks.tasks.classification", "lit_tricks.tasks.segmentation"}}
LAST = {"cli": {"__main__", "cli"}, "commands": {"__init__", "cli", "commands"}}  # who may import these


def imports(file: Path) -> Iterator[str]:
    """Dotted names that the file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            if node.module in ("lit_tricks", "lit_tricks.callbacks"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))
TRICK_FILES = {f"lit_tricks.callbacks.{file.stem}" for file in (PACKAGE / "callbacks").glob("*.py")} - {
    "lit_tricks.callbacks.base",
    "lit_tricks.callbacks.__init__",
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    part = part_of(file)
    names = set(imports(file)) - LAZY.get(file.name, set())
    parts = {name.split(".")[1] for name in names if name.startswith("lit_tricks.")} & set(map(part_of, FILES))
    assert parts <= ALLOWED.get(part, parts)
    for last, importers in LAST.items():
        assert last not in parts or part in importers


def test_parts_of_the_rules_exist():
    assert ALLOWED.keys() <= set(map(part_of, FILES))


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Modules of ours that each of them imports: anywhere in its file, also in functions and for type checkers.

    Args:
        files: the source of each module, by its dotted name.
    """
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {name if name in files else str(node.module) for name in full}
        graph[module] = names & files.keys()
    return graph


def cycles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """The strongly connected components of more than one module, and modules that import themselves."""
    reached = {}
    for start in graph:
        found, waiting = set(), list(graph[start])
        while waiting:
            if (module := waiting.pop()) not in found:
                found.add(module)
                waiting += graph[module]
        reached[start] = found
    return {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
        if module in reached[module]
    }


@pytest.mark.slow
def test_modules_form_no_cycle():
    assert cycles(import_graph({module_of(file): file.read_text(encoding="utf-8") for file in FILES})) == set()


@pytest.mark.parametrize(
    "back",
    [
        "import p.a",
        "from p.a import x",
        "from p import a",
        "if TYPE_CHECKING:\n    from p.a import X",
        "def f():\n    from p.a import x",
    ],
)
def test_cycles_are_found_however_they_are_written(back):
    files = {"p": "", "p.a": "from p.b import y", "p.b": "from p.c import z", "p.c": back, "p.d": "import p.a"}
    assert cycles(import_graph(files)) == {frozenset({"p.a", "p.b", "p.c"})}


# File names that stand in several packages, and what such a file holds in each of them.
SAME_NAME = {
    "__init__.py": "what its package exports",
    "base.py": "the base class of a package's classes",
    "callback.py": "the callback that a package of helpers serves",
    "loader.py": "the DataLoader of a package's data",
    "segmentation.py": "semantic segmentation: its networks in models, its task in tasks",
    "voc.py": "Pascal VOC: once for detection, once for segmentation",
}


def test_files_of_one_name_hold_the_same_thing():
    counts = Counter(file.name for file in FILES)
    assert {name for name, count in counts.items() if count > 1} == SAME_NAME.keys()


@pytest.mark.parametrize("file", sorted((PACKAGE / "callbacks").rglob("*.py")), ids=lambda file: file.name)
def test_callbacks_import_torch_lightning_and_helpers(file):
    if file.name == "__init__.py":
        return
    for name in set(imports(file)) - LAZY.get(file.name, set()):
        top = name.partition(".")[0]
        if top == "lit_tricks":
            assert name not in TRICK_FILES, f"{file.name} imports {name}"
        else:
            allowed = {"torch", "lightning_utilities", *LIGHTNING} | set(sys.stdlib_module_names)
            assert top in allowed, f"{file.name} imports {name}"
