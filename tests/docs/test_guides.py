"""Every code block of the documentation runs: Python as it stands, commands in a folder with a tiny run."""

from __future__ import annotations

import ast
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import FIT, cells_in_this_process, cli, done, workplace, write_image_folder, write_images

THREE_SMALL_STEPS = (
    *(
        "--trainer.max_epochs=3",
        "--trainer.limit_train_batches=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        "--name=steps",
    ),
    *("--data.batch_size=2", "--data.image_size=32", "--data.resize_size=32", "--data.num_workers=0"),
    "--model.model_args={depth: 18, width: 0.0625}",
)
DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in [*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")])


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the words of each ``lit-tricks`` command in the shell blocks of a page."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lit-tricks ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs ``runs/quickstart/v0`` and ``runs/finetune/v0``, and images in class folders."""
    with workplace(tmp_path_factory.mktemp("docs")) as folder:
        snapshots = ("--trainer.callbacks+=EMA", "--trainer.callbacks.power=[0.05,0.2]")
        done(*FIT, "--name=quickstart", *snapshots, "--trainer.limit_train_batches=8")
        write_image_folder(folder / "PATH")
        shutil.copytree("runs/quickstart", "runs/finetune")
        for number, name in enumerate(("ant", "bee", "cow")):
            write_images(folder / "photos" / name, 14, seed=number)
        shutil.copytree("photos/ant", "folder")
        shutil.copy("photos/ant/0.jpg", "new.jpg")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """Yield a copy of the folder, since pages write files of the same name."""
    with workplace(shutil.copytree(trained, tmp_path / "docs")) as folder:
        yield folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.trainer.connectors.data_connector.rank_zero_warn", lambda *_, **__: None)
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_guides_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells_in_this_process(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for words in commands(page):
        if "--data.root" in words and "finetune" in words:  # three steps, with random weights of a small network
            weights = {words.index("--model.weights") + i for i in (0, 1)} if "--model.weights" in words else set()
            outcome = cli(*(word for i, word in enumerate(words) if i not in weights), *THREE_SMALL_STEPS)
        elif words[0] == "fit":  # the configuration is built; the training is tested elsewhere
            outcome = cli(*words, "--print_config")
        elif words[0] in ("ablate", "race"):
            outcome = cli(*["tiny.yaml" if word == "quickstart" else word for word in words])
        else:
            outcome = cli(*words)
        assert outcome.code == 0, (words, outcome.err)
    assert Path.cwd() == folder


def test_pages_link_to_files_that_exist() -> None:
    for page in PAGES:
        text = (DOCS / page).read_text("utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+\.md)", text):
            known = (DOCS / page).parent / target
            assert known.is_file() or "tricks/" in target, (page, target)
        for path in re.findall(r"lit-tricks/(?:blob|tree)/main/([\w/.-]+)", text):
            assert os.path.exists(DOCS.parent / path), (page, path)


def literal(node: ast.AST) -> str:
    """Return a string of source code, with "" for its formatted values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value for part in node.values if isinstance(part, ast.Constant))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@pytest.mark.slow
def test_messages_of_the_guide_to_errors_exist() -> None:
    table = (DOCS / "guides" / "errors.md").read_text("utf-8").partition("|---")[2].partition("\n\n")[0]
    phrases = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    files = (DOCS.parent / "lit_tricks").rglob("*.py")
    texts = [literal(node) for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    assert len(phrases) > 5
    assert [phrase for phrase in phrases if not any(phrase in text for text in texts)] == []
