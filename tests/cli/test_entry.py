"""The start of the command line: what it answers at once, and the names that it lists, shows and completes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.cli import cli, done

import lit_tricks
from lit_tricks import callbacks, data
from lit_tricks.cli.catalog import commands, configs, public_names
from lit_tricks.cli.completion import SHELLS

LIGHT = (
    *(("--version",), ("--help",), ("list",), ("list", "tricks"), ("show", "EMA")),
    *(("completion", "bash"), ("completion", "zsh"), ("fitt",), ()),
)
SCRIPT = f"""
import sys
from lit_tricks.cli import main
for words in {LIGHT!r}:
    try:
        main(list(words))
    except SystemExit as stop:
        print("code", stop.code)
heavy = {{"torch", "lightning", "timm", "wandb", "jsonargparse"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""


@pytest.mark.slow
def test_commands_without_torch_import_none() -> None:
    process = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert f"lit-tricks {lit_tricks.__version__}\n" in process.stdout
    assert process.stdout.count("code 2") == 2  # no such command, and none at all
    assert "did you mean 'fit'?" in process.stderr


def test_names_are_public_and_only_imported_when_used() -> None:
    assert set(callbacks.__all__) < set(lit_tricks.__all__) <= set(dir(lit_tricks))
    assert lit_tricks.EMA is callbacks.EMA
    with pytest.raises(ImportError, match="EMMA"):
        from lit_tricks import EMMA  # noqa: F401


def test_the_catalog_has_what_the_packages_export() -> None:
    assert list(public_names("callbacks")) == callbacks.__all__
    assert list(public_names("data")) == data.__all__
    for entry in (*public_names("callbacks").values(), *public_names("data").values()):
        assert entry.summary
        assert "](" not in entry.summary
        assert entry.signature or "self" not in entry.signature
    assert {"fit", "test", "ablate", "data", "list", "show", "completion"} <= set(commands())
    assert all(commands().values())


@pytest.mark.parametrize("kind", ["tricks", "configs", "data", "optimizers"])
def test_a_list_has_a_line_for_each_name(kind: str) -> None:
    lines = done("list", kind).out.splitlines()
    names = [line.split()[0] for line in lines]
    known = {"tricks": callbacks.__all__, "data": data.__all__, "configs": [*configs()]}
    assert names == known.get(kind, [name for name in configs() if name.startswith("optimizers/")])
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_lists_of_models_and_patterns() -> None:
    models = done("list", "models", "RESNET*").out.splitlines()
    assert models[0].startswith("resnet ")
    assert any(line.startswith("resnet50 ") and "a1_in1k" in line for line in models)
    assert [line.split()[0] for line in done("list", "tricks", "Warmup*").out.splitlines()] == [
        "WarmupCosine",
        "WarmupExponential",
        "WarmupLinear",
        "WarmupPoly",
        "WarmupStableDecay",
        "WarmupStep",
    ]
    everything = done("list").out
    for kind in ("tricks", "configs", "models", "data", "optimizers"):
        assert re.search(rf"^{kind}$", everything, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("EMA", ["EMA(decay=None, ", "Args:\n    decay: ", "--trainer.callbacks+=EMA", "--config tricks/ema"]),
        ("ema", ["EMA(decay=None, "]),
        ("warmup-cosine", ["WarmupCosine(warmup_epochs="]),
        ("ImageFolder", ["ImageFolder(root, image_size=224", "--data ImageFolder"]),
        ("Classifier", ["Classifier(model='resnet'", "--model Classifier"]),
        ("resnet", ["resnet(", "--model.model resnet"]),
        ("small_vgg", ["small_vgg(num_classes=10, *, in_chans=3", "--model.model small_vgg"]),
        ("resnet50", ["3 x 224 x 224", "resnet50.a1_in1k", "--model.model resnet50"]),
        ("adamw", ["--config optimizers/adamw", "class_path: torch.optim.AdamW"]),
        ("tricks/ema", ["--config tricks/ema", "class_path: EMA"]),
        ("quickstart", ["--config quickstart", "max_epochs: 20"]),
    ],
)
def test_a_card_of_a_name(name: str, expected: list[str]) -> None:
    out = done("show", name).out
    for text in expected:
        assert text in out


@pytest.mark.parametrize("name", [*callbacks.__all__, *data.__all__, *configs()])
def test_every_name_has_a_card(name: str) -> None:
    out = done("show", name).out
    assert "On the command line: --" in out
    assert len(out.splitlines()) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "Emma"), "there is nothing called 'Emma'; did you mean 'EMA'?"),
        (("show", "xyzzy"), "there is nothing called 'xyzzy'; see `lit-tricks list`."),
        (("show",), "the following arguments are required: name"),
        (("list", "trick"), "there is no list of 'trick'; did you mean 'tricks'?"),
        (("list", "tricks", "Warmdown*"), "there are no tricks like 'Warmdown*'."),
        (("completion", "cmd"), "invalid choice: 'cmd'"),
    ],
)
def test_unknown_names_are_one_line(words: tuple[str, ...], message: str) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_help_fits_80_columns() -> None:
    lines = done("--help").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 60


# Completion

CASES = {
    "fi": {"fit", "fixres"},
    "fit --trainer.max": {"--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"},
    "fit --config tricks/warmup_s": {"tricks/warmup_stable_decay", "tricks/warmup_step"},
    "fit --config = quick": {"quickstart"},
    "fit --config mine": {"mine.yaml"},
    "fit --data Digit": {"DigitDetection", "DigitSegmentation", "Digits"},
    "fit --data Digits --trainer.callbacks+ = Mix": {"MixUp"},
    "fit --trainer.callbacks- Mix": {"MixUp"},
    "fit --trainer.callbacks.EMA.dec": {"--trainer.callbacks.EMA.decay"},
    "test --ckpt_path mine": {"mine.yaml"},
    "test --out mine": {"mine.yaml"},
    "fit --trainer.enable_progress_bar fa": {"false"},
    "race --candidates tricks/em": {"tricks/ema"},
    "data prev": {"preview"},
    "data preview --ou": {"--out"},
    "export mine.yaml --format ti": {"timm"},
    "ablate --stack tricks/em": {"tricks/ema"},
    "average mine": {"mine.yaml"},
    "list tri": {"tricks"},
    "show quick": {"quickstart"},
}
TRY = """
source "$1"
shift
for line in "$@"; do
  read -ra words <<< "lit-tricks $line"
  COMP_WORDS=("${words[@]}"); COMP_CWORD=$(( ${#words[@]} - 1 )); COMPREPLY=()
  _lit_tricks
  echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {shell: done("completion", shell).out for shell in SHELLS}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_commands_options_and_names(scripts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "script").write_text(scripts["bash"])
    command = ["bash", "-c", TRY, "bash", "./script", *CASES]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    found = dict(zip(CASES, ({*line.split()} for line in process.stdout.splitlines()), strict=True))
    assert found == CASES, process.stderr


IN_ZSH = {  # what a tab makes of a line
    "lit-tricks fixr": "lit-tricks fixres ",
    "lit-tricks fit --trainer.max": "lit-tricks fit --trainer.max_",
    "lit-tricks fit --trainer.max_ep": "lit-tricks fit --trainer.max_epochs=",
    "lit-tricks fit --config tricks/warm": "lit-tricks fit --config tricks/warmup_",
    "lit-tricks fit --config=quick": "lit-tricks fit --config=quickstart ",
    "lit-tricks fit --config mi": "lit-tricks fit --config mine.yaml ",
    "lit-tricks fit --trainer.callbacks+=Mi": "lit-tricks fit --trainer.callbacks+=MixUp ",
    "lit-tricks fit --trainer.callbacks-=Mi": "lit-tricks fit --trainer.callbacks-=MixUp ",
    "lit-tricks fit --trainer.callbacks.EMA.dec": "lit-tricks fit --trainer.callbacks.EMA.decay=",
    "lit-tricks test --ou": "lit-tricks test --out=",
    "lit-tricks data prev": "lit-tricks data preview ",
    "lit-tricks show quick": "lit-tricks show quickstart ",
    "lit-tricks list tri": "lit-tricks list tricks ",
}
ZSH = """PS1=; unsetopt beep; autoload -Uz compinit && compinit -u -d dump && eval "$(cat script)"
finish() { zle -I; print -r -- "<$BUFFER>"; BUFFER= }; zle -N finish; bindkey '^X' finish
echo rea''dy
"""


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_completes_commands_options_and_names(scripts: dict[str, str], tmp_path: Path) -> None:
    import pty  # not on Windows
    import select

    (tmp_path / "mine.yaml").touch()
    (tmp_path / "script").write_text(scripts["zsh"])
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb"})

    def read(until: str) -> str:
        shown, deadline = "", time.monotonic() + 60
        while not re.search(until, shown) and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536).decode("utf8", "replace")
        return shown

    try:
        os.write(terminal, ZSH.encode())
        read("ready")
        found = {}
        for line in IN_ZSH:
            os.write(terminal, f"{line}\t\x18".encode())
            found[line] = re.findall(r"<(lit-tricks.*)>", read(r"<lit-tricks.*>"))[-1]
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)
    assert found == IN_ZSH


def test_zsh_has_every_command_and_values_after_an_equals_sign(scripts: dict[str, str]) -> None:
    script = scripts["zsh"]
    for name in commands():
        assert re.search(rf"^    {name}:'", script, re.MULTILINE)
    assert "--trainer.callbacks+=[" in script
    assert "--config=}" in script
    assert '"--greedy[' in script  # an option without a value
