"""The report of a fit: what it makes of a run's folder, whole or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from check_quickstart import FILES, check
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lit_tricks.run.reading.run import read_run_folder
from lit_tricks.run.report.curves import draw_curves
from lit_tricks.run.report.fit import report_fit

METRICS = """epoch,lr-SGD,step,test/loss,test/top1,train/loss_epoch,train/loss_step,train/top1,val/ece,val/loss,val/top1
0,0.05,0,,,,2.5,,,,
0,,1,,,,,,0.25,2.25,0.5
0,,1,,,2.375,,0.125,,,
1,0.1,2,,,,1.5,,,,
1,,3,,,,,,0.125,1.25,0.75
1,,3,,,1.375,,0.625,,,
2,0.05,4,,,,0.5,,,,
2,,5,,,,,,0.5,0.75,0.625
2,,5,,,0.5,,0.875,,,
3,,6,1.125,0.6875,,,,,,
"""
OF_EPOCH = {
    1: {"train": {"loss": 1.375, "top1": 0.625}, "val": {"loss": 1.25, "top1": 0.75, "ece": 0.125}},
    2: {"train": {"loss": 0.5, "top1": 0.875}, "val": {"loss": 0.75, "top1": 0.625, "ece": 0.5}},
}
TEST = {"test": {"loss": 1.125, "top1": 0.6875}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text(METRICS)
    return tmp_path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as they are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [tuple(map(float, point)) for point in line.get_xydata()]  # type: ignore[union-attr, misc]
        for line in axes.lines
    }


def test_results_at_the_best_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "best.ckpt"
    torch.save({"epoch": 1, "state_dict": {"w": torch.zeros(3)}}, best)
    found = report_fit(run, str(best), seconds=12.5, memory=1000)
    assert found.pop("peak_memory") == 1000
    assert found == {
        "best_checkpoint": str(best),
        "epoch": 1,
        "raw": OF_EPOCH[1] | TEST,
        "seconds": 12.5,
        "cpu_seconds": None,
        "time": None,
    }
    assert json.loads((run / "results.json").read_text()).items() > found.items()
    out = capsys.readouterr().out
    assert out.startswith("epoch 1, raw weights")
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert table == [
        ["train", "1.3750", "62.50%", "-"],
        ["val", "1.2500", "75.00%", "0.1250"],
        ["test", "1.1250", "68.75%", "-"],
    ]
    assert [line.split()[-1] for line in out.splitlines()[-3:]] == [str(best), str(run / "curves.png"), str(run)]


def test_averaged_weights_are_called_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = run / "best.ckpt"
    states = {"EMA": {"raw": {"w": torch.ones(3)}, "steps": 4}, "ModelCheckpoint{}": {"raw": None}}
    torch.save({"epoch": 2, "state_dict": {"w": torch.zeros(3)}, "callbacks": states}, best)
    found = report_fit(run, str(best))
    assert (found["epoch"], found["averaged"]) == (2, OF_EPOCH[2] | TEST)
    assert "raw" not in found
    assert capsys.readouterr().out.startswith("epoch 2, averaged weights")


def test_without_a_best_checkpoint_the_last_epoch_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(METRICS.splitlines()[:-1]) + "\n"  # and so there was no test
    (run / "metrics.csv").write_text(text)
    found = report_fit(run, "")
    assert (found["best_checkpoint"], found["epoch"], found["raw"]) == ("", 2, OF_EPOCH[2])
    assert "best checkpoint" not in capsys.readouterr().out


def test_columns_of_a_foreign_module_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.csv").write_text("epoch,step,train/loss,val/f1,val/top1\n0,1,,0.25,0.5\n0,1,3.5,,\n")
    assert report_fit(run, "")["raw"] == {"train": {"loss": 3.5}, "val": {"f1": 0.25, "top1": 0.5}}
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("┃"))
    assert header.replace("┃", " ").split() == ["loss", "top1", "f1"]


def test_a_run_that_logged_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report_fit(tmp_path, "")
    assert (found["best_checkpoint"], found["epoch"], found["raw"], found["seconds"]) == ("", 0, {}, None)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md"}
    assert str(tmp_path) in capsys.readouterr().out


def test_metrics_are_read_without_empty_cells(run: Path) -> None:
    rows = read_run_folder(run).rows
    assert len(rows) == 10
    assert rows[0] == {"epoch": 0, "lr-SGD": 0.05, "step": 0, "train/loss_step": 2.5}


def test_curves_show_all_metrics(run: Path, figures: list[Figure]) -> None:
    path = draw_curves(read_run_folder(run).rows, run / "curves.png")
    assert path == run / "curves.png"
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
    loss, accuracy, rate = figures[0].axes
    assert lines(loss) == {
        "train": [(1, 2.375), (3, 1.375), (5, 0.5)],
        "val": [(1, 2.25), (3, 1.25), (5, 0.75)],
    }
    assert lines(accuracy) == {
        "train": [(1, 12.5), (3, 62.5), (5, 87.5)],
        "val": [(1, 50), (3, 75), (5, 62.5)],
    }
    assert lines(rate) == {"SGD": [(0, 0.05), (2, 0.1), (4, 0.05)]}
    titles = ["Loss", "Top-1 accuracy", "Learning rate"]
    assert [axes.get_title(loc="left") for axes in (loss, accuracy, rate)] == titles
    assert [axes.get_yscale() for axes in (loss, accuracy, rate)] == ["log", "linear", "linear"]
    assert {axes.get_xlabel() for axes in (loss, accuracy, rate)} == {"training step"}
    named = [[text.get_text() for text in axes.texts] for axes in (loss, accuracy, rate)]
    assert list(map(set, named)) == [{"train", "val"}, {"train", "val"}, {"SGD"}]  # at the ends of their lines
    assert rate.get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (("val/loss",), ["Loss"]),
        (("raw/val/loss",), ["Loss"]),
        (("train/top1", "lr-SGD/pg1", "lr-SGD/pg2"), ["Top-1 accuracy", "Learning rate"]),
        (("val/f1",), None),
        ((), None),
    ],
)
def test_curves_of_what_there_is(
    tmp_path: Path, figures: list[Figure], columns: tuple[str, ...], titles: list[str] | None
) -> None:
    rows = [
        {"epoch": 0.0, "step": float(step)} | {column: step + 0.5 + i for i, column in enumerate(columns)}
        for step in range(3)
    ]
    path = draw_curves(rows, tmp_path / "curves.png")
    assert (path is None) == (titles is None)
    assert (tmp_path / "curves.png").exists() == (titles is not None)
    if titles:
        assert [axes.get_title(loc="left") for axes in figures[0].axes] == titles
        assert len(figures[0].axes[-1].lines) == len([name for name in columns if name.startswith("lr")] or columns)


# The check of the quickstart, which CI runs


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """Runs v9, which is bad, and v10, which is good."""
    for name, top1 in (("v9", 0.5), ("v10", 0.98), ("notes", 0.1)):
        for file in FILES:
            (tmp_path / "quickstart" / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "quickstart" / name / file).write_text(json.dumps({"raw": {"test": {"top1": top1}}}))
    return tmp_path


@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_a_good_quickstart(quickstart: Path, weights: str) -> None:
    path = quickstart / "quickstart" / "v10" / "results.json"
    path.write_text(path.read_text().replace("raw", weights))
    assert check(quickstart) == f"{quickstart}/quickstart/v10: test top-1 is 0.9800"


@pytest.mark.parametrize(
    "content", ['{"raw": {"test": {"top1": 0.9799}}}', '{"raw": {"test": {"top1": NaN}}}', "{}", "{"]
)
def test_a_quickstart_that_falls_short(quickstart: Path, content: str) -> None:
    (quickstart / "quickstart" / "v10" / "results.json").write_text(content)
    with pytest.raises(ValueError, match="not at least 0.98" if content != "{" else "Expecting"):
        check(quickstart)


@pytest.mark.parametrize("file", FILES)
def test_a_quickstart_that_lacks_a_file(quickstart: Path, file: str) -> None:
    (quickstart / "quickstart" / "v10" / file).write_text("")
    with pytest.raises(ValueError, match=f"v10 lacks {file}"):
        check(quickstart)
    (quickstart / "quickstart" / "v10" / file).unlink()
    with pytest.raises(ValueError, match=f"v10 lacks {file}"):
        check(quickstart)


def test_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run in"):
        check(tmp_path)
