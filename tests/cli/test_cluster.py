"""The scripts of configs/cluster call what is there, with words that are understood."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import built, workplace, write_image_folder
from torch.distributed.run import get_args_parser

from lit_tricks.commands.data import shard
from lit_tricks.utils.config_files import CONFIGS

SCRIPTS = sorted((CONFIGS / "cluster").glob("*.sh"))
ADDED = ["--data.root=shards", "--trainer.precision=32-true"]  # no bucket here, and no GPU
NOTES = f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('words.json', 'w'))\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        shard(str(write_image_folder(tmp_path / "images")), "shards")
        for name in ("srun", "torchrun"):  # which note how they were called
            Path(name).write_text(NOTES)
            Path(name).chmod(stat.S_IRWXU)
        yield tmp_path


def words_of(script: Path, folder: Path) -> list[str]:
    """Return the arguments that a script passes on two machines."""
    given = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "42", "MACHINES": "2", "FIRST": "10.0.0.1"}
    environment = os.environ | given | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), *ADDED], env=environment, check=True, timeout=60)
    words: list[str] = json.loads(Path("words.json").read_text())
    return words


def check_fit(monkeypatch: pytest.MonkeyPatch, words: list[str], processes: int) -> Any:
    made = built(monkeypatch, *words)
    assert type(made.datamodule).__name__ == "Streaming"
    assert (made.trainer.num_nodes, made.trainer.num_devices) == (2, processes)
    assert made.datamodule.hparams["batch_size"] == 128  # of the recipe
    return made


def test_there_are_some() -> None:
    assert [script.stem for script in SCRIPTS] == ["slurm", "torchrun"]
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


@pytest.mark.slow
def test_slurm_script_starts_a_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = CONFIGS / "cluster" / "slurm.sh"
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert len(options) == text.count("\n#SBATCH")
    assert options["signal"] == "SIGUSR1@90"  # what Lightning listens to
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "8", "8")
    command, *words = words_of(script, folder)
    assert command == "lit-tricks"
    made = check_fit(monkeypatch, words, processes=int(options["ntasks-per-node"]))
    assert made.trainer.default_root_dir == "runs/42"  # where its checkpoint is looked for, when it was queued again


@pytest.mark.slow
def test_torchrun_script_starts_a_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = get_args_parser().parse_args(words_of(CONFIGS / "cluster" / "torchrun.sh", folder))
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")
    assert (arguments.module, arguments.training_script) == (True, "lit_tricks")
    check_fit(monkeypatch, arguments.training_script_args, processes=int(arguments.nproc_per_node))
