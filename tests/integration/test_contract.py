"""The contract that every trick keeps, as the table in ``tricks.py`` says. See CONTRIBUTING.md for its ten points."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import pickle
import re
import types
import typing
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from helpers.fits import Result, Saver, differences, log_lines, make_trainer, result, run, weights_of
from helpers.modules import LAYOUTS, NAMESPACES, datamodule_class, eval_loader, module_class, train_loader
from helpers.pairwise import parametrize_pairwise
from helpers.schedule_free import ScheduleFreeSGD
from helpers.traces import class_attributes, traces
from helpers.tricks import CASES, TRICKS

from lit_tricks import callbacks

ROOT = Path(__file__).parents[2]

each_trick = pytest.mark.parametrize("name", TRICKS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA averages the statistics of the BatchNorm layers"),
    pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network"),  # runs here start from random weights
    pytest.mark.filterwarnings("ignore:TestTimeAugment has no effect"),  # the test_step here does nothing
]


@functools.cache
def without_trick(**kwargs: Any) -> Result:
    return run(**kwargs)


@functools.cache
def with_trick(name: str, **kwargs: Any) -> Result:
    return run(TRICKS[name].make(), **kwargs)


def rejected(name: str, *cases: str, **kwargs: Any) -> bool:
    """Return whether the trick's row rejects one of these cases. A run then has to raise the error in the row."""
    assert set(cases) <= set(CASES)
    for case in cases:
        if case in TRICKS[name].rejected:
            with pytest.raises(RuntimeError, match=TRICKS[name].rejected[case]):
                run(TRICKS[name].make(), **kwargs)
            return True
    return False


def assert_effect(name: str, tricked: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """See that the weights are others than without the trick, or for one that is about speed the same."""
    assert all(weight.isfinite().all() for weight in tricked.values())
    if TRICKS[name].same_numbers:
        torch.testing.assert_close(tricked, plain, rtol=1e-2, atol=1e-2)
    else:
        assert differences(tricked, plain), "the run ended with the weights of one without the trick"


def assert_equal(left: Result, right: Result) -> None:
    assert not differences(left.weights, right.weights)
    assert not differences(left.optimizers, right.optimizers)
    assert not differences(left.tricks, right.tricks)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of a trick


def test_every_trick_has_a_row():
    assert sorted(TRICKS) == sorted(callbacks.__all__)


@each_trick
def test_row_rejects_known_cases_only(name):
    assert set(TRICKS[name].rejected) <= set(CASES) - {"resume"}  # what can be trained can be resumed


@each_trick
def test_has_a_test_file(name):
    assert re.search(rf"\b{name}\(", (ROOT / "tests" / "callbacks" / TRICKS[name].tests).read_text())


@each_trick
def test_has_a_config(name):
    file = getattr(callbacks, name).__module__.rpartition(".")[2]
    config = yaml.safe_load((ROOT / "configs" / "tricks" / f"{file}.yaml").read_text())
    [trick] = config["trainer"]["callbacks+"]
    assert trick["class_path"].rpartition(".")[2] == name
    getattr(callbacks, name)(**trick.get("init_args", {}))


# ---------------------------------------------------------------------------------------------------------------------
# The card, and the arguments


def is_literal(annotation: Any) -> bool:
    """Return whether values of the type can be written in YAML: a module as its class_path and init_args."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType, list, tuple, dict, Sequence):
        return all(is_literal(arg) for arg in args if arg is not ...)
    if origin is Callable:
        return True  # a function by its import path
    return origin is Literal or annotation in (bool, int, float, str, type(None), torch.nn.Module)


@each_trick
def test_arguments_are_literals(name):
    trick = getattr(callbacks, name)
    hints = typing.get_type_hints(trick.__init__)
    for argument in inspect.signature(trick).parameters:
        assert is_literal(hints[argument]), f"{argument}: {hints[argument]}"


@each_trick
def test_card_has_a_source_and_all_sections(name):
    card = inspect.getdoc(getattr(callbacks, name))
    first_line = card.partition("\n")[0]
    assert re.search(r"\(\[.+\]\(https?://.+\)\)\.$", first_line)
    arguments = ("Args:\n",) if inspect.signature(getattr(callbacks, name)).parameters else ()
    for section in ("Cost: ", *arguments, "Raises:\n", "Example:\n"):
        assert f"\n{section}" in card, section


@each_trick
def test_card_documents_every_argument(name):
    trick = getattr(callbacks, name)
    section = re.search(r"^Args:\n(.+?)^\S", inspect.getdoc(trick), re.DOTALL | re.MULTILINE)
    documented = re.findall(r"^    (\w+): \S", section.group(1), re.MULTILINE) if section else []
    assert documented == list(inspect.signature(trick).parameters)


@each_trick
def test_example_of_the_card_builds(name):
    [example] = re.findall(r"^    ``(- .+)``$", inspect.getdoc(getattr(callbacks, name)), re.MULTILINE)
    [trick] = yaml.safe_load(example)
    assert trick["class_path"] == name
    getattr(callbacks, name)(**trick.get("init_args", {}))


@each_trick
def test_print_config_round_trip(name, tmp_path, capsys):
    from lit_tricks.cli import main

    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments, "--print_config"])
        assert not stop.value.code
        return capsys.readouterr().out

    config = tmp_path / "config.yaml"
    config.write_text(printed("--data", "Digits", f"--trainer.callbacks+={name}", *TRICKS[name].flags))
    paths = [callback["class_path"] for callback in yaml.safe_load(config.read_text())["trainer"]["callbacks"]]
    assert len([path for path in paths if path.rpartition(".")[2] == name]) == 1
    assert printed("--config", str(config)) == config.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Any module, any batch


AS_BY_DEFAULT = {"enable_model_summary": True, "num_sanity_val_steps": 2}  # both send batches through the hooks


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_runs_without_a_trick_are_repeatable(namespace):  # what all comparisons here rest on
    assert_equal(run(namespace=namespace), without_trick(namespace="lightning"))


@parametrize_pairwise(
    "name, layout, loss, namespace", list(TRICKS), list(LAYOUTS), ["functional loss", "criterion"], list(NAMESPACES)
)
def test_has_an_effect_on_any_module_and_batch(name, namespace, layout, loss):
    how = {"namespace": namespace, "layout": layout, "criterion": loss == "criterion"} | AS_BY_DEFAULT
    if not rejected(name, layout, loss, **how):
        assert_effect(name, with_trick(name, **how).weights, without_trick(**how).weights)


@each_trick
def test_has_an_effect_with_a_datamodule_that_has_its_own_transfer_hook(name):
    def fit(*tricks: Any) -> Any:
        module, trainer = module_class("lightning")(), make_trainer(*tricks)
        trainer.fit(module, datamodule=datamodule_class("lightning")())
        return weights_of(module)

    assert_effect(name, fit(TRICKS[name].make()), fit())


@each_trick
def test_manual_optimization_with_two_optimizers(name):
    if not rejected(name, "manual optimization", manual=True):
        assert_effect(name, with_trick(name, manual=True).weights, without_trick(manual=True).weights)


@each_trick
def test_accumulated_gradients_work_or_are_rejected(name):
    how = {"accumulate_grad_batches": 2}
    if not rejected(name, "accumulation", **how):
        tricked = with_trick(name, **how)
        assert tricked.trainer.global_step == 6
        assert_effect(name, tricked.weights, without_trick(**how).weights)


@each_trick
def test_bf16_mixed_works_or_is_rejected(name):
    if not rejected(name, "bf16-mixed", precision="bf16-mixed"):
        assert_effect(
            name, with_trick(name, precision="bf16-mixed").weights, without_trick(precision="bf16-mixed").weights
        )


@each_trick
def test_16_mixed_with_skipped_steps(name):
    if not rejected(name, "16-mixed", precision="16-mixed"):
        tricked = with_trick(name, precision="16-mixed")
        scaler = tricked.trainer.precision_plugin.scaler
        small = name == "GeneralizedCrossEntropy"  # its gradients overflow on some CPUs only
        assert small or scaler.get_scale() < scaler._init_scale, "no step was skipped"
        assert_effect(name, tricked.weights, without_trick(precision="16-mixed").weights)


def compiled_run(*tricks: Any, validates: bool = False) -> tuple[Result, list[int]]:
    """A run of a compiled module, and the step in which each of its graphs was compiled."""
    steps = []

    def backend(graph: Any, inputs: Any) -> Any:
        steps.append(trainer.global_step)
        return graph.forward

    torch._dynamo.reset()
    module = module_class("lightning")(quiet=True)
    trainer = make_trainer(*tricks, **({"num_sanity_val_steps": 2} if validates else {"limit_val_batches": 0}))
    torch.manual_seed(0)
    trainer.fit(torch.compile(module, backend=backend), train_loader(), eval_loader())
    return result(trainer), steps


@functools.cache
def compiled_without_trick() -> Result:
    return compiled_run()[0]


@each_trick
def test_compiled_module_works_or_is_rejected(name):
    if "torch.compile" in TRICKS[name].rejected:
        with pytest.raises(RuntimeError, match=TRICKS[name].rejected["torch.compile"]):
            compiled_run(TRICKS[name].make())
        return
    validates = TRICKS[name].validates
    tricked, steps = compiled_run(TRICKS[name].make(), validates=validates)
    assert_effect(name, tricked.weights, compiled_without_trick().weights)
    how = {} if validates else {"limit_val_batches": 0}
    torch.testing.assert_close(tricked.weights, with_trick(name, quiet=True, **how).weights)
    assert steps
    assert max(steps) <= 2, f"compiled again and again, in steps {steps}"


# ---------------------------------------------------------------------------------------------------------------------
# Copies, and a second fit


def other_sgd(module: Any) -> Any:
    """Without momentum, with another learning rate and two groups."""
    return torch.optim.SGD([{"params": part.parameters()} for part in module.net], lr=0.2, weight_decay=0.02)


COPIES = {"deepcopy": deepcopy, "pickle": lambda trick: pickle.loads(pickle.dumps(trick))}


@parametrize_pairwise("name, copy, used", list(TRICKS), list(COPIES), [False, True])
def test_a_copy_works_as_a_new_one(name, used, copy):
    trick = TRICKS[name].make()
    if used:
        run(trick)
    assert len(pickle.dumps(trick)) < 50_000, "the module, of 100 kB, went into the pickle"
    assert_equal(run(COPIES[copy](trick)), with_trick(name))


@each_trick
@pytest.mark.parametrize("first_use", ["another fit", "an error", "Ctrl-C"])
def test_second_trainer_finds_it_as_new(name, first_use, restored_interrupts):
    trick = TRICKS[name].make()
    if first_use == "another fit":
        how = {"namespace": "pytorch_lightning", "optimizers": other_sgd}
        run(trick, loader=train_loader(batches=5), max_epochs=2, **how)
    else:
        error = ZeroDivisionError() if first_use == "an error" else KeyboardInterrupt()
        with pytest.raises((ZeroDivisionError, SystemExit)):
            run(trick, raises={"training_step": error})
    assert_equal(run(trick), with_trick(name))


@each_trick
def test_second_fit_with_the_same_trainer_goes_on_as_a_resumed_run(name, tmp_path):
    """Without momentum, which Lightning drops in a second fit."""
    how = {"optimizers": other_sgd, "max_epochs": 2}
    make = functools.partial(callbacks.Muon, momentum=0.0) if name == "Muon" else TRICKS[name].make
    first = run(make(), **how)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt", weights_only=False)
    first.trainer.fit_loop.max_epochs = 3
    first.trainer.fit(first.module, train_loader(), eval_loader())
    resumed = run(make(), ckpt_path=tmp_path / "first.ckpt", optimizers=other_sgd)
    assert first.trainer.global_step == resumed.trainer.global_step == 12
    assert not differences(weights_of(first.module), resumed.weights)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves nothing behind

ENDINGS: dict[str, Any] = {
    "the end": (None, None, None),
    "an error in training": ("training_step", ZeroDivisionError, ZeroDivisionError),
    "an error in validation": ("validation_step", ZeroDivisionError, ZeroDivisionError),
    "Ctrl-C in training": ("training_step", KeyboardInterrupt, SystemExit),
    "Ctrl-C in validation": ("validation_step", KeyboardInterrupt, SystemExit),
}


def traces_after(ending: str, *tricks: Any) -> dict[str, Any]:
    step, error, seen = ENDINGS[ending]
    module = module_class("lightning")(raises={step: error()} if step else {})
    trainer, datamodule = make_trainer(*tricks), datamodule_class("lightning")()
    torch.manual_seed(0)
    with pytest.raises(seen) if seen else contextlib.nullcontext():
        trainer.fit(module, datamodule=datamodule)
    return traces(trainer, module, datamodule) | class_attributes(trainer, module, datamodule, datamodule.loader)


@each_trick
@pytest.mark.parametrize("ending", ENDINGS)
def test_leaves_nothing_behind_after(name, ending, restored_interrupts):
    without_trick()  # torch and Lightning patch classes themselves, when they are first used
    compiled_without_trick()
    plain = traces_after(ending, *TRICKS[name].plain())
    assert not differences(traces_after(ending, TRICKS[name].make()), plain)


# ---------------------------------------------------------------------------------------------------------------------
# Resume

RUNS = {
    "one optimizer": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "manual optimization": {"manual": True},
}
RESUMED = [  # each trick with one optimizer, and in turn with one of the others
    pytest.param(name, kind, marks=() if not number else getattr(pytest.mark, ("slow", "full")[(place + number) % 2]))
    for place, name in enumerate(TRICKS)
    for number, kind in enumerate(RUNS)
]


@pytest.mark.parametrize(("name", "kind"), RESUMED)
def test_resume_is_bitwise_from_every_checkpoint(name, kind, tmp_path):
    """After each step (the last of an epoch too), each validation and each epoch."""
    how = RUNS[kind]
    if rejected(name, *{kind} & set(CASES), **how):
        return
    saver = Saver(tmp_path)
    full = run(TRICKS[name].make(), saver, **how)
    assert len(saver.paths) == full.trainer.global_step // (2 if kind == "manual optimization" else 1) + 3 + 3
    for path in saver.paths:
        resumed = run(TRICKS[name].make(), ckpt_path=path, **how)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.optimizers, full.optimizers), path.name
        assert not differences(resumed.tricks, full.tricks), path.name
        todo = {step: metrics for step, metrics in full.logged.items() if step in resumed.logged}
        assert not differences(resumed.logged, todo), path.name
        if path == saver.paths[0]:
            assert set(resumed.logged) >= set(list(full.logged)[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Strategies


@pytest.mark.slow
@each_trick
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_two_processes_end_equal_or_are_rejected(name, strategy, ranks):
    runs = [rank[strategy] for rank in ranks]
    if strategy in TRICKS[name].rejected:
        for rank in runs:
            assert re.search(TRICKS[name].rejected[strategy], rank[name].get("rejected", "no error"))
        return
    for rank in runs:
        assert "rejected" not in rank[name], rank[name]["rejected"]
        assert_effect(name, rank[name]["weights"], rank["no trick"]["weights"])
        assert len(rank[name]["resumed"]) == 2
        for path, weights in rank[name]["resumed"].items():
            assert not differences(trained(weights), trained(rank[name]["weights"])), path
    assert not differences(*(trained(rank[name]["weights"]) for rank in runs))
    assert [len(rank[name]["lines"]) for rank in runs] == [1, 0]


@pytest.mark.slow
@each_trick
def test_fsdp2_trains_as_ddp(name, ranks):
    if not {"DDP", "FSDP2"} & TRICKS[name].rejected.keys():
        for rank in ranks:
            torch.testing.assert_close(*(trained(rank[strategy][name]["weights"]) for strategy in ("DDP", "FSDP2")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Freeze", "LayerDecay", "Lookahead", "Muon", "NoBiasDecay", "Unfreeze"])
@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_two_processes_resume_with_an_optimizer_of_more_state(name, strategy, ranks):
    for rank in ranks:
        run = rank[strategy][f"{name} AdamW"]
        [resumed] = run["resumed"].values()
        assert not differences(trained(resumed), trained(run["weights"]))


def trained(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the statistics of BatchNorm: each rank has its own."""
    return {name: value for name, value in weights.items() if name.endswith((".weight", ".bias"))}


# ---------------------------------------------------------------------------------------------------------------------
# Others' batches, other tricks, and what it logs


def batches_seen(layout: str, *tricks: Any) -> list[tuple[str, Any]]:
    module = module_class("lightning")()
    trainer = make_trainer(*tricks, num_sanity_val_steps=1, max_epochs=2)
    trainer.fit(module, train_loader(layout), eval_loader(layout))
    for stage in (trainer.validate, trainer.test, trainer.predict):
        stage(module, eval_loader(layout))
    return module.seen


@each_trick
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_batches_are_untouched(name, layout):
    if layout in TRICKS[name].rejected:
        return
    seen = batches_seen(layout, TRICKS[name].make())
    assert {stage for stage, _ in seen} == {"sanity", "validate", "test", "predict"}
    assert not differences(seen, batches_seen(layout))


def schedule_free_sgd(module: Any) -> Any:
    return ScheduleFreeSGD(module.parameters(), lr=0.1, weight_decay=0.01)


def weights_or_error(*names: str) -> tuple[dict[str, torch.Tensor], str]:
    make = {name: TRICKS[name].make for name in names}
    options: dict[str, Any] = {}
    if "ScheduleFree" in make:  # its own optimizer in the module: tricks that split groups find it in any order
        make["ScheduleFree"], options["optimizers"] = callbacks.ScheduleFree, schedule_free_sgd
    try:
        return run(*(make[name]() for name in names), max_epochs=2, **options).weights, ""
    except RuntimeError as error:
        return {}, str(error)


PAIRS = [  # of which every sixth in each run, so that every trick meets a sixth of the others
    pytest.param(*pair, marks=[] if number % 6 == 0 else pytest.mark.full)
    for number, pair in enumerate(itertools.combinations_with_replacement(TRICKS, 2))
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_order_does_not_matter_or_is_an_error(first, second):
    weights, error = weights_or_error(first, second)
    swapped_weights, swapped_error = weights_or_error(second, first)
    for message in filter(None, (error, swapped_error)):
        assert first in message
        assert second in message
    if not error and not swapped_error:
        assert not differences(weights, swapped_weights)


@each_trick
def test_says_once_a_fit_what_it_does(name):
    trick = TRICKS[name].make()
    with log_lines() as records:
        for fits in (1, 2):
            run(trick)
            assert [record.levelno for record in records] == [logging.INFO] * fits
    for record in records:
        assert re.match(rf"{name}: \S.*\S$", record.getMessage())


@each_trick
@pytest.mark.smoke
def test_logs_its_quantities(name):
    new = {key for metrics in with_trick(name).logged.values() for key in metrics}
    new -= {key for metrics in without_trick().logged.values() for key in metrics}
    assert set(TRICKS[name].logs) <= new
    assert TRICKS[name].logs
