"""Records of a fit for its report: predictions, the split of its time, the tricks in force."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evidence import see_labels
from helpers.fits import differences, make_trainer, run
from helpers.launch import two_processes
from helpers.modules import LAYOUTS, module_class
from helpers.tricks import TRICKS
from lightning.pytorch.callbacks import Timer

from lit_tricks.data import Digits
from lit_tricks.run.evidence.callback import WRONG, Evidence, _Split
from lit_tricks.run.profiler import PARTS, SAMPLED, TimeSplit
from lit_tricks.run.reading.predictions import Predictions
from lit_tricks.run.tricks_in_force import TricksInForce, tricks_in_force

# Predictions


def test_predictions_are_what_the_model_says(tmp_path: Path) -> None:
    model, found = see_labels(tmp_path)
    images, labels = next(iter(Digits(batch_size=360).test_dataloader()))
    with torch.no_grad():
        scores = model.eval()(images).double().softmax(1)
    assert (found.split, found.classes, len(found.label)) == ("test", [str(i) for i in range(10)], 360)
    np.testing.assert_array_equal(found.label, labels)
    np.testing.assert_array_equal(found.top, scores.topk(5).indices)
    np.testing.assert_allclose(found.confidence, scores.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(found.probability, scores[range(360), labels], rtol=1e-5)
    np.testing.assert_array_equal(found.index, range(360))

    wrong = scores.argmax(1) != labels
    losses = torch.where(wrong, -scores[range(360), labels].log(), -1)
    assert int(wrong.sum()) > WRONG
    np.testing.assert_array_equal(found.wrong_index, losses.argsort(descending=True)[:WRONG])
    data = Digits()
    data.setup("test")
    ink = np.stack([np.asarray(data._sources["test"][int(i)][0]) for i in found.wrong_index])  # 0 to 255
    assert found.wrong_image is not None
    np.testing.assert_allclose(found.wrong_image[..., 0], ink, atol=0.51)


@pytest.mark.parametrize("kind", ["logits", "log-probabilities", "probabilities"])
def test_scores_of_all_kinds(kind: str) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    output = {"logits": logits, "log-probabilities": logits.log_softmax(1), "probabilities": logits.softmax(1)}[kind]
    split = _Split(None, 0, 1)
    split.add([torch.zeros(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, -100])], [torch.zeros(2, 4), output])
    arrays = split.part()
    assert arrays is not None
    np.testing.assert_allclose(arrays["confidence"], logits.softmax(1).max(1).values, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_batches_of_all_layouts(tmp_path: Path, layout: str) -> None:
    evidence = Evidence()
    trainer = run(evidence, layout=layout, max_epochs=2).trainer
    evidence.save(tmp_path / "predictions.npz", trainer, None)
    found = Predictions.read(tmp_path / "predictions.npz")
    assert found.split == "val"
    assert len(found.label) == len(found.index) > 0
    assert found.classes == ["0", "1", "2"]


def test_nothing_to_see_leaves_no_file(tmp_path: Path) -> None:
    evidence = Evidence()
    split = _Split(None, 0, 1)
    evidence._splits["val"] = (split,)
    split.add([torch.zeros(6, 3, 2, 2), torch.zeros(6, dtype=torch.int64)], [torch.zeros(5, 4)])
    split.add([torch.zeros(6, 3, 2, 2)], [torch.zeros(6, 4)])
    evidence.save(tmp_path / "predictions.npz", make_trainer(), None)
    assert not list(tmp_path.iterdir())


def test_large_images_become_small() -> None:
    split = _Split(None, 0, 1)
    split.add([torch.rand(2, 3, 300, 200), torch.tensor([1, 1])], [torch.tensor([[9.0, 0], [9.0, 0]])])
    arrays = split.part()
    assert arrays is not None
    assert arrays["wrong_image"].shape == (2, 3, 96, 64)


def test_a_thousand_classes_stay_small(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    evidence = Evidence()
    split = _Split(None, 0, 1)
    evidence._splits["test"] = (split,)
    for _ in range(10):
        labels = torch.randint(1000, (1000,), generator=generator)
        split.add([torch.rand(1000, 3, 8, 8), labels], [torch.randn(1000, 1000, generator=generator)])
    evidence.save(tmp_path / "predictions.npz", make_trainer(), None)
    assert (tmp_path / "predictions.npz").stat().st_size < 25 * 10_000 + 100_000


def test_nothing_of_the_run_changes(tmp_path: Path) -> None:
    watched = run(Evidence(), TricksInForce(tmp_path), TRICKS["MixUp"].make(), profiler=TimeSplit())
    plain = run(TRICKS["MixUp"].make())
    assert not differences(watched.weights, plain.weights)
    assert not differences(watched.optimizers, plain.optimizers)
    assert not differences(watched.logged, plain.logged)
    assert not watched.module._forward_hooks


def test_an_error_leaves_no_hook() -> None:
    class StopError(Exception):
        pass

    evidence = Evidence()
    module = module_class("lightning")(raises={"validation_step": StopError()})
    module.validation_step = lambda *_: (_ for _ in ()).throw(StopError())
    from helpers.modules import eval_loader, train_loader

    with pytest.raises(StopError):
        make_trainer(evidence).fit(module, train_loader("list"), eval_loader("list"))
    assert not module._forward_hooks


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    two_processes(["evidence_distributed"], tmp_path)
    (tmp_path / "one").mkdir()
    _, one = see_labels(tmp_path / "one")
    two = Predictions.read(tmp_path / "evidence_distributed" / "predictions.npz")
    for name in ("label", "top", "index", "wrong_index", "wrong_image"):
        np.testing.assert_array_equal(getattr(two, name), getattr(one, name), name)
    np.testing.assert_allclose(two.confidence, one.confidence, rtol=1e-5)


# Time


class TrainingLength:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def play(split: TimeSplit, clock: TrainingLength, *actions: Any) -> None:
    """Actions, nested as tuples ``(name, *inner)``; numbers are seconds that pass."""
    for action in actions:
        if isinstance(action, tuple):
            with split.profile(action[0]):
                play(split, clock, *action[1:])
        else:
            clock.now += action


STEP = (
    ("[_TrainingEpochLoop].train_dataloader_next", 3),
    ("[LightningModule]M.on_before_batch_transfer", 1),
    ("[Strategy]S.batch_to_device", 2, ("[LightningModule]M.on_after_batch_transfer", 4)),
    ("[Callback]MixUp.on_train_batch_start", 5),
    (
        "run_training_batch",
        6,
        (
            "[LightningModule]M.optimizer_step",
            7,
            ("[Strategy]S.training_step", 8),
            ("[LightningModule]M.optimizer_zero_grad", 9),
            ("[Strategy]S.backward", 10, ("[Callback]L1.on_after_backward", 11), 12),
            ("[Callback]EMA.on_before_optimizer_step", 13),
            14,
        ),
    ),
    ("[Callback]EMA.on_train_batch_end", 15),
)
VALIDATION = (
    ("[LightningModule]M.on_validation_model_eval", 16),
    17,
    ("[_EvaluationLoop].val_next", 18),
    ("[Strategy]S.validation_step", 19),
    ("[Callback]E.on_validation_batch_end", 20),
    ("[Strategy]S.on_validation_end", 21),
)
SAVE = (
    "[Callback]ModelCheckpoint{'a': 1}.on_train_epoch_end",
    22,
    ("save_checkpoint", 23, ("[Callback]E.on_save", 24)),
)
END = (("[Callback]E.on_train_end", 25), ("[LightningModule]M.on_train_end", 26), 1000)
EXPECTED = {
    "data": 3 + 1 + 2 + 4,
    "forward": 8,
    "backward": 10 + 12,
    "optimizer": 7 + 9 + 14,
    "callbacks": 5 + 11 + 13 + 15 + 16 + 20 + 22 + 24 + 25,
    "other": 6 + 2 + 26,
    "validation": 17 + 18 + 19 + 21,
    "checkpoints": 23,
}


def test_time_is_split() -> None:
    split = TimeSplit(clock := TrainingLength())
    play(
        split, clock, 500, ("[Callback]E.on_train_start", 5), ("run_training_epoch", *STEP, *VALIDATION), 2, SAVE, *END
    )
    assert split.result() == {"clock": "host", "seconds": pytest.approx(EXPECTED)}
    assert tuple(split.result()["seconds"]) == PARTS


def test_time_on_a_device_divides_the_steps() -> None:
    """A device that takes 3 of 4 parts for the backward pass, behind a process that is held up by callbacks."""
    clock, device = TrainingLength(), TrainingLength()

    class Event:
        def record(self) -> None:
            self.at = device.now

        def query(self) -> bool:
            return True

        def elapsed_time(self, later: Event) -> float:
            return 1000 * (later.at - self.at)

    split = TimeSplit(clock, Event)

    def step(name: str, seconds: float) -> Any:
        with split.profile(name):
            device.now += seconds
            clock.now += 1

    with split.profile("run_training_epoch"):
        for number in range(SAMPLED + 1):
            with split.profile("[_TrainingEpochLoop].train_dataloader_next"):
                pass
            timed = number == SAMPLED // 2
            step("[Strategy]S.training_step", 1 if timed else 77)
            step("[Strategy]S.backward", 3 if timed else 77)
            step("[Callback]C.on_train_batch_end", 0)
    result = split.result()
    assert result["clock"] == "device"
    steps = 3 * (SAMPLED + 1)
    assert result["seconds"] == pytest.approx(
        dict.fromkeys(PARTS, 0.0) | {"forward": steps / 4, "backward": 3 * steps / 4}
    )


def test_the_split_of_a_real_fit_adds_up() -> None:
    split, timer = TimeSplit(), Timer()
    run(timer, profiler=split)
    seconds = split.result()["seconds"]
    assert sum(seconds.values()) == pytest.approx(timer.time_elapsed("train"), abs=0.05)
    assert all(seconds[part] > 0 for part in PARTS if part != "checkpoints")


def test_an_action_costs_next_to_nothing() -> None:
    split = TimeSplit()
    split.start("run_training_epoch")
    names = [f"[Callback]C{i}.on_train_batch_end" for i in range(10)]
    start = time.perf_counter()
    for _ in range(1000):
        for name in names:
            split.start(name)
            split.stop(name)
    assert (time.perf_counter() - start) / 10_000 < 50e-6  # it takes about 1; the machine may be busy


# Tricks


def test_tricks_are_kept_with_their_effect(tmp_path: Path) -> None:
    trick = TRICKS["WarmupCosine"].make()
    trainer = run(trick, TricksInForce(tmp_path)).trainer
    found = json.loads((tmp_path / "tricks.json").read_text())
    assert found == {
        "WarmupCosine": {
            "arguments": {"warmup_epochs": 1, "min_lr": 0.0, "total_steps": None},
            "effect": "0 -> 0.1 in 4 steps, then half a cosine to 0 at step 12",
        }
    }
    assert found == tricks_in_force(trainer)


@pytest.mark.parametrize("name", TRICKS)
def test_arguments_of_every_trick_are_found(name: str) -> None:
    trick = TRICKS[name].make()
    found = tricks_in_force(make_trainer(trick))[name]
    json.dumps(found)
    import inspect

    for argument in inspect.signature(type(trick)).parameters:
        assert hasattr(trick, argument), f"{name} does not store {argument}"


def test_two_of_a_kind_are_two() -> None:
    tricks = [TRICKS["ZeroGamma"].make() for _ in range(3)]
    assert list(tricks_in_force(make_trainer(*tricks))) == ["ZeroGamma", "ZeroGamma (2)", "ZeroGamma (3)"]
