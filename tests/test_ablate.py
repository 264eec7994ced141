"""lit-tricks ablate: its rows, its table, its sweep, and a real one that is stopped and goes on."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from _cli import cli, done, metrics, workplace
from scipy import stats

from lit_tricks.commands.ablate import rows_of
from lit_tricks.reports.ablation import paired_change, report_ablation

TRICKS = ["tricks/warmup_cosine", "tricks/mixup", "tricks/ema"]
GRID = ("ablate", "--config", "tiny.yaml", "--stack", "tricks/label_smoothing", "tricks/ema")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        ("stack", {"baseline": [], "+ warmup_cosine": TRICKS[:1], "+ mixup": TRICKS[:2], "+ ema": TRICKS}),
        ("single", {"baseline": [], "+ warmup_cosine": TRICKS[:1], "+ mixup": TRICKS[1:2], "+ ema": TRICKS[2:]}),
        (
            "drop",
            {
                "all": TRICKS,
                "- warmup_cosine": TRICKS[1:],
                "- mixup": [TRICKS[0], TRICKS[2]],
                "- ema": TRICKS[:2],
            },
        ),
    ],
)
def test_rows(mode: Any, rows: dict[str, list[str]]) -> None:
    assert rows_of(TRICKS, mode) == rows
    assert list(rows_of(TRICKS, mode)) == list(rows)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    ours, theirs = [92.1, 93.0, 92.4, 92.2], [91.8, 92.1, 92.3, 91.4]
    mean, reach = paired_change([a - b for a, b in zip(ours, theirs, strict=True)])
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (mean - reach, mean + reach) == pytest.approx((interval.low, interval.high))


def test_one_seed_has_no_interval() -> None:
    assert paired_change([0.5]) == (0.5, math.inf)


def run_folder(name: str, top1: float, seconds: float, kind: str = "raw", split: str = "test") -> Path:
    path = Path(name)
    path.mkdir()
    results = {kind: {split: {"top1": top1, "top5": 0.9}}, "seconds": seconds, "peak_memory": 1000}
    (path / "results.json").write_text(json.dumps(results))
    return path


@pytest.mark.parametrize(("relative_to", "change"), [("above", "-1.00 ± 12.71"), ("first", "+2.00 ± 0.00")])
def test_the_table(folder: Path, relative_to: Any, change: str) -> None:
    runs: dict[str, dict[int, Path | None]] = {
        "baseline": {0: run_folder("a0", 0.50, 10), 1: run_folder("a1", 0.52, 20)},
        "+ ema": {0: run_folder("b0", 0.54, 11, "averaged"), 1: run_folder("b1", 0.54, 22, split="val")},
        "+ mixup": {0: run_folder("c0", 0.52, 20), 1: run_folder("c1", 0.54, 40)},
        "+ gone": {0: None, 1: run_folder("d1", 0.60, 20)},
    }
    report_ablation(folder, runs, relative_to)
    lines = (folder / "ablation.md").read_text().splitlines()
    assert lines[0] == "|  | top-1 | top-5 | change | time | memory |"
    assert lines[2:4] == [
        "| baseline | 51.00 ± 1.41 | 90.00 ± 0.00 |  | 1.00 | 1.00 |",
        "| + ema | 54.00 ± 0.00 | 90.00 ± 0.00 | +3.00 ± 12.71 | 1.10 | 1.00 |",
    ]
    assert lines[4] == f"| + mixup | 53.00 ± 1.41 | 90.00 ± 0.00 | {change} | 2.00 | 1.00 |"
    assert lines[5].startswith("| + gone | 60.00 | 90.00 | +")
    assert lines[-1].endswith("Failed: + gone in seed 0.")
    with (folder / "ablation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["row"], row["seed"], float(row["top1"])) for row in rows[:3]] == [
        ("baseline", "0", 0.5),
        ("baseline", "1", 0.52),
        ("+ ema", "0", 0.54),
    ]
    assert (folder / "ablation.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "basee"), "--config basee: there is no such file; did you mean 'base'?"),
        (("--stack", "tricks/emma"), "tricks/emma: there is no such file; did you mean 'tricks/ema'?"),
        (("--stack", "tricks/ema", "tricks/ema"), "stack has tricks/ema twice: give each once."),
        (("--seeds", "1", "1"), "seeds has 1 twice: give each once."),
        (("--seeds", "one"), "--seeds: "),
        (("--jobs", "0"), "jobs=0 is below 1"),
        (("--mode", "stacked"), "mode"),
        (
            ("--out", "taken"),
            "taken holds another ablation, as taken/plan.json says: choose another folder with --out.",
        ),
    ],
)
def test_errors(folder: Path, words: tuple[str, ...], message: str) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "plan.json").write_text("{}")
    outcome = cli(*GRID, *words)
    assert outcome.code
    assert message in outcome.err
    assert len(outcome.err.splitlines()) <= 2
    assert not (folder / "ablation" / "runs").exists()


def test_the_sweep_is_the_same_grid(folder: Path) -> None:
    """The commands that an agent of W&B makes of the file."""
    done(*GRID, "--seeds", "3", "4", "--as-sweep", "sweep.yaml", "--", "--trainer.max_epochs=7")
    sweep = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    names = list(sweep["parameters"])
    found = []
    for values in itertools.product(*(parameter["values"] for parameter in sweep["parameters"].values())):
        args = [f"--{name}={value}" for name, value in zip(names, values, strict=True)]
        command = [word for part in sweep["command"] for word in (args if part == "${args}" else [part])]
        assert command[:3] == ["${env}", "lit-tricks", "fit"]
        config = yaml.safe_load(done(*command[2:], "--print_config").out)
        tricks = [trick["class_path"].rpartition(".")[2] for trick in config["trainer"]["callbacks"] or []]
        found.append((tricks, config["seed_everything"], config["trainer"]["max_epochs"]))
    rows: list[list[str]] = [[], ["LabelSmoothing"], ["LabelSmoothing", "EMA"]]
    assert found == [(row, seed, 7) for row in rows for seed in (3, 4)]


@pytest.mark.slow
def test_a_real_one_is_stopped_and_goes_on(folder: Path) -> None:
    (folder / "broken.yaml").write_text("trainer: {callbacks+: [{class_path: WarmupCosine, init_args: {min_lr: -1}}]}")
    words = ("ablate", "--config", "tiny.yaml", "--stack", "tricks/ema", "broken.yaml", "--mode", "single")
    words += ("--seeds", "5", "--jobs", "2")
    outcome = cli(*words)
    assert outcome.code == 1
    assert "1 of 3 runs failed, the table has the others. '+ broken' with seed 5: lit-tricks: error: " in outcome.err
    assert "min_lr=-1" in outcome.err
    assert [line.split("|")[1].strip() for line in (folder / "ablation/ablation.md").read_text().splitlines()[2:5]] == [
        "baseline",
        "+ ema",
        "+ broken",
    ]
    runs = folder / "ablation" / "runs"
    plain, ema = runs / "baseline-seed5" / "v0", runs / "with-ema-seed5" / "v0"
    losses = [[row["train/loss_step"] for row in metrics(run) if "train/loss_step" in row] for run in (plain, ema)]
    assert losses[0] == losses[1], "other weights or data in the same seed"

    # as if it had been stopped in the second run, and the third one had been mended
    before = (plain / "results.json").stat().st_mtime_ns
    (ema / "results.json").unlink()
    (folder / "broken.yaml").write_text("trainer: {callbacks+: [{class_path: LabelSmoothing}]}")
    done(*words)
    assert (plain / "results.json").stat().st_mtime_ns == before
    assert "Restored all states from the checkpoint" in (runs / "with-ema-seed5.log").read_text()
    assert sorted(str(path.parent.relative_to(runs)) for path in runs.glob("*/v*/results.json")) == [
        "baseline-seed5/v0",
        "with-broken-seed5/v0",
        "with-ema-seed5/v1",
    ]
