"""The runs of an ablation as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from lit_tricks.commands.ablation.cells import Cell

__all__ = ["connected", "count_places", "run_on_ray"]

PATIENCE = 30  # seconds that runs have to end, when the ablation is interrupted


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Give Ray, connected to the cluster at ``RAY_ADDRESS``, to the one on this machine, or to one started for this.

    Raises:
        ModuleNotFoundError: without Ray.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--engine ray needs Ray: pip install 'lit-tricks[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def run_on_ray(
    cells: Sequence[Cell], cpus: float, gpus: float | None, environment: Mapping[str, str]
) -> Generator[Cell, None, None]:
    """Run cells as tasks of a Ray cluster (see ``connected``).

    All nodes need the run folders, the configurations and the data at the same paths, and an installed ``lit_tricks``.

    Args:
        cells: to run.
        cpus: CPUs of each run.
        gpus: GPUs of each run, such as 0.5 if two share one; by default one if the cluster has any.
        environment: variables of the runs, in addition to the environment of their nodes.

    Raises:
        ModuleNotFoundError: without Ray.
        ValueError: if no node has the resources of a run.
    """
    tasks: dict[Any, Cell] = {}
    with connected() as ray:
        try:
            count_places(ray, cpus, gpus)
            resources = _resources(ray, cpus, gpus)
            task = ray.remote(num_cpus=cpus, num_gpus=resources["GPU"], max_retries=0)(_task())
            sizes = {}
            for cell in cells:
                sizes[cell.log] = _size(cell)
                reference = task.remote(cell.words, str(cell.log.resolve()), os.getcwd(), dict(environment))
                tasks[reference] = cell
            while tasks:
                for cell in tasks.values():  # a run that prints has started
                    cell.state = "runs" if _size(cell) > sizes[cell.log] else cell.state
                for reference in ray.wait(list(tasks), num_returns=1, timeout=1)[0]:
                    try:
                        tasks[reference].seconds = ray.get(reference)
                    except ray.exceptions.RayError as error:  # for example, if a node is lost
                        with tasks[reference].log.open("a") as stream:
                            stream.write(f"Ray: {' '.join(str(error).split())}\n")
                    yield tasks.pop(reference)
        finally:
            for reference in tasks:
                ray.cancel(reference)
            if tasks:
                ray.wait(list(tasks), num_returns=len(tasks), timeout=PATIENCE)


def count_places(ray: Any, cpus: float, gpus: float | None) -> int:
    """Return how many runs the cluster holds at a time.

    Raises:
        ValueError: if no node has the resources of a run.
    """
    wanted = _resources(ray, cpus, gpus)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(
        min((int(node.get(kind, 0) / count + 1e-6) for kind, count in wanted.items() if count), default=1)
        for node in nodes
    )
    if not places:
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"no node of the Ray cluster has {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs for a run: its nodes "
            f"have {there}. Request less with --cpus and --gpus."
        )
    return places


def _task() -> Any:
    """Return the function that a worker calls, which gives the seconds of a run.

    A function in a function travels as it is, so that the worker imports no torch.
    """

    def fit(words: list[str], log: str, folder: str, environment: dict[str, str]) -> float:
        import os
        import subprocess
        import sys
        import time

        from lit_tricks.utils.parent_process import held_pipe

        start = time.monotonic()
        with held_pipe() as (pipe, variable):
            with open(log, "ab") as stream:
                process = subprocess.Popen(
                    [sys.executable, *words],
                    stdin=pipe,
                    stdout=stream,
                    stderr=stream,
                    cwd=folder,
                    env=os.environ | environment | variable,
                    start_new_session=True,
                )
            try:
                while process.poll() is None:  # a task that waits in the system cannot be cancelled
                    time.sleep(0.2)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        return time.monotonic() - start

    return fit


def _resources(ray: Any, cpus: float, gpus: float | None) -> dict[str, float]:
    return {"CPU": cpus, "GPU": int(ray.cluster_resources().get("GPU", 0) >= 1) if gpus is None else gpus}


def _size(cell: Cell) -> int:
    return cell.log.stat().st_size if cell.log.is_file() else 0
