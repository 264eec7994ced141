"""The runs of an ablation as tasks of a Ray cluster, wherever their resources are free."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from lit_tricks.commands.ablation.cells import Cell

__all__ = ["run_on_ray"]

PATIENCE = 30  # seconds that runs have to end, when the ablation is interrupted


def run_on_ray(
    cells: Sequence[Cell], cpus: float, gpus: float | None, environment: Mapping[str, str]
) -> Generator[Cell, None, None]:
    """Run cells as tasks of the cluster at ``RAY_ADDRESS``, of the one on this machine, or of one started for this.

    All nodes must see the folders of the runs, the configurations and the data, at the same paths, and have
    ``lit_tricks``.

    Args:
        cells: to run.
        cpus: CPUs of each run.
        gpus: GPUs of each run, such as 0.5 where two share one; by default one where the cluster has any.
        environment: variables of the runs, besides those of their nodes.

    Raises:
        ModuleNotFoundError: without Ray.
        ValueError: if no node has the resources of a run.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("--engine ray needs Ray: pip install 'lit-tricks[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    tasks: dict[Any, Cell] = {}
    try:
        resources = {"CPU": cpus, "GPU": _has_gpus(ray) if gpus is None else gpus}
        _check_resources(ray, resources)
        task = ray.remote(num_cpus=cpus, num_gpus=resources["GPU"], max_retries=0)(_task())
        sizes = {}
        for cell in cells:
            sizes[cell.log] = _size(cell)
            reference = task.remote(cell.words, str(cell.log.resolve()), os.getcwd(), dict(environment))
            tasks[reference] = cell
        while tasks:
            for cell in tasks.values():  # that it runs is seen by what it prints
                cell.state = "runs" if _size(cell) > sizes[cell.log] else cell.state
            for reference in ray.wait(list(tasks), num_returns=1, timeout=1)[0]:
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:  # a node is lost, say
                    with tasks[reference].log.open("a") as stream:
                        stream.write(f"Ray: {' '.join(str(error).split())}\n")
                yield tasks.pop(reference)
    finally:
        for reference in tasks:
            ray.cancel(reference)
        if tasks:
            ray.wait(list(tasks), num_returns=len(tasks), timeout=PATIENCE)
        if ours:
            ray.shutdown()


def _task() -> Any:
    """What a worker does: a function in a function, so that it travels as it is, and the worker imports no torch."""

    def fit(words: list[str], log: str, folder: str, environment: dict[str, str]) -> int:
        import os
        import subprocess
        import sys
        import time

        from lit_tricks.utils.parent_process import held_pipe

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
        return process.returncode

    return fit


def _has_gpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("GPU", 0) >= 1)


def _check_resources(ray: Any, wanted: Mapping[str, float]) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(kind, 0) >= count for kind, count in wanted.items()) for node in nodes):
        there = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"no node of the Ray cluster has {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs for a run: its nodes "
            f"have {there}. Ask for less with --cpus and --gpus."
        )


def _size(cell: Cell) -> int:
    return cell.log.stat().st_size if cell.log.is_file() else 0
