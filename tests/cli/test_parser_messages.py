"""Each kind of message that is shortened is produced by the installed jsonargparse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule
from torch.optim import Optimizer

import lit_tricks.data  # noqa: F401  # the parser finds the short names of classes that are imported
from lit_tricks.cli.parser_messages import RULES, shorten


def message_of(*words: str) -> str:
    """Return the message for these words of a parser built as for ``lit-tricks``."""
    command = ArgumentParser(exit_on_error=False)
    command.add_argument("--config", action="config")
    command.add_argument("--trainer.max_epochs", type=int | None)
    command.add_argument("--trainer.callbacks", type=list[Callback] | Callback | None)
    command.add_argument("--layers", type=Sequence[str] | None)
    command.add_argument("--schedule", type=dict[str, float])
    command.add_argument("--optimizer", type=Callable[[Iterable[Any]], Optimizer])
    command.add_subclass_arguments(LightningDataModule, "data", required=True)
    parser = ArgumentParser(exit_on_error=False)
    commands = parser.add_subcommands()
    commands.add_subcommand("fit", command)
    commands.add_subcommand("test", ArgumentParser(exit_on_error=False))
    with pytest.raises(argparse.ArgumentError) as caught:
        parser.parse_args(list(words))
    return caught.value.message


FIT = ("fit", "--data=Digits")
CASES = {
    "_no_command": [((), "choose a command, such as fit")],
    "_unknown_command": [(("fitt",), "there is no command 'fitt'; did you mean 'fit'?")],
    "_unknown_argument_of_class": [
        ((*FIT, "--optimizer=torch.optim.SGD", "--optimizer.momentun=1"), "SGD has no argument 'momentun'; did you"),
        ((*FIT, "--data.batch_sise=3"), "Digits has no argument 'batch_sise'; did you mean 'batch_size'?"),
    ],
    "_missing_argument_of_class": [(("fit", "--data=ImageFolder"), "--data: ImageFolder needs root.")],
    "_unknown_argument": [
        ((*FIT, "--trainr.max_epochs=1"), "no argument 'trainr.max_epochs'; did you mean 'trainer.max_epochs'?"),
        ((*FIT, "--config=trainr.yaml"), "no argument 'trainr.max_epochs'; did you mean 'trainer.max_epochs'?"),
    ],
    "_extra_word": [
        ((*FIT, "quickstart"), "'quickstart' is not an option; did you mean --config quickstart?"),
        ((*FIT, "extra"), "'extra' is not an option. Options start with --."),
    ],
    "_missing_argument": [(("fit",), "fit needs --data, or a configuration")],
    "_other_class": [
        ((*FIT, "--config=callbacks.yaml"), "--trainer.callbacks: 'torch.nn.Linear' is no Callback."),
        ((*FIT, "--trainer.callbacks=torch.nn.Linear"), "--trainer.callbacks: 'torch.nn.Linear' is no Callback."),
        ((*FIT, "--optimizer=torch.nn.Linear"), "--optimizer: 'torch.nn.Linear' is no Optimizer."),
    ],
    "_unknown_class": [
        ((*FIT, "--trainer.callbacks=WarmupCosin"), "'WarmupCosin' is unknown; did you mean 'WarmupCosine'?"),
        ((*FIT, "--trainer.callbacks=lit_tricks.X"), "--trainer.callbacks: 'lit_tricks.X' is unknown."),
        ((*FIT, "--trainer.callbacks=tricks_lit.X"), "--trainer.callbacks: 'tricks_lit.X' is unknown."),
        ((*FIT, "--optimizer=torch.optim.SDG"), "'torch.optim.SDG' is unknown; did you mean 'SGD'?"),
        ((*FIT, "--trainer.callbacks=Classifier"), "--trainer.callbacks: 'Classifier' is no Callback."),
    ],
    "_failed_import": [
        (("fit", "--data=networks.Net"), "--data: 'networks.Net' cannot be imported: cannot import name 'Backbone'"),
        (("fit", "--data=needy.Net"), "--data: 'needy.Net' cannot be imported: No module named 'absent'"),
    ],
    "_other_type": [
        ((*FIT, "--data.batch_size=3.5"), "--data.batch_size: '3.5' is not int."),
        ((*FIT, "--trainer.max_epochs=two"), "--trainer.max_epochs: 'two' is not int or null."),
        ((*FIT, "--layers=layer4"), "--layers: 'layer4' is not a list or null. Write [layer4]."),
        ((*FIT, "--schedule=layer4:1"), "--schedule: 'layer4:1' is not a dictionary. Write '{name: value}'."),
        ((*FIT, "--data.images_on=disk"), "--data.images_on: 'disk' is not one of 'auto', 'device'"),
    ],
}
RULE = {rule.format.__name__: rule for rule in RULES}


@pytest.mark.parametrize("kind", RULE)
def test_shorten_example_message_is_produced_by_installed_jsonargparse(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("trainr.yaml").write_text("trainr: {max_epochs: 1}")
    Path("callbacks.yaml").write_text("trainer: {callbacks: [{class_path: torch.nn.Linear}]}")
    Path("networks.py").write_text("from networks import Backbone")
    Path("needy.py").write_text("import absent")
    example = re.findall(r"\w+", RULE[kind].example)
    messages = [message_of(*words) for words, _ in CASES[kind]]
    for message, (_, text) in zip(messages, CASES[kind], strict=True):
        assert re.search(RULE[kind].pattern, message, re.MULTILINE)
        assert text in shorten(message)
    # quotes in messages differ between versions of Python
    assert any(" ".join(example) in " ".join(re.findall(r"\w+", message)) for message in messages)


def test_shorten_unknown_kind_returns_message() -> None:
    assert shorten("\nsomething else\n") == "something else"


def test_shorten_names_an_argument_of_the_command() -> None:
    assert shorten("unrecognized arguments: --outptu=3", ["output"]).endswith("'outptu'; did you mean 'output'?")
