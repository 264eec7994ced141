"""One of two processes that run distributed scripts in turn: ``python tests/helpers/process.py FOLDER SCRIPT...``.

A script is a module of this folder whose ``main`` leaves ``<rank>.pt`` in the folder that it is given.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for script in sys.argv[2:]:
        folder = Path(sys.argv[1], script)
        folder.mkdir(exist_ok=True)
        importlib.import_module(f"helpers.{script}").main(folder)
