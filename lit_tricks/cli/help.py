"""Help for every command, from source files without importing them, and for classes that options name."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import docstring_parser

from lit_tricks.cli.catalog import TRAINER_COMMANDS, Argument, Entry, definition, plain, public_names
from lit_tricks.cli.pages import Option, page
from lit_tricks.cli.trainer_options import EVALUATION, FIT
from lit_tricks.tasks import TASKS
from lit_tricks.utils.config_files import nearest

__all__ = ["requested_help"]

HELP = ("-h", "--help")
FIT_EXAMPLES = """
  lit-tricks fit --config quickstart
  lit-tricks fit --config finetune --data.root photos
  lit-tricks fit --config quickstart --trainer.callbacks-=EMA
  lit-tricks fit --ckpt_path runs/quickstart/v0      (to resume)"""
LONG = 15  # characters of a name that is not repeated as the name of its value
LONGEST = 40  # characters of a list of values
OWN_CONFIG = Option("-c, --config NAME", "Configuration with values of these options; what else it has is ignored.")
SHOW_HELP = Option("-h, --help", "Show this help.")


@dataclass(frozen=True)
class Kind:
    """Classes that an option names.

    Args:
        own: classes of this package by name.
        modules: import paths of modules whose classes have short names too.
        what: the classes in words.
        base: name of the class that they inherit from.
    """

    own: Callable[[], dict[str, Entry]]
    modules: tuple[str, ...]
    what: str
    base: str


def requested_help(words: Sequence[str]) -> str | None:
    """Return the help page that a command line requests, or None.

    Args:
        words: arguments from the name of the command on. Arguments after ``--`` are ignored.

    Raises:
        argparse.ArgumentError: for a class or a command that does not exist.
    """
    words = list(words[: words.index("--")] if "--" in words else words)
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if match := _CLASS_HELP.fullmatch(option):
            following = [each for each in words[place + 1 : place + 2] if not each.startswith("-")]
            return _class_help(match[1], match[2] or (value if equals else "".join(following)))
    if not set(HELP) & {*words}:
        return None
    if words[0] in TRAINER_COMMANDS:
        return _trainer_help(words[0])
    return _command_help([word for word in words if not word.startswith("-")])


def _trainer_help(name: str) -> str:
    text = TRAINER_COMMANDS[name]
    if name == "fit":
        usage = "lit-tricks fit --config NAME [--config NAME ...] [options]"
        return page(usage, text + FIT_EXAMPLES.replace("\n", "\n\n", 1), FIT)
    usage = f"lit-tricks {name} --ckpt_path PATH [--out DIR] [options]"
    closing = f"The other options of `lit-tricks fit --help` that start with --trainer do nothing in {name}."
    return page(usage, text, EVALUATION, closing)


# Commands that are functions


def _command_help(words: Sequence[str]) -> str:
    name, package, found = "", "commands", None
    for word in words:
        known = public_names(package)
        if word not in known:
            if not name or found is not None:
                break
            raise argparse.ArgumentError(
                None, f"there is no command {f'{name} {word}'.strip()!r}{nearest(word, known) or '.'}"
            )
        name, entry = f"{name} {word}".strip(), known[word]
        if entry.file.name != "__init__.py":
            found = entry
            break
        package = f"{package}/{word}"
    return _function_help(name, found) if found else _group_help(name, package)


def _group_help(name: str, package: str) -> str:
    rows = [Option(f"{name} {each}", entry.summary) for each, entry in public_names(package).items()]
    group = public_names(package.rpartition("/")[0])[name.rpartition(" ")[2]]
    closing = f"`lit-tricks {name} COMMAND --help` explains the options of a command."
    return page(f"lit-tricks {name} COMMAND [options]", plain(group.text), {"commands": rows}, closing)


def _function_help(name: str, entry: Entry) -> str:
    takes_fit, arguments = entry.takes_fit, entry.own_arguments
    text, described = _documentation(entry.text)
    positional = [each for each in arguments if _is_positional(each)]
    others = [each for each in arguments if each not in positional and each.name != "fit_args"]
    required = [each for each in others if each.default is None]
    usage = [
        f"lit-tricks {name}",
        *(each.name.upper() + " ..." * ("list[" in each.kind) for each in positional),
        *(_flag(each).rpartition(", ")[2] for each in required),
        "[options]",
    ]
    of_fit = ""
    if takes_fit:
        of_fit = "test" if any(each.name == "ckpt" for each in arguments) else "fit"
        usage.append(f"[options of lit-tricks {of_fit}]")
    elif len(arguments) > len(positional) + len(others):
        usage.append("[-- options of lit-tricks fit]")
    ordered = [*required, *(each for each in others if each not in required)]
    options = [Option(_flag(each), _text(each, described)) for each in ordered]
    if not takes_fit and all(each.name != "config" for each in arguments):
        options.append(OWN_CONFIG)
    groups = {
        "arguments": [Option(each.name.upper(), _text(each, described)) for each in positional],
        "options": [*options, SHOW_HELP],
    }
    closing = []
    if any("LightningDataModule" in each.kind for each in arguments):
        closing.append("`--data.help CLASS` explains the arguments of data, such as --data.root.")
    if of_fit:
        closing.append(f"The options of `lit-tricks {of_fit}` choose the data and change the configuration.")
    return page(" ".join(usage), text, groups, " ".join(closing))


def _documentation(text: str) -> tuple[str, dict[str, str]]:
    """Return the description in a docstring, and the descriptions of the arguments."""
    parsed = docstring_parser.parse(text)
    parts = (parsed.short_description, parsed.long_description)
    described = {each.arg_name: _sentence(each.description or "") for each in parsed.params}
    return plain("\n\n".join(filter(None, parts))), described


def _sentence(text: str) -> str:
    """Return a description in plain text: one paragraph, without links and the markup of Sphinx."""
    words = plain(" ".join(text.partition(".. ")[0].split()))
    words = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", words)
    return words[:1].upper() + words[1:]


def _is_positional(argument: Argument) -> bool:
    return argument.default is None and not argument.keyword_only and argument.name not in ("config", "output")


def _flag(argument: Argument) -> str:
    if argument.name == "config":
        return "-c, --config NAME"
    flag = f"--{argument.name.replace('_', '-')}"
    if argument.is_switch:
        return flag
    return f"{'-o, ' * (argument.name == 'output')}{flag} {_value(argument)}"


def _text(argument: Argument, described: dict[str, str], flag: bool = True) -> str:
    """Return the description of an argument with its default. A flag that needs no value is off by default."""
    text = described.get(argument.name, "")
    default = _default(argument)
    if flag and argument.is_switch:
        return text
    return f"{text} (default: {default})".strip() if default and "default" not in text else text


def _default(argument: Argument) -> str:
    """Return a default as it is on the command line; empty where there is none to show."""
    if argument.default in (None, "None", "''"):
        return ""
    try:
        value = ast.literal_eval(str(argument.default))
    except ValueError:  # an expression
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _value(argument: Argument) -> str:
    """Return the placeholder for the value of an option, by the argument's type."""
    kind = argument.kind
    if kind.startswith("list[") and "Literal" not in kind:
        return f"{_value(Argument(argument.name, kind[5:].partition(']')[0], None))} ..."
    choices = [
        str(each) for found in re.findall(r"Literal\[([^\]]*)\]", kind) for each in ast.literal_eval(f"[{found}]")
    ]
    if "bool" in kind:
        choices = ["true", "false", *choices]
    listed = f"{{{','.join(choices)}}}"
    if choices and len(listed) <= LONGEST and not re.search(r"\b(int|float|str)\b", kind):
        return listed
    names = {"float": "FLOAT", "int": "INT", "dict": "DICT", "tuple": "LIST", "Sequence": "LIST", "list": "LIST"}
    words = re.findall(r"\w+", kind)
    first = next((word for word in words if word in names or word == "str" or "Lightning" in word), "")
    name = argument.name.upper() if len(argument.name) < LONG else "VALUE"
    return "CLASS" if "Lightning" in first else names.get(first, name)


# Classes


def _class_help(option: str, name: str) -> str:
    kind = KINDS[option]
    own = kind.own()
    if not name:
        rows = [Option(each, entry.summary) for each, entry in own.items()]
        named = f"Classes of {' and '.join(kind.modules)} have short names too." if own and kind.modules else ""
        text = f"`--{option}` takes {kind.what}, by name or import path. {named or ', '.join(_foreign_names(kind))}"
        closing = f"`--{option}.help NAME` explains the arguments of a class."
        return page(f"--{option} NAME", text, {"classes": rows}, closing)
    package, _, short = name.rpartition(".")
    short = {each.lower(): each for each in own}.get(short.lower(), short)
    if short in own and package.partition(".")[0] in ("", "lit_tricks"):
        text, arguments = own[short].text, own[short].arguments
    else:
        cls = _foreign(option, kind, name)
        text, arguments = inspect.getdoc(cls) or "", tuple(_arguments_of(cls))
    description, described = _documentation(text)
    prefix = f"{option}.{short}" if option == "trainer.callbacks" else option
    rows = [
        Option(f"--{prefix}.{each.name} {_value(each)}", _text(each, described, flag=False))
        for each in arguments
        if each.name != "params"  # of an optimizer: the model gives them
    ]
    usage = f"--{option}{'+' * (option == 'trainer.callbacks')}={short} [options]"
    first, _, _ = description.partition("\n\n")
    closing = f"`lit-tricks show {short}` prints the whole documentation." if short in own else ""
    return page(usage, first, {"options": rows}, closing)


def _foreign_names(kind: Kind) -> list[str]:
    """Return the short names of classes that are not ours."""
    found: list[str] = []
    for module in map(importlib.import_module, kind.modules):
        public = {name: getattr(module, name, None) for name in getattr(module, "__all__", dir(module))}
        found += [name for name, each in public.items() if kind.base in [base.__name__ for base in _bases(each)]]
    return sorted({*found})


def _bases(cls: Any) -> tuple[type, ...]:
    return inspect.getmro(cls)[1:] if inspect.isclass(cls) else ()


def _foreign(option: str, kind: Kind, name: str) -> Any:
    """Return a class that is not ours, by its name or import path."""
    module, _, short = name.rpartition(".")
    for each in [module] if module else kind.modules:
        try:
            found = getattr(importlib.import_module(each), short)
        except (ImportError, AttributeError, ValueError):
            continue
        if inspect.isclass(found):
            return found
    close = nearest(short, [*kind.own(), *_foreign_names(kind)])
    raise argparse.ArgumentError(None, f"--{option}.help: {name!r} is unknown{close or '.'}")


def _arguments_of(cls: type) -> Iterator[Argument]:
    for each in inspect.signature(cls).parameters.values():
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            continue
        annotation = "" if each.annotation is each.empty else each.annotation
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        yield Argument(each.name, kind, None if each.default is each.empty else repr(each.default))


def _tasks() -> dict[str, Entry]:
    found = {name: definition(name, module) for name, module in TASKS.items()}
    return {name: entry for name, entry in found.items() if entry}


LIGHTNING = "lightning.pytorch"
KINDS = {
    "model": Kind(_tasks, (), "a task or another LightningModule", "LightningModule"),
    "model.optimizer": Kind(dict, ("torch.optim", "timm.optim"), "an optimizer", "Optimizer"),
    "data": Kind(partial(public_names, "data"), (), "a data module", "LightningDataModule"),
    "trainer.callbacks": Kind(
        partial(public_names, "callbacks"), (f"{LIGHTNING}.callbacks",), "tricks and callbacks", "Callback"
    ),
    "trainer.logger": Kind(dict, (f"{LIGHTNING}.loggers",), "a logger", "Logger"),
    "trainer.strategy": Kind(dict, (f"{LIGHTNING}.strategies",), "a strategy", "Strategy"),
    "trainer.accelerator": Kind(dict, (f"{LIGHTNING}.accelerators",), "an accelerator", "Accelerator"),
    "trainer.profiler": Kind(dict, (f"{LIGHTNING}.profilers",), "a profiler", "Profiler"),
}
_CLASS_HELP = re.compile(
    rf"--({'|'.join(map(re.escape, sorted(KINDS, key=len, reverse=True)))})(?:\.([A-Z]\w*))?\.help"
)
