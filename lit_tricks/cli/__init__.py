"""The command line, ``lit-tricks``."""

from lit_tricks.cli.app import TricksCLI, main

__all__ = ["TricksCLI", "main"]
