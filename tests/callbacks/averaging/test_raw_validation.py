"""The trained weights validated next to the average: their metrics under ``raw/``, and nothing else of it."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from helpers.averages import History, all_weights
from helpers.fits import Saver, differences, make_trainer, run, weights_of
from helpers.modules import (
    CLASSES,
    NAMESPACES,
    eval_loader,
    image_and_label,
    images,
    lightning,
    module_class,
    train_loader,
)
from helpers.tricks import TRICKS
from torch.utils.data import DataLoader

from lit_tricks.callbacks import EMA, SWA, PreciseBN

each_namespace = pytest.mark.parametrize("namespace", NAMESPACES)


def thorny(namespace: str) -> Any:
    """A module whose validation leaves traces of every kind."""

    class Thorny(module_class(namespace)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
            self.collection = torchmetrics.MetricCollection(
                [torchmetrics.Precision("multiclass", num_classes=CLASSES, average="macro"),
                 torchmetrics.Recall("multiclass", num_classes=CLASSES, average="macro")]
            )  # fmt: skip
            self.best = torchmetrics.MaxMetric()
            self.register_buffer("batches", torch.tensor(0))
            self.plain = torch.zeros(2)
            self.number, self.lowest, self.kept, self.recent = 0, 9.0, {"losses": []}, deque(maxlen=3)
            self.sums: set[float] = set()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            image, label = image_and_label(batch)
            logits, loss = self(image), self.loss(batch)
            self.accuracy.update(logits, label)
            self.collection.update(logits, label)
            self.log_dict(self.collection, on_step=False, on_epoch=True)
            self.log("val_acc", self.accuracy)
            self.log("val_loss", loss, on_step=True, on_epoch=True)
            self.log("noise", torch.rand(()) + random.random() + np.random.rand())
            self.log("hidden", loss, logger=False)
            self.log("first", image.sum())
            self.number += 1
            self.batches += 1
            self.plain += 1
            self.kept["losses"].append(float(loss))
            self.recent.append(float(loss))
            self.sums.add(float(loss))

        def on_validation_epoch_end(self) -> None:
            self.best(self.accuracy.compute())
            self.lowest = min(self.lowest, *self.kept["losses"])
            self.log("best", self.best.compute())
            self.log_dict({"lowest": self.lowest, "number": float(self.number), "batches": float(self.batches)})
            self.log("seen", float(len(self.sums) + len(self.recent) + len(self.kept["losses"])))
            self.logger.log_metrics({"by_hand": 1.0}, step=self.trainer.global_step)

    return Thorny


class Watch:
    """Counts the hooks of validation, and keeps the metrics that callbacks find."""

    @staticmethod
    def of(namespace: str) -> Any:
        class Callback(lightning(namespace).Callback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.found: list[Any] = []

            def on_validation_batch_end(self, *args: Any) -> None:
                self.found.append("batch")

            def on_validation_end(self, trainer: Any, module: Any) -> None:
                self.found.append(
                    {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("raw/")}
                )

        return Callback()


def fit(namespace: str, *tricks: Any, val_check_interval: Any = 2, **kwargs: Any) -> Any:
    watch, module = Watch.of(namespace), thorny(namespace)()
    saver = lightning(namespace).callbacks.ModelCheckpoint(
        kwargs.pop("folder"), monitor="val_loss", save_top_k=-1, filename="{step}-{noise}"
    )
    stop = lightning(namespace).callbacks.EarlyStopping("val_acc", mode="max", patience=2)
    trainer = make_trainer(
        *tricks,
        watch,
        stop,
        saver,
        namespace=namespace,
        enable_checkpointing=True,
        val_check_interval=val_check_interval,
    )
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(images(8), batch_size=4, shuffle=True, generator=generator)
    trainer.fit(module, train_loader(), loader)
    return {
        "weights": weights_of(module),
        "logged": trainer.logger.metrics,
        "found": watch.found,
        "scores": {path.rpartition("/")[2]: score for path, score in saver.best_k_models.items()},
        "stopped": (stop.wait_count, float(stop.best_score), trainer.global_step),
        "random": (random.random(), np.random.rand(), torch.rand(()), generator.get_state()),
        "module": [
            module.number,
            module.lowest,
            module.kept,
            list(module.recent),
            sorted(module.sums),
            module.plain,
            module.best.compute(),
        ],
        "counts": trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict(),
    }


def without_raw(result: dict[str, Any]) -> dict[str, Any]:
    logged = {s: {k: v for k, v in m.items() if not k.startswith("raw/")} for s, m in result["logged"].items()}
    return {**result, "logged": logged}


@each_namespace
@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_nothing_but_its_metrics_is_seen(namespace, tmp_path):
    one = fit(namespace, EMA(0.8), folder=tmp_path / "one")
    both = fit(namespace, EMA(0.8, validate="both"), folder=tmp_path / "both")
    assert not differences(without_raw(both), without_raw(one))
    assert {key for metrics in both["logged"].values() for key in metrics if key.startswith("raw/")} >= {
        "raw/val_loss_epoch", "raw/val_acc", "raw/MulticlassRecall", "raw/number"
    }  # fmt: skip
    assert "raw/hidden" not in both["logged"][3]


@each_namespace
@pytest.mark.filterwarnings("ignore:SWA averages the statistics")
@pytest.mark.parametrize("trick", ["EMA", "SWA"])
def test_raw_metrics_are_those_of_a_run_without(namespace, trick):
    make = {"EMA": lambda: EMA(0.8, validate="both"), "SWA": lambda: SWA(0.1, start=0.0, validate="both")}[trick]
    plain = run(namespace=namespace)
    logged = run(make(), namespace=namespace).logged
    steps = [step for step, metrics in plain.logged.items() if "val_loss" in metrics]
    assert len(steps) == 3
    for step in steps:
        assert logged[step]["raw/val_loss"] == plain.logged[step]["val_loss"]
        assert (step == 3 and trick == "SWA") or logged[step]["raw/val_loss"] != logged[step]["val_loss"]


@pytest.mark.parametrize("trick", ["CutMix", "FocalLoss", "KnowledgeDistillation", "LabelSmoothing", "MixUp"])
@pytest.mark.parametrize("places", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_precise_bn_and_a_loss_trick_serve_both(trick, places):
    """PreciseBN reads training batches in the raw validation too, where the callbacks are set aside."""

    def losses(*tricks: Any, prefix: str = "") -> list[float]:
        return [metrics[f"{prefix}val_loss"] for metrics in run(*tricks).logged.values() if "val_loss" in metrics]

    both = [EMA(0.8, validate="both"), PreciseBN(8), TRICKS[trick].make()]
    both = [both[place] for place in places]
    raw = losses(*both, prefix="raw/")
    assert len(raw) == 3
    assert raw == losses(PreciseBN(8), TRICKS[trick].make())
    assert losses(*both) == losses(EMA(0.8), PreciseBN(8), TRICKS[trick].make())


@pytest.mark.parametrize("place", [0, 1])
def test_precise_bn_serves_both(place):
    def losses(*tricks: Any, prefix: str = "") -> list[float]:
        return [metrics[f"{prefix}val_loss"] for metrics in run(*tricks).logged.values() if "val_loss" in metrics]

    both = [EMA(0.8, validate="both"), PreciseBN()][:: 1 - 2 * place]
    assert losses(*both, prefix="raw/") == losses(PreciseBN())
    assert losses(*both) == losses(EMA(0.8), PreciseBN())


def test_nothing_raw_before_the_first_update():
    logged = run(EMA(0.8, start_step=6, validate="both")).logged
    assert [step for step, metrics in logged.items() if "raw/val_loss" in metrics] == [7, 11]


def test_raw_metrics_can_be_monitored(tmp_path):
    saver = lightning().callbacks.ModelCheckpoint(tmp_path, monitor="raw/val_loss", save_top_k=-1)
    end = run(EMA(0.8, validate="both"), saver, enable_checkpointing=True)
    scores = [float(score) for score in saver.best_k_models.values()]
    assert scores == [pytest.approx(end.logged[step]["raw/val_loss"]) for step in (3, 7, 11)]


def test_several_loaders_are_validated_twice():
    class Module(module_class("lightning")):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch))

    logged = {}
    for name, tricks in {"plain": [], "both": [EMA(0.8, validate="both")]}.items():
        trainer = make_trainer(*tricks)
        torch.manual_seed(0)
        trainer.fit(Module(), train_loader(), [eval_loader(), train_loader()])
        logged[name] = trainer.logger.metrics
    for part in ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"):
        assert logged["both"][7][f"raw/{part}"] == logged["plain"][7][part]


@pytest.mark.parametrize("precision", ["bf16-true", "16-mixed"])
def test_in_low_precision(precision):
    plain, both = run(precision=precision).logged, run(EMA(0.8, validate="both"), precision=precision).logged
    assert both[7]["raw/val_loss"] == plain[7]["val_loss"]


def test_resume_is_bitwise(tmp_path):
    saver = Saver(tmp_path)
    full = run(EMA(0.8, validate="both"), saver, val_check_interval=2)
    for path in saver.paths:
        resumed = run(EMA(0.8, validate="both"), ckpt_path=path, val_check_interval=2)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.logged, {s: full.logged[s] for s in resumed.logged}), path.name


@pytest.mark.parametrize("which", [1, 2])
def test_an_error_in_either_validation_leaves_nothing_behind(which):
    passes = []  # what is the module's own is put back after the first

    class Module(module_class("lightning")):
        def on_validation_start(self) -> None:
            passes.append(self.trainer.sanity_checking)
            if passes.count(False) == which:
                raise ZeroDivisionError

    module, history, trainer = Module(), History(), make_trainer()
    trainer.callbacks = [EMA(0.8, validate="both"), history]
    before = trainer.logger, trainer.callbacks
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, train_loader(), eval_loader())
    assert (trainer.logger, trainer.callbacks) == before
    assert not differences(all_weights(module), history.weights[-1])
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)
    assert "on_validation_model_eval" not in vars(module)
