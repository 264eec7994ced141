"""The commands of ``lit-tricks`` other than training: each command is one typed function, in the file of its name.

A package is a group of commands: ``lit-tricks data preview`` calls ``preview`` of ``data``.
"""

from __future__ import annotations

from lit_tricks.commands import data
from lit_tricks.commands.ablation.ablate import ablate
from lit_tricks.commands.calibrating import calibrate
from lit_tricks.commands.checkpoint_average import average
from lit_tricks.commands.exporting.export import export
from lit_tricks.commands.model_card import card
from lit_tricks.commands.predicting.predict import predict
from lit_tricks.commands.racing.race import race
from lit_tricks.commands.run_report import report
from lit_tricks.commands.sizes.fixres_pass import fixres
from lit_tricks.commands.sizes.resolution_sweep import resolution

__all__ = [
    "ablate",
    "average",
    "calibrate",
    "card",
    "data",
    "export",
    "fixres",
    "predict",
    "race",
    "report",
    "resolution",
]
