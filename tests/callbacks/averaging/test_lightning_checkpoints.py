"""Checkpoints of Lightning's WeightAveraging: resumed by EMA and SWA, read by modules and commands."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.averages import History, Weights, all_weights, assert_close, loaded
from helpers.fits import Saver, differences, log_lines, run
from helpers.modules import BATCHES, NAMESPACES, lightning

from lit_tricks.callbacks import EMA, SWA, Lookahead
from lit_tricks.commands.checkpoint_average import average

STEPS = 3 * BATCHES
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of Lightning


class Start(lightning().Callback):
    """Keeps the weights that training starts with."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.weights = all_weights(module)


def theirs(decay: float = 0.5, namespace: str = "lightning", **arguments: Any) -> Any:
    return lightning(namespace).callbacks.EMAWeightAveraging(decay=decay, **arguments)


def saved(tmp_path: Path, step: int, **arguments: Any) -> tuple[Path, list[Weights]]:
    """Return a checkpoint of their run, and its trained weights after each step."""
    saver, history = Saver(tmp_path, steps=[step]), History()
    run(theirs(**arguments), history, saver)
    [path, *_] = saver.paths
    assert {"current_model_state", "averaging_state"} <= loaded(path).keys()
    return path, history.weights


def floating(weights: Weights) -> Weights:
    return {name: value.double() for name, value in weights.items() if value.is_floating_point()}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("step", [3, 6])  # in the middle of an epoch
def test_ema_resumes_their_run(step, validate, tmp_path):
    path, trained = saved(tmp_path, step)
    start, history = Start(), History()
    ema = EMA(0.5, warmup=False, validate=validate, buffers="average")
    with log_lines() as records:
        result = run(ema, start, history, ckpt_path=path)
    assert not differences(start.weights, trained[step - 1])  # not their average, which is the state_dict
    plain = History()
    run(plain)
    assert_close(history.weights[-1], plain.weights[-1])  # the rest of training is as if nobody averaged
    mean = floating(loaded(path)["state_dict"])
    for weights in history.weights:
        mean = {name: (mean[name] + value) / 2 for name, value in floating(weights).items() if name in mean}
    found = result.weights if validate else {n: v for n, v in ema.state_dict()["average"].items() if n in mean}
    assert_close({name: found[name] for name in mean}, mean)
    assert ema.state_dict()["steps"] == STEPS
    assert ema.state_dict()["updates"] == STEPS
    assert [r for r in records if "took over" in r.getMessage() and f"after {step} updates" in r.getMessage()]


def test_their_run_before_its_first_update(tmp_path):
    path, trained = saved(tmp_path, 2, update_starting_at_step=5)
    start = Start()
    ema = EMA(0.5)
    run(ema, start, ckpt_path=path)
    assert not differences(start.weights, trained[1])
    assert ema.state_dict()["updates"] == STEPS - 2


@pytest.mark.filterwarnings("ignore:SWA averages the statistics of the BatchNorm layers")
def test_swa_resumes_their_average(tmp_path):
    saver = Saver(tmp_path, steps=[6])
    history = History()
    run(lightning().callbacks.WeightAveraging(), history, saver)
    path = saver.paths[0]
    rest = History()
    result = run(SWA(0.05, start=0.25, every_n_steps=1, buffers="average"), rest, ckpt_path=path)
    mean, count = floating(loaded(path)["state_dict"]), 6
    for weights in rest.weights:
        count += 1
        mean = {n: mean[n] + (v - mean[n]) / count for n, v in floating(weights).items() if n in mean}
    assert_close({n: result.weights[n] for n in mean}, mean)


def test_a_resumed_run_is_resumed_bitwise(tmp_path):
    path, _ = saved(tmp_path, 3)
    saver = Saver(tmp_path)
    full = run(EMA(0.8), saver, ckpt_path=path)
    for each in saver.paths:
        resumed = run(EMA(0.8), ckpt_path=each)
        assert not differences(resumed.weights, full.weights), each.name
        assert not differences(resumed.tricks, full.tricks), each.name


def test_integer_buffers_are_those_of_training(tmp_path):
    path, trained = saved(tmp_path, 6)
    content = loaded(path)
    assert int(content["state_dict"]["net.0.1.num_batches_tracked"]) < 6  # theirs are averaged
    start = Start()
    run(EMA(0.5), start, ckpt_path=path)
    assert int(start.weights["net.0.1.num_batches_tracked"]) == 6 == int(trained[5]["net.0.1.num_batches_tracked"])


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_both_namespaces(namespace, tmp_path):
    saver, history = Saver(tmp_path, steps=[3]), History()
    run(theirs(), history, saver)
    start = Start()
    if namespace == "lightning":
        run(EMA(0.5), start, ckpt_path=saver.paths[0])
        assert not differences(start.weights, history.weights[2])
    else:
        ema = EMA(0.5)
        run(ema, ckpt_path=saver.paths[0], namespace=namespace)
        assert ema.state_dict()["updates"] == STEPS


@pytest.mark.parametrize("trick", [Lookahead(k=2), EMA(power=[0.05, 0.2])], ids=["lookahead", "power"])
def test_average_of_another_kind_leaves_the_trained_weights(trick, tmp_path, caplog):
    path, trained = saved(tmp_path, 3)
    start, history = Start(), History()
    with caplog.at_level("INFO", logger="lit_tricks"):
        run(trick, start, history, ckpt_path=path, default_root_dir=tmp_path)
    assert not differences(start.weights, trained[2])  # not their average, which is the state_dict
    assert "tensors of the trained weights of Lightning's WeightAveraging, and not its average" in caplog.text
    state = trick.state_dict()
    assert state["steps"] == STEPS
    if isinstance(trick, EMA):
        assert state["updates"] == STEPS - 3
        return
    plain = History()
    run(plain, max_epochs=1)
    fast, slow = floating(plain.weights[3]), floating(trained[2])
    assert_close(floating(history.weights[0]), {name: (value + slow[name]) / 2 for name, value in fast.items()})
    assert state["updates"] == 1 + (STEPS - 2) // 2


def test_their_callback_resumes_our_run_from_the_average(tmp_path):
    saver = Saver(tmp_path, steps=[6])
    run(EMA(0.5), saver)
    start = Start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(theirs(), start, ckpt_path=saver.paths[0])
    assert [w for w in caught if "not created with WeightAveraging" in str(w.message)]
    average_saved = loaded(saver.paths[0])["state_dict"]
    assert not differences({n: v for n, v in start.weights.items() if n in average_saved}, average_saved)


def test_our_module_and_command_read_their_average(tmp_path):
    """``weights=``, ``load_from_checkpoint`` and ``lit-tricks average`` take the state_dict, which is the average."""
    from lit_tricks import Classifier
    from lit_tricks.data import Digits

    small = {"depth": 18, "width": 0.0625, "small_input": True}
    model: Any = {"model": "resnet", "model_args": small, "num_classes": 10, "input_size": [1, 8, 8]}
    pl = lightning()
    paths = []
    for seed in range(2):
        pl.seed_everything(0)  # the same start: an average makes sense
        trainer = pl.Trainer(
            max_epochs=1, limit_train_batches=3 + seed, limit_val_batches=1, logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[theirs()],
        )  # fmt: skip
        module = Classifier(**model)
        saver = Saver(tmp_path / str(seed), steps=[2])
        trainer.callbacks.append(saver)
        trainer.fit(module, Digits(batch_size=32, num_workers=0))
        paths.append(saver.paths[0])
    states = [loaded(path)["state_dict"] for path in paths]
    read = Classifier.load_from_checkpoint(paths[0], weights_only=True, map_location="cpu")
    assert not differences(dict(read.state_dict()), states[0])
    warm = Classifier(**model, weights=str(paths[0]))
    name = next(n for n in states[0] if n.endswith("weight") and "fc" not in n)
    assert torch.equal(warm.state_dict()[name], states[0][name])
    average([str(path) for path in paths], str(tmp_path / "mean.ckpt"))
    content = torch.load(tmp_path / "mean.ckpt", weights_only=True)
    assert not {"current_model_state", "averaging_state", "callbacks"} & content.keys()
    torch.testing.assert_close(content["state_dict"][name], (states[0][name] + states[1][name]) / 2)
