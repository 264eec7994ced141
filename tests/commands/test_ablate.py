"""lit-tricks ablate: its rows, its table, and runs that fail, are killed, are interrupted, and continue."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import warm
from helpers.cli import cells_in_this_process, checkpoint, cli, done, results, workplace
from helpers.fits import differences
from helpers.sleepers import alive, interrupted, sleepers, wait_for
from scipy import stats

from lit_tricks.commands.ablation.ablate import rows_of
from lit_tricks.commands.ablation.cells import run_here
from lit_tricks.run.report.ablation_table import paired_change, report_ablation

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
def test_rows_of_each_mode_combine_the_tricks(mode: Any, rows: dict[str, list[str]]) -> None:
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
def test_report_of_paired_runs_has_change_and_interval(folder: Path, relative_to: Any, change: str) -> None:
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
        (("--jobs", "0"), "jobs=0"),
        (("--engine", "ray", "--jobs", "2"), "jobs=2 is for runs on this machine"),
        (("--cpus", "2"), "cpus=2 is for --engine ray"),
        (("--engine", "ray", "--gpus", "-1"), "gpus=-1"),
        (("--engine", "slurm"), "engine"),
        (("--mode", "stacked"), "mode"),
        (
            ("--out", "taken"),
            "taken holds another ablation (see taken/plan.json): choose another folder with --out.",
        ),
    ],
)
def test_ablate_wrong_arguments_explain_themselves(folder: Path, words: tuple[str, ...], message: str) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "plan.json").write_text("{}")
    outcome = cli(*GRID, *words)
    assert outcome.code
    assert message in outcome.err
    assert len(outcome.err.splitlines()) <= 2
    assert not (folder / "ablation" / "runs").exists()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are in this process."""
    cells_in_this_process(monkeypatch)


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_is_tried_again(here: None, folder: Path) -> None:
    (folder / "broken.yaml").write_text("trainer: {callbacks+: [{class_path: WarmupCosine, init_args: {min_lr: -1}}]}")
    words = ("ablate", "--config", "tiny.yaml", "--stack", "tricks/ema", "broken.yaml", "--mode", "single")
    words += ("--seeds", "5")
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


PROBE = """
import hashlib, json, os, signal, sys
from pathlib import Path
import torch
from lightning.pytorch import Callback

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()

class Probe(Callback):
    '''Notes the weights before any trick, and what the loaders give.'''
    def setup(self, trainer, module, stage):
        if stage != "fit":
            return
        self.seen = {"weights": digest(module.state_dict().values()), "train": [], "val": []}
        trainer.datamodule.on_before_batch_transfer = self.note
        self.trainer = trainer

    def note(self, batch, dataloader_idx):
        if not self.trainer.sanity_checking and not self.trainer.testing:
            self.seen["train" if self.trainer.training else "val"].append(digest(batch))
        return batch

    def on_fit_end(self, trainer, module):
        Path(trainer.loggers[0].log_dir, "seen.json").write_text(json.dumps(self.seen))

class Die(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and not os.path.exists("died"):
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def probe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of ``tiny.yaml`` in ``base.yaml``, with callbacks of ``probe.py``."""
    (folder / "probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    tiny = yaml.safe_load((folder / "tiny.yaml").read_text())
    tiny["trainer"] |= {"max_epochs": 2, "callbacks": ["probe.Probe"]}
    (folder / "base.yaml").write_text(yaml.safe_dump(tiny))


@pytest.mark.slow
def test_a_seed_has_the_same_weights_split_and_order_in_every_row(here: None, probe: None, folder: Path) -> None:
    """Also where tricks draw random numbers and change weights."""
    stack = ("tricks/xavier_init", "tricks/drop_path", "tricks/mixup")
    done("ablate", "--config", "base.yaml", "--stack", *stack, "--seeds", "0", "1")
    seen = {path.parts[-3]: json.loads(path.read_text()) for path in folder.glob("ablation/runs/*/v0/seen.json")}
    assert len(seen) == 8
    of_seed = {seed: [note for name, note in seen.items() if name.endswith(seed)] for seed in ("seed0", "seed1")}
    for notes in of_seed.values():
        assert all(note == notes[0] for note in notes)
        assert len(notes[0]["train"]) == len(set(notes[0]["train"])) == 4
        assert len(notes[0]["val"]) == 2
    first, second = (notes[0] for notes in of_seed.values())
    assert first["weights"] != second["weights"]
    assert not set(first["train"]) & set(second["train"])
    assert first["val"] == second["val"], "the split has its own seed"


def test_a_killed_run_resumes_and_ends_as_one_that_was_not(
    probe: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second epoch. All processes are new, so that none has settings of earlier tests."""
    monkeypatch.setattr("lit_tricks.commands.ablation.cells.subprocess.Popen", warm.popen)
    config = yaml.safe_load((folder / "base.yaml").read_text())
    config["trainer"]["callbacks"] = ["probe.Die"]
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    words = ("ablate", "--config", "base.yaml", "--stack", "tricks/ema", "--mode", "drop", "--seeds", "3")
    outcome = cli(*words)
    assert (outcome.code, Path("died").exists()) == (1, True)
    assert "1 of 2 runs failed" in outcome.err
    runs = folder / "ablation" / "runs"
    assert not list(runs.glob("all-seed3/*/results.json"))
    done(*words)
    assert [path.parts[-2] for path in runs.glob("all-seed3/*/results.json")] == ["v1"]
    words = ("fit", "--config=base.yaml", "--config=tricks/ema", "--seed_everything=3", "--name=whole")
    assert warm.run(["-m", "lit_tricks", *words], folder).returncode == 0
    whole, resumed = (
        checkpoint(run / "checkpoints/last.ckpt") for run in (Path("runs/whole/v0"), runs / "all-seed3/v1")
    )
    assert not differences(resumed["state_dict"], whole["state_dict"])
    assert not differences(resumed["optimizer_states"], whole["optimizer_states"])
    assert results(runs / "all-seed3/v1")["averaged"]["test"] == results("runs/whole/v0")["averaged"]["test"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes the Linux way")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_runs_end_with_the_ablation(folder: Path, kind: int) -> None:
    before = signal.getsignal(kind)
    cells = sleepers(folder, 60, (0, 2, 4))
    interrupted(cells, partial(run_here, jobs=2, environment={}), kind)
    wait_for(lambda: not alive(folder))
    assert len(list(folder.glob("*.pid"))) == 2, "another one was started"
    assert signal.getsignal(kind) is before
