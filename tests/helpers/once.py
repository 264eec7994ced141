"""Savings in all tests: what Lightning looks up for each Trainer, and waits for workers and for the disk."""

from __future__ import annotations

import functools
import os

import lightning.fabric.utilities.registry
import lightning_fabric.utilities.registry
import torch.utils.data._utils

# Each Trainer looks up the plug-ins that are installed, which is a fifth of the time of a short fit.
for _registry in (lightning.fabric.utilities.registry, lightning_fabric.utilities.registry):
    _registry.entry_points = functools.cache(_registry.entry_points)

# A loader that is given up waits this long, in seconds, for a worker that sleeps, before it ends the worker.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5

# The disk takes about 10 ms to store a file, a dozen files in a fit. No test turns the power off.
os.fsync = lambda fd: None
