"""The start of ``lit-tricks``: what needs no torch is done here, and the rest is imported when it is needed."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator

from lit_tricks import __version__
from lit_tricks.cli.catalog import LIGHT_COMMANDS, commands
from lit_tricks.utils.config_files import among, nearest
from lit_tricks.utils.parent_process import end_with_parent

__all__ = ["main"]


def main(args: list[str] | None = None) -> None:
    """Run ``lit-tricks``.

    Args:
        args: arguments of ``lit-tricks``; by default the arguments of the command line.

    Raises:
        SystemExit: with 0 after ``--help`` and the like, 2 for arguments that cannot be understood, 130 after Ctrl-C
            outside of the training (1 in it, by Lightning), 1 for all other errors. One message names the error;
            ``--debug`` shows the traceback too.
    """
    end_with_parent()
    words = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if not _light(words):
            with _hidden("wandb"):
                from lit_tricks.cli.app import run
            run(words, debug)
    except argparse.ArgumentError as error:
        if debug:
            raise
        print(f"lit-tricks: error: {error.message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("lit-tricks: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:  # of `lit-tricks list models | head`; Python would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _light(words: list[str]) -> bool:
    """Do what needs no torch. Return whether that is all.

    Raises:
        argparse.ArgumentError: for a command that does not exist.
    """
    first = words[0] if words else ""
    if first in LIGHT_COMMANDS:
        from lit_tricks.cli import completion, discovery

        light = {"completion": completion.show_script, "list": discovery.show_names, "show": discovery.show_one}
        light[first](words[1:])
    elif first == "--version":
        print(f"lit-tricks {__version__}")  # noqa: T201
    elif first in ("-h", "--help"):
        print(_help())  # noqa: T201
    elif not words:
        raise argparse.ArgumentError(None, "choose a command, such as fit; `lit-tricks --help` lists the commands.")
    elif first not in commands() and not first.startswith("-"):
        known = list(commands())
        raise argparse.ArgumentError(None, f"there is no command {first!r}{nearest(first, known) or among(known)}")
    else:
        from lit_tricks.cli.help import requested_help

        page = requested_help(words)
        if page is None:
            return False
        print(page)  # noqa: T201
    return True


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Let imports of a package fail. timm imports wandb where it can, which takes time and is of use to few runs."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def _help() -> str:
    rows = commands()
    left = max(map(len, rows))
    return "\n".join(
        [
            "usage: lit-tricks [-h] [--version] COMMAND [options]",
            "",
            "Train, evaluate, compare and export image models, with tricks for accuracy.",
            "",
            "commands:",
            *(_row(f"    {name:{left}}  ", text) for name, text in rows.items()),
            "",
            "options:",
            "    -h, --help  Show this help, or after a command the help of the command.",
            "    --version   Show the version.",
            "    --debug     After a command: show the traceback of an error.",
            "    --import MODULE",
            "                After a command: import a module that you trust, for",
            "                checkpoints of classes in this module.",
        ]
    )


def _row(start: str, text: str) -> str:
    return textwrap.fill(text.removesuffix("."), 80, initial_indent=start, subsequent_indent=" " * len(start))
