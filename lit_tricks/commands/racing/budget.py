"""The budget of a race: time, or a number of runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

__all__ = ["Budget"]

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Budget:
    """A limit in seconds or in runs.

    Args:
        text: as it was given.
        seconds: by the clock; infinite for a number of runs.
        runs: infinite for a time.
    """

    text: str
    seconds: float = math.inf
    runs: float = math.inf

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "2h", "90m", "300s" or "40".

        Raises:
            ValueError: for anything else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(h|m|s|runs?|)\s*", str(text))
        if not match or not float(match[1]):
            raise ValueError(f'budget={text!r} must be a time such as "2h", "90m" or "300s", or a number of runs.')
        amount, unit = float(match[1]), UNITS.get(match[2])
        return cls(str(text), seconds=amount * unit) if unit else cls(str(text), runs=amount)
