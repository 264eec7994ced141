"""lit-tricks ablate --engine ray, on a cluster of two workers with one CPU each, on this machine."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import cli, workplace
from helpers.sleepers import alive, interrupted, sleepers, wait_for

from lit_tricks.commands.ablation.cells import Cell, run_all
from lit_tricks.commands.ablation.ray_engine import connected, count_places, run_on_ray

ray = pytest.importorskip("ray", reason="Ray has no wheel here")

pytestmark = [
    pytest.mark.slow,  # to start and end the cluster takes ten seconds
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),  # Ray's
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    made.add_node(num_cpus=1, num_gpus=0)
    made.wait_for_nodes()
    yield made.address
    made.shutdown()


@pytest.fixture(autouse=True)
def folder(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    with workplace(tmp_path):
        yield tmp_path
    assert not ray.is_initialized()


def engine(environment: dict[str, str] | None = None, cpus: float = 1, gpus: float | None = None) -> Any:
    return partial(run_on_ray, cpus=cpus, gpus=gpus, environment=environment or {})


@pytest.fixture(autouse=True)
def no_accuracies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the accuracy of sleepers, which have none."""
    if "real" not in request.node.name:
        monkeypatch.setattr("lit_tricks.commands.ablation.cells.read_run", lambda run: {"top1": 0.5})


def test_ablation_runs_one_cell_per_cpu(folder: Path) -> None:
    cells = sleepers(folder, 1.5, (0, 1, 2, 4))
    run_all(cells, engine({"WANDB_RUN_GROUP": "ours"}))
    assert [cell.state for cell in cells] == ["50.00%", "failed", "50.00%", "50.00%"]
    assert "AssertionError: odd" in cells[1].last_words()
    report = [cell.report for cell in cells if cell.finished]
    for one in report:
        assert one["environment"]["WANDB_RUN_GROUP"] == "ours"
        assert one["environment"]["OMP_NUM_THREADS"] == "1"
        assert not one["environment"].get("CUDA_VISIBLE_DEVICES")
        assert one["cwd"] == str(folder.resolve())
        at_a_time = sum(other["start"] <= one["start"] < other["end"] for other in report)
        assert at_a_time <= 2
    assert any(one["start"] < other["start"] < one["end"] for one in report for other in report), "one after the other"


def test_interrupted_it_ends_its_runs_and_goes_on(folder: Path) -> None:
    interrupted(sleepers(folder, 60, (0, 2, 4)), engine(), signal.SIGINT)
    wait_for(lambda: not alive(folder))
    assert len(list(folder.glob("*.pid"))) == 2, "another one was started"
    cells = sleepers(folder, 0.1, (0, 2, 4))
    run_all(cells, engine())
    assert all(cell.finished for cell in cells)


def test_a_killed_worker_is_a_failed_run(folder: Path) -> None:
    """As when a node is lost; the others continue."""

    class Killer(Cell):
        @property
        def words(self) -> list[str]:
            return ["-c", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"]

    cells = [Killer("row", 1, folder.resolve() / "killer", []), *sleepers(folder, 0.5, (0,))]
    run_all(cells, engine())
    assert [bool(cell.finished) for cell in cells] == [False, True]
    assert cells[0].last_words().startswith("Ray: ")


@pytest.mark.parametrize(("cpus", "gpus"), [(2, 0), (1, 1)])
def test_resources_that_no_node_has(folder: Path, cpus: float, gpus: float) -> None:
    with pytest.raises(ValueError, match=f"{cpus} CPUs and {gpus} GPUs"):
        run_all(sleepers(folder, 0.1, (0,)), engine(cpus=cpus, gpus=gpus))


def test_without_ray_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"lit-tricks\[ray\]"):
        run_all(sleepers(folder, 0.1, (0,)), engine())


def test_a_real_ablation(folder: Path) -> None:
    """Two rows, one of which fails."""
    Path("broken.yaml").write_text("trainer: {callbacks+: [{class_path: WarmupCosine, init_args: {min_lr: -1}}]}")
    words = ("ablate", "--config", "tiny.yaml", "--stack", "broken.yaml", "--seeds", "0", "--engine", "ray")
    outcome = cli(*words)
    assert outcome.code == 1
    assert "1 of 2 runs failed" in outcome.err
    assert "min_lr=-1" in outcome.err
    assert [path.parts[2] for path in Path().glob("ablation/runs/*/v0/results.json")] == ["baseline-seed0"]


class Fit(Cell):
    """A run of a race without torch: it sleeps for a second, and its score depends on its tricks and its seed."""

    @property
    def words(self) -> list[str]:
        score = 0.8 + 0.05 * ("ema" in self.name) + 0.001 * (self.seed % 3)
        results = {"raw": {"val": {"top1": score}, "test": {"top1": score}}, "seconds": 1.0, "peak_memory": 1}
        script = (
            "import json, os, pathlib, time; start = time.time(); time.sleep(1); "
            f"folder = pathlib.Path({str(self.folder)!r}, 'v0'); "
            "folder.mkdir(parents=True); (folder / 'config.yaml').write_text('trainer: {}'); "
            "report = {'start': start, 'end': time.time(), 'group': os.environ['WANDB_RUN_GROUP']}; "
            f"(folder / 'report.json').write_text(json.dumps(report)); assert 'mixup' not in {self.name!r}; "
            f"(folder / 'results.json').write_text(json.dumps({results!r}))"
        )
        return ["-c", script]


def test_a_race_keeps_the_cluster_busy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_tricks.commands.racing.runs.Cell", Fit)
    outcome = cli(
        "race",
        "--config",
        "tiny.yaml",
        "--candidates",
        "tricks/ema",
        "tricks/mixup",
        "--engine",
        "ray",
        "--budget",
        "30",
    )
    assert outcome.code == 0, outcome
    race = json.loads(Path("race/race.json").read_text())
    assert race["kept"] == ["tricks/ema"]
    assert "AssertionError" in next(each["reason"] for each in race["failed"] if each["stack"] == "base+mixup")
    report = [json.loads(path.read_text()) for path in Path("race/runs").glob("*/v0/report.json")]
    assert {one["group"] for one in report} == {"race"}
    assert max(sum(other["start"] <= one["start"] < other["end"] for other in report) for one in report) == 2
    clock = json.loads(Path("race/clock.json").read_text())
    assert all(0.9 < seconds < 20 for seconds in clock["runs"].values())
    assert clock["elapsed"] < sum(clock["runs"].values())


def test_places_of_a_cluster(cluster: str) -> None:
    with connected() as connection:
        assert [count_places(connection, *wanted) for wanted in ((1, 0), (0.5, None), (0, 0))] == [2, 4, 2]
