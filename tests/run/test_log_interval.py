"""Short runs have curves with points, also of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import COSINE, TINY, built, done, metrics, workplace

from lit_tricks.run.reading.run import read_run_folder
from lit_tricks.run.report.curves import RATE, panels_of

FIT = ("fit", "--config=default.yaml")
SWA = ("--config=tricks/swa", "--config=tricks/precise_bn")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        text = TINY.replace("  log_every_n_steps: 1\n", "")
        assert text != TINY
        Path("default.yaml").write_text(text)
        yield tmp_path


def steps(run: str, key: str) -> list[float]:
    return sorted({row["step"] for row in metrics(run) if key in row})


@pytest.mark.slow
@pytest.mark.parametrize("words", [COSINE, (), ("--trainer.callbacks+=LearningRateMonitor",), SWA])
def test_a_run_of_few_steps_has_a_learning_rate_panel(words: tuple[str, ...]) -> None:
    done(*FIT, *words, "--trainer.max_epochs=3")
    assert steps("runs/default/v0", "lr-SGD") == [0, 1, 2, 3, 4, 5]
    assert steps("runs/default/v0", "train/loss_step") == [0, 1, 2, 3, 4, 5]
    assert RATE in panels_of([read_run_folder(Path("runs/default/v0")).rows])


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")  # which the command line leaves out
@pytest.mark.parametrize(
    ("words", "interval"),
    [
        (("--trainer.max_epochs=3",), 1),
        (("--trainer.limit_train_batches=10", "--trainer.max_epochs=30"), 6),
        (("--trainer.limit_train_batches=10", "--trainer.max_epochs=30", "--trainer.accumulate_grad_batches=2"), 3),
        (("--trainer.max_steps=300", "--trainer.max_epochs=-1"), 6),
        (("--trainer.max_epochs=5000",), 50),
        (("--trainer.max_epochs=-1",), 50),
        (("--trainer.max_epochs=3", "--trainer.log_every_n_steps=50"), 50),
        (("--trainer.max_epochs=3", "--trainer.log_every_n_steps=0"), 0),
    ],
)
def test_the_interval_goes_by_the_length_of_the_run(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], interval: int
) -> None:
    made = built(monkeypatch, *FIT, *words)

    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    monkeypatch.setattr(made.model, "on_train_epoch_start", stop)
    with pytest.raises(StopError):
        made.trainer.fit(made.model, made.datamodule)
    assert made.trainer.log_every_n_steps == interval
