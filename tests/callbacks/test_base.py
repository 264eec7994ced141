"""The base of the tricks: methods that are wrapped, and come off again, in any order, copied or not."""

from __future__ import annotations

import itertools
import pickle
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.fits import log_lines, make_trainer
from helpers.modules import NAMESPACES, eval_loader, lightning, module_class, train_loader
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn

import lit_tricks
from lit_tricks.callbacks.base import Trick, paused


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def method(self, *args: Any, **kwargs: Any) -> str:
        self.calls.append("method")
        return f"{args}{kwargs}"


class Tag(Trick):
    """Writes its name round what a method returns."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    def write(self, method: Any, *args: Any, **kwargs: Any) -> str:
        return f"{self.tag}[{method(*args, **kwargs)}]"


def tagged(owner: Owner, *tags: str) -> list[Tag]:
    tricks = [Tag(tag) for tag in tags]
    for trick in tricks:
        trick.wrap(owner, "method", trick.write)
    return tricks


def take_off(trick: Trick, owner: Any = None) -> None:
    trick.teardown(None, owner, "fit")


# ---------------------------------------------------------------------------------------------------------------------
# On and off


def test_the_last_one_is_outermost_and_arguments_go_through():
    owner = Owner()
    tagged(owner, "a", "b")
    assert owner.method(1, key=2) == "b[a[(1,){'key': 2}]]"
    assert owner.calls == ["method"]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_wrappers_are_removed_in_any_order(order):
    owner = Owner()
    tricks = dict(zip("abc", tagged(owner, *"abc"), strict=True))
    left = list("abc")
    for tag in order:
        take_off(tricks[tag])
        left.remove(tag)
        assert owner.method() == "".join(f"{t}[" for t in reversed(left)) + "(){}" + "]" * len(left)
    assert "method" not in vars(owner)


@pytest.mark.parametrize("order", list(itertools.permutations("ab")))
def test_a_method_that_was_an_attribute_of_the_object_stays_one(order):
    owner = Owner()
    owner.method = own = lambda: "own"
    tricks = dict(zip("ab", tagged(owner, *"ab"), strict=True))
    assert owner.method() == "b[a[own]]"
    for tag in order:
        take_off(tricks[tag])
    assert owner.method is own


def test_one_trick_on_several_methods_and_twice_on_one():
    owner, other, trick = Owner(), Owner(), Tag("a")
    for target in (owner, other, owner):
        trick.wrap(target, "method", trick.write)
    assert (owner.method(), other.method()) == ("a[a[(){}]]", "a[(){}]")
    take_off(trick)
    assert (owner.method(), other.method()) == ("(){}", "(){}")
    assert not {"method"} & (vars(owner).keys() | vars(other).keys())


def test_taking_off_twice_or_nothing_does_nothing():
    owner = Owner()
    first, second = tagged(owner, "a", "b")
    take_off(first)
    take_off(first)
    take_off(Tag("c"))
    assert owner.method() == "b[(){}]"
    take_off(second)


def test_an_exception_goes_through_and_takes_it_off():
    def fail() -> None:
        raise ZeroDivisionError

    owner = Owner()
    owner.method = fail
    [trick] = tagged(owner, "a")
    with pytest.raises(ZeroDivisionError) as error:
        owner.method()
    trick.on_exception(None, owner, error.value)
    assert owner.method is fail


# ---------------------------------------------------------------------------------------------------------------------
# Copies

COPIES = {"deepcopy": deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing))}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_the_owner_calls_itself(copy):
    owner = Owner()
    tricks = tagged(owner, "a", "b")
    twin = COPIES[copy](owner)
    assert twin.method() == "b[a[(){}]]"
    assert (owner.calls, twin.calls) == ([], ["method"])
    for trick in tricks:
        take_off(trick)
    assert owner.method() == "(){}"
    assert twin.method() == "b[a[(){}]]"  # nobody knows of it


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_an_owner_that_is_an_argument_too_is_the_argument(copy):
    owner, trick = Owner(), Tag("a")
    trick.wrap(owner, "method", partial(record, owner))
    twin = COPIES[copy](owner)
    twin.method()
    assert (owner.calls, twin.calls) == ([], ["seen", "method"])


def record(owner: Owner, method: Any) -> str:
    owner.calls.append("seen")
    return method()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_trick_has_nothing_on_and_no_module_with_it(copy):
    owner = Owner()
    [trick] = tagged(owner, "a")
    trick.log = trick.log_dict = owner.method  # as the Trainer does
    twin = COPIES[copy](trick)
    assert vars(twin) == {"tag": "a"}
    take_off(twin)
    assert owner.method() == "a[(){}]"


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lightning_sees_which_hooks_are_overridden(namespace):
    is_overridden = lightning(namespace).utilities.model_helpers.is_overridden
    module = module_class(namespace)()
    for trick in (Tag("a"), Tag("b")):
        trick.wrap(module, "validation_step", trick.write)
        trick.wrap(module, "on_train_start", trick.write)
        assert is_overridden("validation_step", module)
        assert not is_overridden("on_train_start", module)


class AroundSteps(Trick):
    """Counts the training steps, from one side or the other of ``on_exception``."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.steps = 0
        self.wrap(pl_module, "training_step", self.count)

    def count(self, training_step: Any, *args: Any) -> Any:
        self.steps += 1
        return training_step(*args)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_a_fit_that_ends_in_any_way_takes_everything_off(namespace, error, restored_interrupts):
    module = module_class(namespace)(raises={"training_step": error()} if error else {})
    tricks = [AroundSteps(), AroundSteps()]
    trainer = make_trainer(*tricks, namespace=namespace, max_epochs=1)
    try:
        trainer.fit(module, train_loader(), eval_loader())
    except (ZeroDivisionError, SystemExit):
        assert error
    assert [trick.steps for trick in tricks] == [3 if error else 4] * 2
    assert "training_step" not in vars(module)
    assert not any(trick._wrappers for trick in tricks)


def test_says_its_name_on_the_first_rank_alone(monkeypatch):
    with log_lines() as records:
        Tag("a").announce("does this")
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        Tag("a").announce("does this")
    assert [record.getMessage() for record in records] == ["Tag: does this"]


class LogsStep(Trick):
    """Logs the number of the step, where that is of use."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.should_log(trainer):
            pl_module.log("number", float(trainer.global_step))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("how", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulation"])
def test_knows_the_batches_whose_quantities_are_logged(namespace, how):
    """In every logged step the value of that step."""
    trainer = make_trainer(LogsStep(), namespace=namespace, max_epochs=3, log_every_n_steps=3, **how)
    trainer.fit(module_class(namespace)(), train_loader(), eval_loader())
    logged = {step: metrics for step, metrics in trainer.logger.metrics.items() if "train_loss" in metrics}
    assert len(logged) > 1
    assert all(metrics["number"] == step for step, metrics in logged.items())


class Negates(Trick):
    """Changes the sign of the images of training batches."""

    transient = ("trainer",)
    trainer: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer, self.seen = trainer, 0
        self.change_training_batches(trainer, self.change)

    def change(self, batch: Any) -> Any:
        self.seen += 1
        image, label = batch
        return [-image.abs() - 1, label]


class SignOfImages(nn.Module):
    """Counts batches by stage and by the sign of their images."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer, self.found = trainer, set[tuple[str, bool]]()

    def forward(self, x: Any) -> Any:
        self.found.add((self.trainer.state.stage.value, bool((x < 0).all())))
        return x


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_change_training_batches_changes_no_others(namespace):
    trick = Negates()
    trainer = make_trainer(trick, namespace=namespace, max_epochs=1, num_sanity_val_steps=1)
    module = module_class(namespace)()
    module.net.insert(0, SignOfImages(trainer))
    trainer.fit(module, train_loader(), eval_loader())
    stages = {"train": True, "validate": False, "sanity_check": False}
    assert module.net[0].found == set(stages.items())
    assert trick.seen == 4
    assert "batch_to_device" not in vars(trainer.strategy)


def test_paused_tricks_leave_training_batches_unchanged():
    trick = Negates()
    trainer = make_trainer(trick)
    with paused(trainer):
        assert trick.is_paused
    assert not trick.is_paused
    assert "is_paused" not in trick.__getstate__()


def test_copies_lack_transient_attributes():
    trick = Negates()
    trick.trainer, trick.seen = object(), 3
    for copy in (deepcopy(trick), pickle.loads(pickle.dumps(trick))):
        assert copy.trainer is None
        assert copy.seen == 3


FILES = sorted(Path(lit_tricks.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_wrapped_method_has_its_reason_above(file):
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    for above, line in itertools.pairwise(lines):
        assert not line.startswith("self.wrap(") or above.startswith(("# ", "self.wrap(")), line
