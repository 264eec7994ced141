"""What ``lit-tricks`` can do besides training: each command is one typed function, in the file of its name."""

from __future__ import annotations

from lit_tricks.commands.ablate import ablate
from lit_tricks.commands.average import average
from lit_tricks.commands.card import card
from lit_tricks.commands.report import report

__all__ = ["ablate", "average", "card", "report"]
