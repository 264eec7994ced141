"""Make the runs of an ablation or a race on this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from lit_tricks.commands.ablation.cells import Engine, run_here
from lit_tricks.commands.ablation.ray_engine import connected, count_places, run_on_ray
from lit_tricks.utils.arguments import choice, integer, number

__all__ = ["EngineName", "check_engine", "engine_of"]

EngineName = Literal["local", "ray"]


def check_engine(command: str, engine: EngineName, jobs: int, cpus: float | None, gpus: float | None) -> None:
    """Raise ValueError for an argument that is out of range or for the other engine."""
    engine = choice(command, "engine", engine, get_args(EngineName))
    integer(command, "jobs", jobs, 1, "It is the number of runs at a time.", 1000)
    for name, share in {"cpus": cpus, "gpus": gpus}.items():
        number(command, name, share, "[0, 10000]", "It is the number for each run.", "the default")
    if engine == "ray" and jobs > 1:
        raise ValueError(f"jobs={jobs} is for runs on this machine. On Ray, use cpus and gpus of a run.")
    for name, value in {"cpus": cpus, "gpus": gpus}.items():
        if value is not None and engine != "ray":
            raise ValueError(f"{name}={value:g} is for --engine ray. On this machine, use jobs.")
        if value is not None and value < 0:
            raise ValueError(f"{name}={value:g} is negative: it is the number that each run takes.")


@contextlib.contextmanager
def engine_of(
    engine: EngineName, jobs: int, cpus: float | None, gpus: float | None, folder: Path
) -> Iterator[tuple[Engine, int]]:
    """Give an engine and the number of runs that it makes at a time. A Ray cluster stays connected meanwhile.

    Args:
        engine: where the runs are made.
        jobs: runs at a time on this machine.
        cpus: CPUs of each run on a cluster; None is 1.
        gpus: GPUs of each run on a cluster; None is 1 where the cluster has any.
        folder: of the runs. Its name is their group in W&B, unless ``WANDB_RUN_GROUP`` is set.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    environment.setdefault("WANDB_RUN_GROUP", folder.resolve().name)
    if engine == "local":
        yield partial(run_here, jobs=jobs, environment=environment), jobs
        return
    cpus = 1 if cpus is None else cpus
    with connected() as ray:
        yield partial(run_on_ray, cpus=cpus, gpus=gpus, environment=environment), count_places(ray, cpus, gpus)
