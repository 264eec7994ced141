"""Schedulers with a value for each parameter group, under tricks that split the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fits import make_trainer
from helpers.modules import eval_loader, lightning, module_class, train_loader
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lit_tricks import LayerDecay, LinearScaling, Muon, NoBiasDecay, Unfreeze


class Own(LambdaLR):
    """A scheduler of a project, with its own arguments."""

    def __init__(self, optimizer: Any, power: list[float]) -> None:
        super().__init__(optimizer, [lambda step, each=each: (1 + step) ** -each for each in power])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: LambdaLR(o, lr_lambda=[lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.5]),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=[0.1, 0.4], total_steps=12, base_momentum=[0.8, 0.85]),
    "of a project": lambda o: Own(o, [0.5, 1.0]),
    "in a SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, total_iters=3), LambdaLR(optimizer=o, lr_lambda=(lambda s: 0.9**s, lambda s: 0.5**s))], [4]
    ),
    "in a ChainedScheduler": lambda o: ChainedScheduler(
        [LinearLR(o, total_iters=3), LambdaLR(o, [lambda s: 0.9**s, lambda s: 0.5**s])]
    ),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=1e9, min_lr=[0.02, 0.15]),
}


def rates_of(scheduler: str, *tricks: Any) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Return the learning rate of each parameter in each epoch or step, and the number of the parameter's own group."""
    of_epoch = scheduler == "ReduceLROnPlateau"

    def optimizers(module: Any) -> Any:
        net = list(module.net)
        groups = [
            {"params": [p for part in net[:-1] for p in part.parameters()]},
            {"params": net[-1].parameters(), "lr": 0.3},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
        config = {"scheduler": SCHEDULERS[scheduler](optimizer), "interval": "epoch" if of_epoch else "step"}
        return {"optimizer": optimizer, "lr_scheduler": config | ({"monitor": "val/loss"} if of_epoch else {})}

    class Watch(lightning().Callback):  # type: ignore[misc,name-defined]
        """Keeps the learning rate of each parameter."""

        seen: list[dict[str, float]]

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen = []

        def _see(self, trainer: Any, pl_module: Any) -> None:
            names = {p: name for name, p in pl_module.named_parameters()}
            groups = trainer.optimizers[0].param_groups
            self.seen.append({names[p]: float(group["lr"]) for group in groups for p in group["params"]})

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self._see(trainer, pl_module)

    class Module(module_class("lightning")):  # type: ignore[misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("val/loss", 1.0)

    torch.manual_seed(0)
    module = Module(optimizers=optimizers)
    make_trainer(watch := Watch(), *tricks, max_epochs=3).fit(module, train_loader(), eval_loader())
    last = {f"net.{len(module.net) - 1}.{name}" for name, _ in module.net[-1].named_parameters()}
    return watch.seen, {name: int(name in last) for name in watch.seen[0]}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("order", [1, -1])
def test_tricks_that_split_groups_keep_the_values_of_each(scheduler: str, order: int) -> None:
    expected, _ = rates_of(scheduler)
    assert len({tuple(rates.values()) for rates in expected}) > 1
    found, _ = rates_of(scheduler, *[NoBiasDecay(), Unfreeze({"net.0.0": 0.1})][::order])
    assert found == expected


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
@pytest.mark.parametrize("order", [1, -1])
def test_factors_multiply_the_values_of_each_group(scheduler: str, order: int) -> None:
    plain, _ = rates_of(scheduler)
    tricks = [NoBiasDecay(), LayerDecay(0.5), LinearScaling(base_batch_size=32, batch_size=4)]
    found, _ = rates_of(scheduler, *tricks[::order])
    factors = [{name: rates[name] / before[name] for name in rates} for rates, before in zip(found, plain, strict=True)]
    for each in factors:
        assert each == pytest.approx(factors[0])
    assert len({round(factor, 6) for factor in factors[0].values()}) > 1


@pytest.mark.parametrize("order", [1, -1])
def test_muon_follows_the_values_of_each_group(order: int) -> None:
    plain, group_of = rates_of("LambdaLR")
    found, _ = rates_of("LambdaLR", *[NoBiasDecay(), Muon(lr=0.05)][::order])
    changed = {name for name in found[0] if found[0][name] != plain[0][name]}
    assert changed
    assert {group_of[name] for name in changed} == {0}  # the classifier keeps its own
    for rates, before in zip(found, plain, strict=True):
        for name in rates:
            assert rates[name] == pytest.approx(before[name] * (0.05 / 0.1 if name in changed else 1))


def test_a_list_of_another_length_is_torchs_error() -> None:
    def optimizers(module: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01)
        return [optimizer], [LambdaLR(optimizer, [lambda step: 1.0] * 3)]

    module = module_class("lightning")(optimizers=optimizers)
    with pytest.raises(ValueError, match="but got 3"):
        make_trainer(NoBiasDecay()).fit(module, train_loader(), eval_loader())


def test_schedulers_are_as_before_afterwards() -> None:
    before = {kind: kind.__init__ for kind in (LambdaLR, MultiplicativeLR, OneCycleLR, ReduceLROnPlateau, LRScheduler)}
    rates_of("LambdaLR", NoBiasDecay())
    assert {kind: kind.__init__ for kind in before} == before
