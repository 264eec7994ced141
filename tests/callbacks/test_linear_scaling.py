"""The numbers of LinearScaling, where it finds the batch size, and what it rejects."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import timm.optim
import torch
from helpers.fits import Saver, differences, log_lines, make_trainer, run
from helpers.modules import BATCH_SIZE, datamodule_class, eval_loader, images, lightning, module_class
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lit_tricks.callbacks import LinearScaling, WarmupCosine, WarmupStep
from lit_tricks.callbacks.linear_scaling import lr_scaling_factor
from lit_tricks.callbacks.optim.param_groups import on_each_group


def loader(batch_size: int = BATCH_SIZE, samples: int = 16) -> DataLoader[Any]:
    return DataLoader(images(samples), batch_size=batch_size)


def scaled(*callbacks: Any, **kwargs: Any) -> Any:
    """A run whose loader states its batch size: 4."""
    return run(*callbacks, **({"loader": loader(), "max_epochs": 1} | kwargs))


def lrs(trainer: Any) -> list[float]:
    return [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.mark.parametrize(
    ("batch_size", "base_batch_size", "rule", "factor"),
    [
        (1024, 256, "linear", 4.0),  # Bag of Tricks: 0.1 becomes 0.4
        (8192, 256, "linear", 32.0),  # Goyal et al.: 0.1 becomes 3.2
        (64, 256, "linear", 0.25),
        (256, 256, "linear", 1.0),
        (1024, 256, "sqrt", 2.0),
        (512, 256, "sqrt", 1.4142135623730951),
        (96, 512, "sqrt", 0.4330127018922193),  # sqrt(3) / 4
    ],
)
def test_factor_is_linear_in_batch_size(batch_size, base_batch_size, rule, factor):
    assert lr_scaling_factor(batch_size, base_batch_size, rule) == pytest.approx(factor, rel=1e-15)


def groups(module: Any, make: Any, lrs: tuple[float, ...], **kwargs: Any) -> Any:
    parts = list(module.net) if len(lrs) == 2 else [module.net]
    return make([{"params": list(p.parameters()), "lr": lr} for p, lr in zip(parts, lrs, strict=True)], **kwargs)


OPTIMIZERS = {
    "SGD": lambda m, k: SGD(m.parameters(), lr=0.1 * k),
    "groups": lambda m, k: groups(m, SGD, (0.1 * k, 0.02 * k), momentum=0.9),
    "a group with the default": lambda m, k: SGD(
        [{"params": m.net[0].parameters()}, {"params": m.net[1].parameters(), "lr": 0.3 * k}], lr=0.1 * k
    ),
    "AdamW": lambda m, k: AdamW(m.parameters(), lr=0.001 * k),
    "Lamb": lambda m, k: timm.optim.Lamb(m.parameters(), lr=0.01 * k, weight_decay=0.1, corrected_weight_decay=True),
    "Lookahead": lambda m, k: timm.optim.Lookahead(SGD(m.parameters(), lr=0.1 * k), k=2),
    "names": lambda m, k: SGD(m.named_parameters(), lr=0.1 * k),
}


@pytest.mark.parametrize("rule", ["linear", "sqrt"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_with_the_rate_multiplied_by_hand(optimizer, rule):
    make = OPTIMIZERS[optimizer]
    tricked = scaled(LinearScaling(16, rule), optimizers=partial(make, k=1.0))
    by_hand = scaled(optimizers=partial(make, k={"linear": 0.25, "sqrt": 0.5}[rule]))
    assert not differences(tricked.weights, by_hand.weights)
    assert not differences(tricked.optimizers, by_hand.optimizers)


def test_rate_that_is_a_tensor():
    given = torch.tensor(0.1)
    end = scaled(LinearScaling(16), optimizers=lambda m: groups(m, SGD, (0.2, 0.3), weight_decay=0.1))
    assert lrs(end.trainer) == [0.05, 0.075]
    parts = lambda m: [{"params": list(part.parameters())} for part in m.net]  # noqa: E731
    end = scaled(LinearScaling(16), optimizers=lambda m: AdamW(parts(m), lr=given, foreach=False))
    assert [group["lr"].item() for group in end.trainer.optimizers[0].param_groups] == pytest.approx([0.025] * 2)
    assert given.item() == pytest.approx(0.1)


class HandsOn(torch.optim.Optimizer):
    """Round another optimizer, which gets its groups, or copies of them: as SAM and sharded optimizers do it."""

    def __init__(self, params: Any, copies: bool, **kwargs: Any) -> None:
        super().__init__(params, kwargs)
        self.inner = SGD([dict(group) for group in self.param_groups] if copies else self.param_groups)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("copies", [False, True])
def test_optimizer_in_an_optimizer_is_scaled_once(copies):
    end = scaled(LinearScaling(16), optimizers=lambda m: HandsOn(m.parameters(), copies, lr=0.1))
    assert lrs(end.trainer) == [0.025]
    assert not [key for key in end.trainer.optimizers[0].param_groups[0] if "lit_tricks" in key]


def test_manual_optimization_with_two_optimizers():
    end = run(LinearScaling(16, batch_size=4), manual=True, max_epochs=1)
    assert lrs(end.trainer) == [0.025, 0.0125]


# ---------------------------------------------------------------------------------------------------------------------
# Schedulers

SCHEDULERS = {
    "cosine": lambda opt: CosineAnnealingLR(opt, T_max=8),
    "lambda": lambda opt: LambdaLR(opt, lambda step: 1 / (1 + step)),
    "warm-up": lambda opt: LinearLR(opt, 0.1, total_iters=3),
    "sequence": lambda opt: SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=2), ExponentialLR(opt, 0.9)], [2]),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_of_the_module_start_from_the_scaled_rate(scheduler):
    def optimizers(module: Any, factor: float) -> Any:
        optimizer = groups(module, SGD, (0.1 * factor, 0.02 * factor), momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": SCHEDULERS[scheduler](optimizer), "interval": "step"},
        }

    tricked = scaled(LinearScaling(16), optimizers=partial(optimizers, factor=1))
    by_hand = scaled(optimizers=partial(optimizers, factor=0.25))
    assert not differences(tricked.weights, by_hand.weights)
    assert not differences(tricked.optimizers, by_hand.optimizers)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("schedule", [WarmupCosine(1), WarmupStep([1], warmup_epochs=0)])
def test_schedules_of_the_library_start_from_the_scaled_rate(schedule, first):
    tricks = [LinearScaling(16), schedule]
    tricked = scaled(*(tricks if first else tricks[::-1]), optimizers=partial(OPTIMIZERS["groups"], k=1), max_epochs=2)
    by_hand = scaled(schedule, optimizers=partial(OPTIMIZERS["groups"], k=0.25), max_epochs=2)
    assert not differences(tricked.weights, by_hand.weights)


def test_one_cycle_has_a_scaled_peak():
    def optimizers(module: Any, max_lr: Any = 0.1) -> Any:
        optimizer = SGD(module.parameters(), lr=0.3, momentum=0.9)
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, max_lr, total_steps=9), "interval": "step"}]

    tricked = scaled(LinearScaling(16), optimizers=optimizers, max_epochs=2)
    by_hand = scaled(optimizers=partial(optimizers, max_lr=0.1 / 4), max_epochs=2)
    assert not differences(tricked.weights, by_hand.weights)


def test_scheduler_with_rates_of_its_own_is_rejected():
    def optimizers(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [CyclicLR(optimizer, base_lr=0.1, max_lr=0.2)]

    with pytest.raises(RuntimeError, match=r"learning rates 0.025, .*CyclicLR"):
        scaled(LinearScaling(16), optimizers=optimizers)


def test_rate_that_is_set_later_is_rejected():
    def optimizers(module: Any) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        optimizer.param_groups[0]["lr"] = 0.5
        return optimizer

    with pytest.raises(RuntimeError, match=r"by 0.5.*by 0.25"):
        scaled(LinearScaling(16), optimizers=optimizers)


# ---------------------------------------------------------------------------------------------------------------------
# The true batch


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([images(16)[i] for i in range(16)])


LOADERS = {
    "DataLoader": loader,
    "batch sampler": lambda: DataLoader(
        images(16), batch_sampler=BatchSampler(SequentialSampler(range(16)), 4, drop_last=False)
    ),
    "iterable": lambda: DataLoader(Stream(), batch_size=4),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_batch_size_of_the_loader(kind):
    assert lrs(scaled(LinearScaling(8), loader=LOADERS[kind]()).trainer) == [0.05]


@pytest.mark.parametrize("place", ["attribute", "hyperparameter"])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_batch_size_of_what_makes_the_loader(owner, place):
    module, datamodule = module_class("lightning")(), datamodule_class("lightning")()
    maker = module if owner == "module" else datamodule
    if place == "attribute":
        maker.batch_size = 4
    else:
        maker.save_hyperparameters({"batch_size": 4})
    if owner == "module":
        module.train_dataloader = loader
    trainer = make_trainer(LinearScaling(8), max_epochs=1)
    trainer.fit(
        module,
        val_dataloaders=None if owner == "datamodule" else eval_loader(),
        datamodule=datamodule if owner == "datamodule" else None,
    )
    assert lrs(trainer) == [0.05]


def test_datamodules_of_the_library_say_it():
    from lit_tricks import Classifier
    from lit_tricks.data import Digits

    data = Digits(batch_size=32)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(data.input_size), 10))
    trainer = make_trainer(LinearScaling(64), fast_dev_run=1)
    trainer.fit(Classifier(net, 10, input_size=data.input_size), datamodule=data)
    assert lrs(trainer) == [0.05]


def test_the_loader_is_not_built_for_it():
    """Objects that the Trainer builds before it restores a checkpoint are not restored."""
    seen = []

    def optimizers(module: Any) -> Any:
        seen.append(module.trainer.train_dataloader)
        return SGD(module.parameters(), lr=0.1)

    scaled(LinearScaling(8), optimizers=optimizers)
    assert seen == [None]


def test_unknown_batch_size_is_asked_for():
    with pytest.raises(RuntimeError, match=r"found no batch size.*batch_size="):
        run(LinearScaling())  # its batch sampler does not say how many


def test_loaders_side_by_side_have_no_one_batch_size():
    with pytest.raises(RuntimeError, match="found no batch size"):
        scaled(LinearScaling(), loader=[loader(), loader()])


def test_accumulation_and_processes_multiply(monkeypatch):
    monkeypatch.setattr(lightning().Trainer, "distributed_sampler_kwargs", {"num_replicas": 8, "rank": 0})
    with log_lines() as records:
        end = scaled(LinearScaling(256), accumulate_grad_batches=2, max_epochs=1)
    assert lrs(end.trainer) == [0.1 * 64 / 256]
    assert records[0].getMessage() == (
        "LinearScaling: 0.1 x 64/256 = 0.025 (64 = 4 x 8 processes x 2 accumulated batches)"
    )


def test_accumulation_that_changes_is_rejected():
    scheduler = lightning().callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(RuntimeError, match="GradientAccumulationScheduler changes it"):
        scaled(LinearScaling(), scheduler)


@pytest.mark.parametrize("assumed", [2, 3, 8])
def test_batch_of_another_size_is_an_error(assumed):
    with pytest.raises(RuntimeError, match=rf"batches of {assumed} samples.*\(4, 1"):
        scaled(LinearScaling(batch_size=assumed))


def test_smaller_last_batch_is_none():
    """It may be the first one that is seen: of a short epoch, or after a resume."""
    assert lrs(scaled(LinearScaling(16), loader=loader(batch_size=8, samples=5)).trainer) == [0.05]


def test_each_fit_looks_at_its_batches():
    trick = LinearScaling(16, batch_size=4)
    scaled(trick)
    with pytest.raises(RuntimeError, match="batches of 4 samples"):
        scaled(trick, loader=loader(batch_size=8))


def test_looking_for_a_batch_size_leaves_nothing_behind():
    datamodule = datamodule_class("lightning")()
    with pytest.raises(RuntimeError, match="found no batch size"):
        make_trainer(LinearScaling()).fit(module_class("lightning")(), datamodule=datamodule)
    assert not [name for name in vars(datamodule) if "hparams" in name]


def test_larger_last_batch_is_an_error():
    with pytest.raises(RuntimeError, match="batches of 8 samples"):
        scaled(LinearScaling(batch_size=8), loader=loader(batch_size=16))


@pytest.mark.parametrize("layout", ["dict", "NamedTuple"])
def test_any_batch_is_measured(layout):
    assert lrs(run(LinearScaling(8, batch_size=4), layout=layout, max_epochs=1).trainer) == [0.05]
    with pytest.raises(RuntimeError, match="batches of 5 samples"):
        run(LinearScaling(8, batch_size=5), layout=layout, max_epochs=1)


# ---------------------------------------------------------------------------------------------------------------------
# What it logs and rejects


@pytest.mark.parametrize(
    ("trick", "base", "line"),
    [
        (LinearScaling(16), (0.1,), "0.1 x 4/16 = 0.025"),
        (LinearScaling(16, "sqrt"), (0.1,), "0.1 x sqrt(4/16) = 0.05"),
        (LinearScaling(2), (0.1, 0.02), "0.1, 0.02 x 4/2 = 0.2, 0.04"),
        (LinearScaling(4), (0.1,), "0.1 x 4/4 = 0.1"),
    ],
)
def test_says_what_it_does(trick, base, line):
    with log_lines() as records:
        end = scaled(trick, optimizers=lambda m: groups(m, SGD, base))
    assert [record.getMessage() for record in records] == [f"LinearScaling: {line}"]
    assert {metrics["linear_scaling/factor"] for metrics in end.logged.values() if "train_loss" in metrics} == {
        lr_scaling_factor(4, trick.base_batch_size, trick.rule)
    }


def test_many_rates_are_said_as_a_range():
    with log_lines() as records:
        scaled(
            LinearScaling(2),
            optimizers=lambda m: SGD([{"params": [p], "lr": 0.1 * 0.5**i} for i, p in enumerate(m.parameters())]),
        )
    assert records[0].getMessage() == "LinearScaling: 0.003125 to 0.1 x 4/2 = 0.00625 to 0.2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_batch_size": 0}, "base_batch_size=0"),
        ({"batch_size": -4}, "batch_size=-4"),
        ({"rule": "cubic"}, "rule='cubic'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearScaling(**arguments)


def test_optimizer_that_was_built_before_is_rejected():
    def optimizers(module: Any) -> Any:
        return made

    module = module_class("lightning")(optimizers=optimizers)
    made = SGD(module.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"SGD without a learning rate.*configure"):
        make_trainer(LinearScaling(16)).fit(module, loader(), eval_loader())
    assert made.param_groups[0]["lr"] == 0.1


def test_optimizer_without_a_rate_is_rejected():
    def optimizers(module: Any) -> Any:
        return HandsOn(module.parameters(), False, lr=None)

    with pytest.raises(RuntimeError, match="a HandsOn without a learning rate"):
        scaled(LinearScaling(16), optimizers=optimizers)


@pytest.mark.filterwarnings("ignore:.configure_optimizers. returned .None.")
def test_no_optimizer_is_rejected():
    with pytest.raises(RuntimeError, match="no optimizer to scale: Classifier"):
        scaled(LinearScaling(16), optimizers=lambda module: None)


def test_twice_in_the_list_is_rejected():
    with pytest.raises(RuntimeError, match="LinearScaling"):
        scaled(LinearScaling(16), LinearScaling(16))


class TunedModule(module_class("lightning")):  # type: ignore[misc]
    lr = 0.1

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=self.lr)


@pytest.mark.filterwarnings("ignore")
def test_learning_rate_finder_is_rejected(tmp_path):
    finder = lightning().callbacks.LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer = make_trainer(LinearScaling(16), finder, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"learning rates 0.025, and something else"):
        trainer.fit(TunedModule(), loader(samples=128), eval_loader())


def test_a_failing_configure_optimizers_leaves_torch_as_it_was():
    original = torch.optim.Optimizer.add_param_group

    def optimizers(module: Any) -> Any:
        assert torch.optim.Optimizer.add_param_group is not original
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scaled(LinearScaling(16), optimizers=optimizers)
    assert torch.optim.Optimizer.add_param_group is original


def test_hands_on_groups_nest():
    seen = []

    def spy(name: str, optimizer: Any, group: Any, add_param_group: Any) -> None:
        seen.append(name)
        add_param_group(group)

    original = torch.optim.Optimizer.add_param_group
    with on_each_group(partial(spy, "outer")), on_each_group(partial(spy, "inner")):
        SGD([torch.zeros(1)])
    assert seen == ["inner", "outer"]
    assert torch.optim.Optimizer.add_param_group is original


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def stopped(tmp_path: Any, *tricks: Any) -> Any:
    saver = Saver(tmp_path, steps=[3])
    run(*tricks, saver, max_epochs=1)
    return saver.paths[0]


def test_resumed_rate_is_not_scaled_again(tmp_path):
    path = stopped(tmp_path, LinearScaling(16, batch_size=4))
    with log_lines() as records:
        end = run(LinearScaling(16, batch_size=4), ckpt_path=path)
    assert lrs(end.trainer) == [0.025]
    assert records[0].getMessage() == "LinearScaling: 0.1 x 4/16 = 0.025"


def test_resume_with_another_batch_is_rejected(tmp_path):
    path = stopped(tmp_path, LinearScaling(16, batch_size=4))
    message = r"multiplies the learning rates by 0.5, and the checkpoint brings rates multiplied by 0.25. Resume with "
    with pytest.raises(RuntimeError, match=message):
        run(LinearScaling(16, batch_size=4), ckpt_path=path, accumulate_grad_batches=2)


def test_resume_of_a_run_without_it_is_rejected(tmp_path):
    path = stopped(tmp_path)
    with pytest.raises(RuntimeError, match=r"rates by 0.25, .*multiplied by 1\."):
        run(LinearScaling(16, batch_size=4), ckpt_path=path)


def test_checkpoint_from_before_the_first_fit(tmp_path):
    """It has no optimizers yet, and no rates. Cross-validation starts its folds from one."""
    trainer = make_trainer(LinearScaling(16, batch_size=4))
    trainer.strategy.connect(module_class("lightning")())
    trainer.save_checkpoint(tmp_path / "new.ckpt", weights_only=False)
    end = run(LinearScaling(16, batch_size=4), max_epochs=1, ckpt_path=tmp_path / "new.ckpt")
    assert lrs(end.trainer) == [0.025]


def test_resume_where_the_checkpoint_comes_last(tmp_path):
    """As ModelParallelStrategy restores it: after on_fit_start."""
    trick, trainer = LinearScaling(16, batch_size=4), make_trainer()
    trick._base, trick._factor = [0.1], 0.25
    trick.on_load_checkpoint(trainer, None, {"callbacks": {"LinearScaling": {"factor": 0.25}}})
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.5"):
        trick.on_load_checkpoint(trainer, None, {"callbacks": {"LinearScaling": {"factor": 0.5}}})


def test_resume_without_it_is_warned_of(tmp_path):
    path = stopped(tmp_path, LinearScaling(16, batch_size=4))
    with pytest.warns(UserWarning, match="following callbacks: .'LinearScaling'"):
        run(ckpt_path=path)
