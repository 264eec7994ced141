"""Help: of every command on one page without imports, and of the classes that options name."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import built, cli, done, workplace

import lit_tricks
from lit_tricks import commands, data
from lit_tricks.cli import trainer_options
from lit_tricks.cli.catalog import plain, public_names
from lit_tricks.cli.commands import own_arguments
from lit_tricks.cli.pages import WIDTH
from lit_tricks.cli.parameters import parameter_names
from lit_tricks.commands import data as data_commands
from lit_tricks.tasks import TASKS

TRAINER = ("fit", "validate", "test")
OWN = {name: getattr(commands, name) for name in commands.__all__ if name != "data"}
OWN |= {f"data {name}": getattr(data_commands, name) for name in data_commands.__all__}
SCRIPT = """
import sys
from lit_tricks.cli import main
for words in sys.argv[1:]:
    main(words.split())
heavy = {"torch", "lightning", "timm", "wandb", "jsonargparse"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def page(*words: str) -> str:
    """A page of help, which must fit on a terminal and show nothing of Python."""
    out = done(*words).out
    assert max(map(len, out.splitlines())) <= WIDTH == 80
    for internal in ("<class", "Union[", "Optional[", "Literal[", "known subclasses", "torch.nn.modules", "]("):
        assert internal not in out
    return out


def described(out: str) -> dict[str, str]:
    """Options and arguments of a page, with their descriptions."""
    blocks = re.split(r"\n  (?=\S)", out.partition(":\n  ")[2])
    pairs = [re.split(r"\s{2,}|\n\s+", block.partition("\n\n")[0], maxsplit=1) for block in ["", *blocks][1:]]
    return {pair[0]: " ".join(pair[-1].split()) if len(pair) > 1 else "" for pair in pairs}


def test_no_page_imports_torch(tmp_path: Path) -> None:
    lines = [f"{name} --help" for name in (*TRAINER, *OWN, "data", "list", "show", "completion")]
    lines += ["fit --model.help Classifier", "test --data.help ImageFolder", "ablate --trainer.callbacks.EMA.help"]
    process = subprocess.run([sys.executable, "-c", SCRIPT, *lines], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", TRAINER)
def test_commands_of_the_trainer_have_a_short_page(command: str, flag: str) -> None:
    out = page(command, "--config", "quickstart", flag)
    assert len(out.splitlines()) < 150
    found = described(out)
    names = {name.split()[0] for name in found}
    assert {"--trainer.devices", "--model", "--data", "--ckpt_path", "--seed_everything"} <= names
    assert ("--name" in names, "--out" in names) == (command == "fit", command != "fit")
    assert all(text[-1] in ".)" for text in found.values()), "a description is cut"


def test_every_option_of_a_fit_is_explained_with_its_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with workplace(tmp_path):
        parser = built(monkeypatch, "fit", "--config=tiny.yaml").parsers["fit"]
    texts = {f"--trainer.{flag.split()[0]}": text for flag, text in trainer_options.TRAINER.items()}
    texts |= {option.flag.split()[0]: option.text for option in trainer_options.FIT["options"]}
    texts |= {option.flag.split()[0]: option.text for option in trainer_options.FIT["tricks"]}
    for action in parser._actions:
        flag = next((flag for flag in action.option_strings if flag.startswith("--")), "")
        if flag in ("--help", "--config", "--model", "--data", "--trainer", "--trainer.callbacks") or "help" in flag:
            continue
        if flag == "--trainer.callbacks-" or not flag:
            continue
        stated = re.search(r"\(default: ([^;)]+)", texts[flag])
        if action.default is not None and flag != "--print_config":
            value = str(action.default)
            value = value.lower() if isinstance(action.default, bool) else value
            assert stated, flag
            assert stated[1] == value, flag


@pytest.mark.parametrize("name", OWN)
def test_a_command_has_a_page_with_its_arguments(name: str) -> None:
    out = page(*name.split(), "--help")
    assert out.startswith(f"usage: lit-tricks {name} ")
    assert len(out.splitlines()) < 60
    found = {re.sub(r"^-\w, |[ .]+[A-Z{].*$| \.\.\.$", "", flag): text for flag, text in described(out).items()}
    for argument in own_arguments(OWN[name]):
        if argument != "fit_args":
            flag = f"--{argument.replace('_', '-')}"
            assert found.get(flag) or found.get(argument.upper()), argument


def test_a_group_lists_its_commands() -> None:
    out = page("data", "--help")
    assert {f"data {name}" for name in data_commands.__all__} <= described(out).keys()


CLASSES = {
    "--model.help": [*TASKS],
    "--data.help": data.__all__,
    "--trainer.callbacks.help": lit_tricks.callbacks.__all__,
}


def documentation_of(cls: type) -> dict[str, str]:
    """Return the descriptions of the arguments, also of arguments that a class passes on to its base class."""
    text = plain(inspect.cleandoc(cls.__doc__ or "")) + "\n"
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    documented = dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE))
    if documented.pop("kwargs", None) or "__init__" not in vars(cls):
        assert cls.__base__
        documented = documentation_of(cls.__base__) | documented
    return documented


@pytest.mark.parametrize(("flag", "name"), [(flag, name) for flag, names in CLASSES.items() for name in names])
def test_help_of_a_class_is_its_docstring(flag: str, name: str) -> None:
    cls = getattr(lit_tricks, name, None) or getattr(data, name)
    out = "".join(page("fit", flag, name).split()).lower()
    first_line = plain(inspect.cleandoc(cls.__doc__ or "")).partition("\n")[0]
    assert "".join(first_line.rstrip(".").split()).lower() in out
    documented = documentation_of(cls)
    assert documented.keys() == set(parameter_names(cls))
    for argument, text in documented.items():
        assert f".{argument}" in out
        assert "".join(text.split()).lower() in out


@pytest.mark.parametrize("command", [*TRAINER, "predict", "ablate", "data preview", "average"])
def test_every_command_explains_classes(command: str) -> None:
    for words in (("--model.help", "Classifier"), ("--data.help=imagefolder",), ("--trainer.callbacks.help", "EMA")):
        name = words[-1].rpartition("=")[2].lower()
        out = page(*command.split(), *words)
        assert out == page("fit", *words)
        assert f"={name} [options]" in out.lower()


def test_a_trick_explains_itself_behind_its_name() -> None:
    assert page("fit", "--trainer.callbacks.EMA.help") == page("fit", "--trainer.callbacks.help", "lit_tricks.EMA")
    assert "--trainer.callbacks.EMA.decay FLOAT" in page("fit", "--config=quickstart", "--trainer.callbacks.EMA.help")


def test_classes_of_others_are_explained_too() -> None:
    assert "--model.optimizer.momentum FLOAT" in page("fit", "--model.optimizer.help", "SGD")
    assert "params" not in described(page("fit", "--model.optimizer.help", "torch.optim.AdamW"))
    assert "--trainer.callbacks.EarlyStopping.monitor" in page("fit", "--trainer.callbacks.help", "EarlyStopping")
    assert "--trainer.logger.project" in page("fit", "--trainer.logger.help=WandbLogger")


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--model.help", [*TASKS]),
        ("--data.help", data.__all__),
        ("--trainer.callbacks.help", lit_tricks.callbacks.__all__),
        ("--model.optimizer.help", ["SGD", "AdamW", "Lamb"]),
        ("--trainer.logger.help", ["WandbLogger", "TensorBoardLogger"]),
    ],
)
def test_without_a_name_it_lists_the_classes(option: str, names: list[str]) -> None:
    out = page("fit", option)
    assert all(re.search(rf"\b{name}\b", out) for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "--trainer.callbacks.help", "Emma"), "'Emma' is unknown; did you mean 'EMA'?"),
        (("fit", "--trainer.callbacks.help", "nowhere.Emma"), "'nowhere.Emma' is unknown; did you mean 'EMA'?"),
        (("test", "--model.help=resnet50"), "--model.help: 'resnet50' is unknown."),
        (("data", "prevew", "--help"), "there is no command 'data prevew'; did you mean 'preview'?"),
        (("fitt", "--help"), "there is no command 'fitt'; did you mean 'fit'?"),
    ],
)
def test_help_for_what_does_not_exist(words: tuple[str, ...], message: str) -> None:
    outcome = cli(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_help_behind_the_dashes_is_for_the_runs() -> None:
    outcome = cli("ablate", "--config=nowhere", "--", "--help")
    assert "usage" not in outcome.out
    assert "nowhere" in outcome.err


def test_arguments_of_a_base_class_are_explained_too() -> None:
    found = described(page("fit", "--data.help", "ImageTable"))
    inherited = described(page("fit", "--data.help", "ImageFolder"))
    assert found["--data.random_erasing FLOAT"] == inherited["--data.random_erasing FLOAT"]
    assert all(found.values())


def test_the_catalog_has_arguments_of_source_files() -> None:
    found = {each.name: each for each in public_names("callbacks")["EMA"].arguments}
    assert (found["decay"].kind, found["decay"].default) == ("float | None", "None")
    modes = {each.name: each.kind for each in public_names("commands")["ablate"].arguments}
    assert modes["mode"] == "Literal['stack', 'single', 'drop']"


def test_the_page_of_a_module_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_page.py").write_text(
        "from lightning.pytorch import Callback\n\n\nclass Mine(Callback):\n"
        '    """Do it.\n\n    Args:\n        often: how often, 1 or more.\n    """\n\n'
        "    def __init__(self, often: int = 1) -> None: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found: Any = described(page("fit", "--trainer.callbacks.help", "own_page.Mine"))
    assert found == {"--trainer.callbacks.Mine.often INT": "How often, 1 or more. (default: 1)"}
