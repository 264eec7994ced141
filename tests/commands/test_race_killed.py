"""A race that SIGKILL ends at any moment decides, after the same command again, as one that was not killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import warm
from helpers.cli import workplace
from helpers.races import decisions, fake_fits, read_race, run_race
from helpers.sleepers import wait_for

from lit_tricks.commands.racing.decisions import critical_values

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


def race_with(out: Path, event: Callable[[], None]) -> None:
    """Run a race on fake fits. Each step of a run and each write of a file is an event."""

    def replace(source: Any, target: Any, replaced: Any = os.replace) -> None:
        event()
        replaced(source, target)
        event()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        run_race(out, fake_fits(event))


def run_until(out: Path, most: int) -> bool:
    """Run the race in a fork that kills itself at an event. Return whether the race came to its end."""

    def work() -> None:
        left = most

        def event() -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        race_with(out, event)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def found_in(out: Path) -> tuple[Any, ...]:
    race = read_race(out)
    clock = json.loads((out / "clock.json").read_text())
    failed = [(each["stack"], each["seed"]) for each in race["failed"]]
    recipe = (out / "recipe.yaml").read_text().replace(str(out), "OUT")
    return decisions(race), race["confirmed"], sorted(clock["runs"]), failed, recipe


@pytest.mark.slow
def test_a_killed_race_on_fake_fits_decides_as_one_that_was_left_alone(folder: Path) -> None:
    for alpha in (0.04, 0.01):
        critical_values(alpha, (3, 4, 5, 6, 8))  # they take a second, and the forks inherit them
    events = 0

    def count() -> None:
        nonlocal events
        events += 1

    race_with(folder / "whole", count)
    whole = found_in(folder / "whole")
    assert whole[0][0] == ["tricks/ema", "tricks/mixup"]
    assert ("base+cutmix", 1) in whole[3]
    assert events > 200

    generator = random.Random(0)
    for number in range(5):  # one kill, anywhere
        out = folder / f"once{number}"
        run_until(out, generator.randrange(1, events))
        assert run_until(out, 10**9)
        assert found_in(out) == whole
        shutil.rmtree(out)
    kills = 0
    while not run_until(folder / "often", generator.randrange(20, 200)):  # one kill after the other
        kills += 1
    assert kills > 3
    assert found_in(folder / "often") == whole


REAL = """
import sys
import pytest
from helpers.cli import cells_in_this_process
from lit_tricks.cli import main
with pytest.MonkeyPatch.context() as patch:
    cells_in_this_process(patch)
    patch.setattr("lit_tricks.run.report.fit.draw_curves", lambda *args: None)
    main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_race_of_real_runs_decides_as_one_that_was_left_alone(folder: Path) -> None:
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace("max_epochs: 1", "max_epochs: 2"))
    words = ("race", "--config", "tiny.yaml", "--candidates", "tricks/zero_gamma", "tricks/xavier_init")
    words = (*words, "--score", "per-epoch", "--max-seeds", "3", "--budget", "24", "--out")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(out: str) -> Any:
        return warm.start(["-c", REAL, *words, out], folder / f"{out}.log", env=environment)

    assert start("whole").wait(300) == 0, (folder / "whole.log").read_text()
    generator = random.Random(1)
    for started in (2, 6, 11, 15):  # runs that have made their folder
        race = start("killed")
        wait_for(lambda: len(list(Path("killed/runs").glob("*/v*"))) >= started, seconds=120)  # noqa: B023
        time.sleep(generator.uniform(0, 0.1 * started))
        race.kill()
        race.wait(20)
    assert start("killed").wait(300) == 0, (folder / "killed.log").read_text()
    resumed = list(Path("killed/runs").glob("*/v1"))
    assert resumed, "no kill was in the middle of a run"
    assert found_in(folder / "killed")[:4] == found_in(folder / "whole")[:4]
