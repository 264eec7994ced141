"""The READMEs of sub-packages and ARCHITECTURE name what exists, and the table of operations is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lit_tricks
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import CASTS, JOINS, MOVES, SoftTarget, carrying

PACKAGE = Path(lit_tricks.__file__).parent
READMES = sorted((PACKAGE / "callbacks").glob("*/README.md"))
ARCHITECTURE = PACKAGE.parent / "ARCHITECTURE.md"


def test_each_sub_package_of_callbacks_has_a_readme():
    packages = {path.parent for path in (PACKAGE / "callbacks").glob("*/__init__.py")}
    assert packages == {readme.parent for readme in READMES}


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_readme_fits_a_screen_and_lists_every_file(readme):
    text = readme.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 150
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", text, re.MULTILINE))
    assert listed == {path.name for path in readme.parent.glob("*.py")} - {"__init__.py"}


def test_architecture_names_what_exists():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(\.py|/)` \|", text, re.MULTILINE)
    assert listed
    assert all((PACKAGE / name).is_dir() if end == "/" else (PACKAGE / f"{name}.py").is_file() for name, end in listed)
    edges = re.findall(r"^ +(\w+) --> (\w+)$", text, re.MULTILINE)  # from what is imported to what imports it
    assert edges
    for imported, importer in edges:
        files = [PACKAGE / f"{importer}.py", *(PACKAGE / importer).rglob("*.py")]
        sources = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        assert any(f"lit_tricks.{imported}" in source for source in sources), f"{importer} does not import {imported}"


def operations(kind: str) -> list[str]:
    """Names in the first column of a row of the table in soft_targets."""
    text = (PACKAGE / "callbacks" / "soft_targets" / "README.md").read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if line.startswith("|") and kind in line.split("|")[1]]
    return re.findall(r"`(?:F\.)?(\w+)`", row.split("|")[1])


@pytest.mark.parametrize(
    ("kind", "functions"), [("`view`", MOVES), ("`long`", CASTS), ("`stack` of targets of one batch", JOINS)]
)
def test_operations_in_the_table_keep_a_soft_target(kind, functions):
    names = {getattr(function, "__name__", "") for function in functions}
    assert operations(kind)
    assert set(operations(kind)) <= names


def test_comparison_gives_a_plain_tensor_and_joins_of_batches_plain_labels():
    one, other = (carrying(torch.arange(3), LossSpec(("A trick",))) for _ in range(2))
    assert type(torch.stack([one, one])) is SoftTarget
    assert type(torch.cat([one, other])) is torch.Tensor
    assert type(one == 1) is torch.Tensor
