"""PreciseBN: its numbers, that training notices nothing, what is validated and saved, and what it rejects."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.averages import Interrupt
from helpers.fits import Saver, differences, log_lines, make_trainer, run, weights_of
from helpers.modules import (
    BATCHES,
    eval_loader,
    image_and_label,
    images,
    lightning,
    module_class,
    train_loader,
    wrapped_by_fsdp1,
)
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lit_tricks import Classifier
from lit_tricks.callbacks import EMA, MixUp, PreciseBN
from lit_tricks.callbacks.batchnorm.statistics import estimate, pooled, shift
from lit_tricks.data import Digits
from lit_tricks.utils.modules import batchnorms_of

pl = lightning()
STEPS = 3 * BATCHES  # of a run of ``_fits.run``
ALL = 1000  # more samples than there are
Weights = dict[str, torch.Tensor]


def halves(size: int, features: int = 3) -> torch.Tensor:
    """Data whose first half is nothing like the second."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(size, features, 6, 6, generator=generator)
    data[: size // 2] = data[: size // 2] * 3 - 10
    return data


def estimated(model: nn.Module, batches: Any, **kwargs: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return estimate(model, batchnorms_of(model), batches, model, **kwargs)


def assert_precise(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def population(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the whole, in float64."""
    dims = [d for d in range(data.dim()) if d != 1]
    return data.double().mean(dims), data.double().var(dims, correction=0)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and formulas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 1.5}, "num_samples=1.5"),
        ({"when": "start"}, "when='start'"),
        ({"when": 0}, "when=0"),
        ({"when": True}, "when=True"),
        ({"transform": "test"}, "transform='test'"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreciseBN(**arguments)


def test_pooled_is_exact_however_the_batches_were_made():
    data = halves(64)
    for sizes in ([64], [32, 32], [1, 2, 29, 32], [7] * 9 + [1]):
        parts = [population(part) for part in data.split(sizes)]
        found = pooled(*zip(*parts, strict=True), [size * 36 for size in sizes])
        torch.testing.assert_close(found, population(data), rtol=1e-12, atol=1e-12)


def test_shift_is_in_standard_deviations():
    new = {"a": (torch.zeros(2).double(), torch.full((2,), 4.0).double())}
    assert shift({"a": (torch.zeros(2), torch.full((2,), 4.0))}, new) == 0
    assert shift({"a": (torch.full((2,), 2.0), torch.full((2,), 4.0))}, new) == pytest.approx(1, rel=1e-5)
    assert shift({"a": (torch.zeros(2), torch.zeros(2))}, new) == pytest.approx(1, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The estimate, against the whole population in float64, and against fvcore


@pytest.mark.parametrize("sizes", [[64], [32, 32], [5, 27, 32]], ids=str)
def test_two_very_different_halves(sizes):
    data, layer = halves(64), nn.Sequential(nn.BatchNorm2d(3))
    [found] = estimated(layer, data.split(sizes)).values()
    expected = population(data)
    assert_precise(found, expected)
    # the mean of the variances of the batches, as torch and the older recipes have it, leaves out most of it
    within = torch.stack([part.double().var((0, 2, 3)) for part in data.split([32, 32])]).mean(0)
    assert (within < 0.3 * expected[1]).all()


def test_float64_reference_of_a_real_network():
    """The whole population as one batch: a float64 copy in training mode sees the same statistics."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4)
    data = torch.randn(16, 3, 64, 64)
    exact = deepcopy(model).double().train()
    for layer in batchnorms_of(exact).values():
        layer.momentum = 1.0
    exact(data.double())
    found = estimated(model, [data])
    assert len(found) == 20
    for name, layer in batchnorms_of(exact).items():
        size = 16 * {64: 256, 128: 64, 256: 16, 512: 4}[layer.num_features]
        size *= 4 if name == "bn1" else 1
        assert_precise(found[name], (layer.running_mean, layer.running_var * (size - 1) / size))


def test_agrees_with_fvcore():
    fvcore = pytest.importorskip("fvcore.nn.precise_bn")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4)
    batches = [torch.randn(8, 3, 32, 32) + i for i in range(4)]
    theirs = deepcopy(model).train()
    fvcore.update_bn_stats(theirs, batches, num_iters=4)
    for name, (mean, variance) in estimated(model, batches).items():
        layer = batchnorms_of(theirs)[name]
        torch.testing.assert_close((mean.float(), variance.float()), (layer.running_mean, layer.running_var))


# ---------------------------------------------------------------------------------------------------------------------
# Layers of all kinds


class TwoInOne(nn.BatchNorm2d):
    """A subclass with its own forward."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image).relu_()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (32, 3)),
    "1d, sequences": (lambda: nn.BatchNorm1d(3), (32, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (32, 3, 4, 4)),
    "3d": (lambda: nn.BatchNorm3d(3), (32, 3, 2, 2, 2)),
    "Sync": (lambda: nn.SyncBatchNorm(3), (32, 3, 4, 4)),
    "timm": (lambda: timm.layers.BatchNormAct2d(3), (32, 3, 4, 4)),
    "subclass": (lambda: TwoInOne(3), (32, 3, 4, 4)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (32, 3, 4, 4)),
    "not affine": (lambda: nn.BatchNorm2d(3, affine=False), (32, 3, 4, 4)),
    "bf16": (lambda: nn.BatchNorm2d(3).bfloat16(), (32, 3, 4, 4)),
    "fp64": (lambda: nn.BatchNorm2d(3).double(), (32, 3, 4, 4)),
    "compiled": (lambda: torch.compile(nn.BatchNorm2d(3), backend="eager"), (32, 3, 4, 4)),
    "channels last": (lambda: nn.BatchNorm2d(3), (32, 3, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_all_kinds(kind):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = nn.Sequential(make())
    data = (torch.randn(shape) * 2 + 5).to(next(iter(layer.buffers())).dtype)
    if kind == "channels last":
        data = data.contiguous(memory_format=torch.channels_last)
    if kind == "compiled":
        layer(data)
    before, modes = deepcopy(layer.state_dict()), [part.training for part in layer.modules()]
    [found] = estimated(layer, data.split([10, 22])).values()
    assert_precise(found, population(data))
    assert not differences(dict(layer.state_dict()), dict(before))
    assert [part.training for part in layer.modules()] == modes
    assert not any(part._forward_hooks for part in layer.modules())


def test_synchronised_layers_count_the_batches_of_their_own_process(monkeypatch):
    """Their running statistics cover all processes, so each process would count them as its own."""
    monkeypatch.setattr("lit_tricks.callbacks.batchnorm.statistics.world_size", lambda: 2)

    class Synchronized(nn.SyncBatchNorm):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            image = super().forward(image)
            self.running_mean += 7
            return image

    data = halves(64)
    [found] = estimated(nn.Sequential(Synchronized(3)), data.split([5, 27, 32])).values()
    assert_precise(found, population(data))


def test_calls_of_a_layer_are_pooled():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = self.alias = nn.BatchNorm2d(3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.norm(image) + self.alias(image * 5 + 3)

    data, net = halves(16), Net()
    found = estimated(net, data.split(4))
    assert found.keys() == {"norm", "alias"}
    for statistics in found.values():
        assert_precise(statistics, population(torch.cat([data, data * 5 + 3])))


def test_layers_without_statistics_and_others_are_left_alone():
    net = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, track_running_stats=True), nn.GroupNorm(1, 3)
    )
    assert not batchnorms_of(net)


def test_all_else_is_in_evaluation_mode_and_frozen_layers_keep_theirs():
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval())
    data = halves(16)
    before = deepcopy(net[2].state_dict())
    layers = {name: layer for name, layer in batchnorms_of(net).items() if layer.training}
    found = estimate(net, layers, data.split(4), net)
    assert found.keys() == {"1"}
    assert_precise(found["1"], population(data))
    assert not differences(dict(net[2].state_dict()), dict(before))
    assert [part.training for part in net] == [True, True, False]


def test_the_forward_pass_ends_after_the_last_layer():
    class Head(nn.Module):
        calls = 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return image

    class Net(nn.Sequential):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(image)
            except Exception as error:  # models catch all sorts of things
                raise AssertionError from error

    net = Net(nn.BatchNorm2d(3), nn.BatchNorm2d(3), Head())
    estimated(net, halves(16).split(4))
    assert net[2].calls == 1
    estimated(net, halves(16).split(4), stop=False)
    assert net[2].calls == 5


def test_layers_that_are_not_called_are_left_out():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.auxiliary = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.auxiliary(self.norm(image)) if self.training else self.norm(image)

    assert estimated(Net(), [halves(16)]).keys() == {"norm"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_pass_leaves_everything_as_it_was(error):
    class Bad(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise error

    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), Bad())
    before = deepcopy(net.state_dict())
    with pytest.raises(error):
        estimated(net, [halves(16)])
    assert not differences(dict(net.state_dict()), dict(before))
    assert all(part.training for part in net.modules())
    assert net[0].momentum == 0.1
    assert not net[0]._forward_hooks


def test_no_batch_is_an_error():
    with pytest.raises(RuntimeError, match=r"gave no batch.*drop_last"):
        estimated(nn.Sequential(nn.BatchNorm2d(3)), [])


# ---------------------------------------------------------------------------------------------------------------------
# In a fit: training notices nothing


class History(pl.Callback):
    """All that a run has after each batch, and what each validation sees."""

    def __init__(self) -> None:
        self.trained: list[Any] = []
        self.validated: list[Weights] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        randomness = torch.get_rng_state(), str(random.getstate()), str(np.random.get_state())
        self.trained.append([weights_of(module), batch, *randomness, [part.training for part in module.modules()]])

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(weights_of(module))


class Stream(IterableDataset):
    """Samples one after the other; it knows where it is."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        for sample in images(16):
            self.given += 1
            yield sample[0] + self.given, sample[1]


class Noisy(Dataset):
    """Augments with all the generators that there are."""

    def __init__(self) -> None:
        self.numpy, self.torch, self.python = np.random.default_rng(0), torch.Generator(), random.Random(0)
        self.legacy = np.random.RandomState(0)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        image, label = images(16)[index]
        own = self.numpy.random() + float(torch.rand(1, generator=self.torch)) + self.python.random()
        return image + own + self.legacy.rand() + random.random() + np.random.rand() + torch.rand(1), label


class Batches:
    """Not a DataLoader. Each iteration starts from the first batch."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        for image, label in DataLoader(images(16), 4):
            self.given += 1
            yield [image + self.given, label]


def loaders(kind: str) -> Any:
    data, shuffled = images(16), {"batch_size": 4, "shuffle": True}
    if kind == "shuffled":
        return DataLoader(data, **shuffled)
    if kind == "own generator":
        return DataLoader(data, **shuffled, generator=torch.Generator().manual_seed(3))
    if kind == "workers":
        return DataLoader(data, **shuffled, num_workers=1)
    if kind == "persistent workers":
        return DataLoader(data, **shuffled, num_workers=1, persistent_workers=True)
    if kind == "weighted":
        return DataLoader(data, 4, sampler=torch.utils.data.WeightedRandomSampler(torch.arange(1.0, 17), 16))
    if kind == "stateful":
        return train_loader()
    if kind == "stream":
        return DataLoader(Stream(), batch_size=4)
    if kind == "stream, worker":
        return DataLoader(Stream(), batch_size=4, num_workers=1)
    if kind == "augmented":
        return DataLoader(Noisy(), **shuffled)
    if kind == "parts":
        return DataLoader(ConcatDataset([Subset(data, range(10)), Subset(data, range(4, 10))]), **shuffled)
    if kind == "batches":
        return Batches()
    raise KeyError(kind)


def fit(*callbacks: Any, loader: Any, **kwargs: Any) -> History:
    history = History()
    random.seed(0)
    np.random.seed(0)
    run(*callbacks, history, loader=loader, **kwargs)
    return history


KINDS = (
    "shuffled", "own generator", "workers", "persistent workers", "weighted", "stateful", "stream", "stream, worker",
    "augmented", "parts", "batches",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("kind", KINDS)
def test_training_notices_nothing(kind):
    how = {"max_epochs": 2, "val_check_interval": 2}
    tricked, plain = (fit(*callbacks, loader=loaders(kind), **how) for callbacks in ([PreciseBN(ALL)], []))
    assert len(tricked.trained) == len(plain.trained) == 2 * BATCHES
    assert not differences(tricked.trained, plain.trained)
    for seen, without in zip(tricked.validated, plain.validated, strict=True):
        assert {path.split(":")[0] for path in differences(seen, without)} == {
            "/net.0.1.running_mean",
            "/net.0.1.running_var",
        }


def first_layer(weights: Weights, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics of the network's only BatchNorm over the data, for these weights."""
    kernel, bias = weights["net.0.0.weight"].double(), weights["net.0.0.bias"].double()
    return population(torch.nn.functional.conv2d(data.double(), kernel, bias))


def of(weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    return weights["net.0.1.running_mean"].double(), weights["net.0.1.running_var"].double()


def test_validation_uses_population_statistics_of_current_weights():
    history, data = History(), images(16).tensors[0]
    result = run(PreciseBN(ALL), history, val_check_interval=2)
    assert len(history.validated) == 6
    for weights in [*history.validated, result.weights]:
        assert_precise(of(weights), first_layer(weights, data))


def test_every_hook_of_a_validation_sees_it():
    seen = []

    class Module(module_class("lightning")):
        def note(self, *args: Any) -> None:
            if not self.trainer.sanity_checking:
                seen.append(weights_of(self))

        on_validation_start = on_validation_batch_end = on_validation_epoch_end = on_validation_end = note

    class Other(pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            module.note()

    torch.manual_seed(0)
    make_trainer(Other(), PreciseBN(ALL), max_epochs=1).fit(Module(), train_loader(), eval_loader())
    assert len(seen) == 6
    for weights in seen:
        assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))


def test_the_sanity_check_sees_the_initial_statistics():
    class Module(module_class("lightning")):
        def on_validation_end(self) -> None:
            if self.trainer.sanity_checking:
                self.sanity = weights_of(self)

    module = Module()
    make_trainer(PreciseBN(ALL), num_sanity_val_steps=1, max_epochs=1).fit(module, train_loader(), eval_loader())
    assert not differences(module.sanity, weights_of(Module()))


@pytest.mark.parametrize(("when", "precise"), [("validation", [0, 1, 2]), ("end", []), (2, [1])])
def test_when_sets_the_validations_with_exact_statistics(when, precise):
    history, data = History(), images(16).tensors[0]
    result = run(PreciseBN(ALL, when=when), history)
    for epoch, weights in enumerate(history.validated):
        close = torch.allclose(of(weights)[0], first_layer(weights, data)[0], rtol=1e-4, atol=1e-5)
        assert close == (epoch in precise)
    assert_precise(of(result.weights), first_layer(result.weights, data))
    keys = [step for step, metrics in result.logged.items() if "precise_bn/shift" in metrics]
    assert keys == ([STEPS] if when == "end" else [4 * epoch + 3 for epoch in precise])


def test_restore_false_lets_training_go_on_from_the_estimate():
    history = History()
    run(PreciseBN(ALL, restore=False), history)
    for epoch in (0, 1):
        after = history.trained[4 * epoch + 4][0]["net.0.1.running_mean"]
        batch = image_and_label(history.trained[4 * epoch + 4][1])[0]
        seen = history.validated[epoch]
        moved = 0.9 * seen["net.0.1.running_mean"] + 0.1 * first_layer(history.validated[epoch], batch)[0].float()
        torch.testing.assert_close(after, moved, rtol=1e-4, atol=1e-5)


def test_number_of_samples_and_one_pass_if_there_are_fewer():
    class Counting(module_class("lightning")):
        count = 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.count += 0 if torch.is_grad_enabled() else len(image)
            return super().forward(image)

    for samples, counted in ((1, 4), (4, 4), (5, 8), (16, 16), (17, 16)):
        module = Counting()
        with log_lines() as records:
            make_trainer(PreciseBN(samples), max_epochs=2, limit_val_batches=1, num_sanity_val_steps=0).fit(
                module, train_loader(), eval_loader()
            )
        assert module.count == 2 * (counted + 4)  # and the images of two validations
        lines = [record.getMessage() for record in records][1:]
        more = "PreciseBN: num_samples=17 is more than there are; all 16 are used, in one pass"
        assert lines == ([more] if samples == 17 else [])


def test_a_model_without_batchnorm_is_warned_of_once():
    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net[0][1] = nn.GroupNorm(1, 4)

    trainer = make_trainer(PreciseBN())
    with pytest.warns(UserWarning, match="PreciseBN has no effect: Module") as caught:
        trainer.fit(Module(), train_loader(), eval_loader())
    assert len([warning for warning in caught if "PreciseBN" in str(warning.message)]) == 1


def test_frozen_layers_are_left_alone_and_warned_of_if_there_are_no_others():
    class Freeze(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            module.net[0][1].eval()

    with pytest.warns(UserWarning, match=r"PreciseBN has no effect: .*frozen"):
        weights = run(Freeze(), PreciseBN(ALL)).weights
    assert not differences(weights, run(Freeze()).weights)


# ---------------------------------------------------------------------------------------------------------------------
# The batches of the pass


def test_mixing_is_off_and_hooks_of_the_module_are_on():
    class Module(module_class("lightning")):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            training = self.trainer.training and isinstance(batch, list)
            return [batch[0] + 7, batch[1]] if training else batch  # as one augments on the device

    history = History()
    torch.manual_seed(0)
    trainer = make_trainer(PreciseBN(ALL), MixUp(alpha=1.0), history, max_epochs=1)
    trainer.fit(Module(), train_loader(), eval_loader())
    [weights] = history.validated
    assert_precise(of(weights), first_layer(weights, images(16).tensors[0] + 7))


class Transformed(Dataset):
    """With a ``transform``, as data sets of images have."""

    def __init__(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        image, label = images(16)[index]
        return self.transform(image), label


def plus(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda image: image + number


@pytest.mark.parametrize("nest", ["plain", "Subset", "ConcatDataset"])
@pytest.mark.parametrize(("transform", "added"), [("train", 3.0), ("eval", -2.0)])
def test_transform_eval_replaces_nested_transforms(transform, added, nest):
    data = Transformed(plus(3.0))
    if nest == "Subset":
        data = Subset(data, range(16))
    if nest == "ConcatDataset":
        data = ConcatDataset([Subset(data, range(8)), Subset(data, range(8, 16))])
    history = History()
    torch.manual_seed(0)
    trainer = make_trainer(PreciseBN(ALL, transform=transform), history, max_epochs=1)
    trainer.fit(module_class("lightning")(), DataLoader(data, 4), DataLoader(Transformed(plus(-2.0)), 4))
    for weights in history.validated[-1:]:
        assert_precise(of(weights), first_layer(weights, images(16).tensors[0] + added))
    assert image_and_label(history.trained[0][1])[0][0].equal(images(16).tensors[0][0] + 3)


def test_batches_of_several_loaders_are_used():
    class Module(module_class("lightning")):
        def loss(self, batch: Any) -> Any:
            return super().loss(batch["one"] if isinstance(batch, dict) else batch)

        def forward(self, image: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(image if other is None else other)

    two = {"one": DataLoader(images(16), 4), "two": DataLoader(TensorDataset(images(16).tensors[0] + 5), 4)}
    history = History()
    make_trainer(PreciseBN(ALL), history, max_epochs=1).fit(Module(), two, eval_loader())
    [weights] = history.validated
    assert_precise(of(weights), first_layer(weights, images(16).tensors[0] + 5))


@pytest.mark.parametrize("last", [True, False])
def test_channels_last_as_the_model_has_it(last):
    seen = set()

    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Conv2d(2, 2, 3)
            self.example_input_array = None
            if last:
                self.extra.to(memory_format=torch.channels_last)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled() and self.trainer.training:
                seen.add(image.is_contiguous(memory_format=torch.channels_last))
            return super().forward(image[:, :1])

    image, label = images(16).tensors
    loader = DataLoader(TensorDataset(image.expand(-1, 2, -1, -1).contiguous(), label), 4)
    make_trainer(PreciseBN(ALL), max_epochs=1).fit(Module(), loader, eval_loader())
    assert seen == {last}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_of_the_run_keeps_statistics_exact(precision):
    history = History()
    run(PreciseBN(ALL), history, precision=precision, max_epochs=1)
    [weights] = history.validated
    exact = first_layer(weights, images(16).tensors[0])
    torch.testing.assert_close(of(weights), exact, rtol=2e-2 if "16" in precision else 1e-7, atol=1e-2)


def test_a_loader_that_was_resumed_has_the_rest_of_its_epoch_to_give_first():
    class Resumed(DataLoader):
        pending = True

        def __iter__(self) -> Iterator[Any]:
            pending, self.pending = self.pending, False
            return iter([]) if pending else super().__iter__()

    class Forget(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            loader.pending = True

    loader, history = Resumed(images(16), 4), History()
    loader.pending = False
    make_trainer(Forget(), PreciseBN(ALL), history, max_epochs=1).fit(
        module_class("lightning")(), loader, eval_loader()
    )
    [weights] = history.validated
    assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))


# ---------------------------------------------------------------------------------------------------------------------
# With averages, in checkpoints, and after the fit


def average_history(*callbacks: Any, **kwargs: Any) -> tuple[Any, History]:
    history = History()
    return run(*callbacks, history, **kwargs), history


@pytest.mark.parametrize("order", ["EMA first", "EMA last"])
def test_statistics_are_those_of_the_average(order):
    callbacks = [EMA(0.8), PreciseBN(ALL)]
    result, history = average_history(*(callbacks if order == "EMA first" else callbacks[::-1]), val_check_interval=2)
    average, _ = average_history(EMA(0.8), val_check_interval=2)
    _, plain = average_history(val_check_interval=2)
    assert not differences(history.trained, plain.trained)
    for weights in [*history.validated, result.weights]:
        assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))
    names = {path.split(":")[0] for path in differences(result.weights, average.weights)}
    assert names == {"/net.0.1.running_mean", "/net.0.1.running_var"}


def loaded(path: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


MIXES: dict[str, Callable[[], list[Any]]] = {
    "alone": lambda: [PreciseBN(ALL)],
    "before EMA": lambda: [PreciseBN(ALL), EMA(0.8)],
    "after EMA": lambda: [EMA(0.8), PreciseBN(ALL)],
    "late EMA": lambda: [PreciseBN(ALL), EMA(0.8, start_step=6)],
    "EMA copies": lambda: [PreciseBN(ALL), EMA(0.8, buffers="copy")],
    "EMA aside": lambda: [EMA(0.8, validate=False), PreciseBN(ALL)],
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_saved_weights_are_the_validated_ones(mix, weights_only, tmp_path):
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}", save_weights_only=weights_only
    )
    run(*MIXES[mix](), saver, enable_checkpointing=True, val_check_interval=2)
    assert len(saver.best_k_models) == 6
    for path, score in saver.best_k_models.items():
        weights = loaded(path)["state_dict"]
        assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))
        [metrics] = make_trainer().validate(
            module_class("lightning")(), eval_loader(), ckpt_path=path, verbose=False, weights_only=True
        )
        assert metrics["val_loss"] == score


@pytest.mark.parametrize("mix", MIXES)
def test_resumes_bitwise_from_every_checkpoint_in_any_order(mix, tmp_path):
    saver = Saver(tmp_path)
    full = run(*MIXES[mix](), saver)
    precise = [path.name for path in saver.paths if "PreciseBN" in loaded(path)["callbacks"]]
    assert precise == [f"{step}-{moment}.ckpt" for step in (4, 8, 12) for moment in ("validation", "epoch")]
    for path in saver.paths[:: 1 if mix in ("alone", "before EMA") else 2]:
        resumed = run(*MIXES[mix](), ckpt_path=path)
        assert not differences(resumed.weights, full.weights), path.name
        assert not differences(resumed.optimizers, full.optimizers), path.name
        tricks = [sorted(map(str, result.tricks)) for result in (resumed, full)]
        assert not differences(*tricks), path.name


@pytest.mark.parametrize("mix", MIXES)
def test_after_the_fit(mix, tmp_path):
    """The model and what is saved of it have the estimate; what continues trains as if it had never been."""
    how = {"optimizers": lambda module: torch.optim.SGD(module.parameters(), lr=0.1)}  # Lightning drops momentum
    plain = [type(callback)(0.8) for callback in MIXES[mix]() if mix == "before EMA" and isinstance(callback, EMA)]
    first = run(*MIXES[mix](), max_epochs=2, **how)
    assert_precise(of(first.weights), first_layer(first.weights, images(16).tensors[0]))
    first.trainer.test(first.module, eval_loader(), verbose=False)
    for weights_only in (True, False):
        first.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
        assert not differences(dict(loaded(tmp_path / "x.ckpt")["state_dict"]), first.weights)
    resumed, full = (run(*MIXES[mix](), ckpt_path=path, **how) for path in (tmp_path / "x.ckpt", None))
    assert not differences(resumed.weights, full.weights)
    history = History()
    first.trainer.callbacks.append(history)
    first.trainer.fit_loop.max_epochs = 3
    first.trainer.fit(first.module, train_loader(), eval_loader())
    assert not differences(weights_of(first.module), full.weights)
    if plain:
        reference = History()
        run(*plain, reference, **how)
        trained = [weights for weights, *_ in reference.trained[-len(history.trained) :]]
        assert not differences([weights for weights, *_ in history.trained], trained)


def test_resume_of_a_run_that_was_over_hands_back_the_estimate(tmp_path):
    for mix in ("alone", "before EMA", "after EMA"):
        full = run(*MIXES[mix]())
        full.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
        again = run(*MIXES[mix](), ckpt_path=tmp_path / "x.ckpt")
        assert not differences(again.weights, full.weights)


def test_weights_that_were_loaded_after_the_fit_are_kept(tmp_path):
    first, other = run(PreciseBN(ALL), max_epochs=1), module_class("lightning")()
    first.module.load_state_dict(other.state_dict())
    first.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert not differences(dict(loaded(tmp_path / "x.ckpt")["state_dict"]), weights_of(other))
    assert "PreciseBN" not in loaded(tmp_path / "x.ckpt")["callbacks"]
    first.trainer.callbacks.append(history := History())
    first.trainer.fit_loop.max_epochs = 2
    first.trainer.fit(first.module, train_loader(), eval_loader())
    assert history.trained[0][0]["net.0.1.num_batches_tracked"] == 1


def test_module_that_writes_its_own_keys_sees_the_estimate_in_the_checkpoint(tmp_path):
    class Module(module_class("lightning")):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}

    saver = Saver(tmp_path, steps=(4,))
    make_trainer(EMA(0.8), PreciseBN(ALL), saver, max_epochs=1).fit(Module(), train_loader(), eval_loader())
    assert len(saver.paths) == 3
    for path in saver.paths:
        assert not differences(loaded(path)["mine"], dict(loaded(path)["state_dict"]))


def test_a_copy_of_the_module_made_in_the_fit_works_alone():
    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            module._trainer, trainer = None, module._trainer  # as everybody does who copies a module
            self.copy = deepcopy(module)
            module._trainer = trainer

    copy = Copy()
    run(PreciseBN(ALL), copy)
    before = weights_of(copy.copy)
    make_trainer().validate(copy.copy, eval_loader(), verbose=False)
    make_trainer(max_epochs=0).fit(copy.copy, train_loader(), eval_loader())
    assert not differences(weights_of(copy.copy), before)


@pytest.mark.parametrize("finder", ["lr", "batch size", "lr, within the fit"])
def test_finders_do_not_disturb_it(finder, tmp_path):
    class Find(pl.callbacks.LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, module)

    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=m.lr))
            self.lr, self.batch_size = 0.1, 4

        def train_dataloader(self) -> Any:
            return train_loader()

        def val_dataloader(self) -> Any:
            return eval_loader()

    def fit(*callbacks: Any) -> Any:
        module, history = Module(), History()
        if finder == "batch size":
            find = pl.callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=1)
        else:
            cls = pl.callbacks.LearningRateFinder if finder == "lr" else Find
            find = cls(num_training_steps=5, update_attr=False)
        torch.manual_seed(0)
        make_trainer(*callbacks, find, history, default_root_dir=tmp_path).fit(module)
        return history.trained, weights_of(module)

    plain, _ = fit()
    for callbacks in ([PreciseBN(ALL)], [PreciseBN(ALL), EMA(0.8)]):
        trained, weights = fit(*callbacks)
        assert not differences(trained, plain)
        assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))


def test_statistics_are_restored_after_a_validation():
    class Module(module_class("lightning")):
        def on_validation_epoch_end(self) -> None:
            if self.trainer.sanity_checking:
                return
            self.train()
            self(torch.full((4, 1, 8, 8), math.nan))
            self.eval()

    def fit(*callbacks: Any) -> list[Any]:
        module, history = Module(), History()
        torch.manual_seed(0)
        make_trainer(*callbacks, history, max_epochs=2).fit(module, train_loader(), eval_loader())
        return [weights for weights, *_ in history.trained]

    [*_, last] = fit(PreciseBN(ALL))
    plain = weights_of(run(max_epochs=2).module)
    assert {path.split(":")[0] for path in differences(last, plain)} == {"/net.0.1.num_batches_tracked"}


STOPS = ("on_train_batch_start", "on_validation_batch_end", "on_validation_end", "on_train_end")


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("hook", STOPS)
@pytest.mark.parametrize("mix", ["alone", "before EMA", "after EMA"])
def test_an_error_leaves_the_statistics_of_training_and_nothing_patched(mix, hook, kind, restored_interrupts):
    def stopped(*callbacks: Any) -> Any:
        module, trainer = module_class("lightning")(), make_trainer(*callbacks, Interrupt(hook, kind()))
        torch.manual_seed(0)
        with pytest.raises((ZeroDivisionError, SystemExit)):
            trainer.fit(module, train_loader(), eval_loader())
        for owner in (module, trainer.strategy):
            assert not any(type(value).__name__ == "Wrapped" for value in vars(owner).values())
        assert not any(optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
        return weights_of(module)

    assert not differences(stopped(*MIXES[mix]()), stopped())


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_pass(kind, restored_interrupts):
    class Module(module_class("lightning")):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            image = super().forward(image)
            if self.trainer.global_step == 8 and not torch.is_grad_enabled():
                torch.rand(1)
                raise kind
            return image

        def on_validation_model_eval(self) -> None:
            super().on_validation_model_eval()
            self.before = weights_of(self), torch.get_rng_state()

    module = Module()
    error = "`forward` of Module on the inputs .* failed" if kind is ZeroDivisionError else None
    with pytest.raises((RuntimeError, SystemExit), match=error):
        make_trainer(PreciseBN(ALL)).fit(module, train_loader(), eval_loader())
    assert module.trainer.global_step == 8
    assert not differences((weights_of(module), torch.get_rng_state()), module.before)
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model")
@pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint')
@pytest.mark.parametrize("place", ["before", "after"])
def test_checkpoint_on_exception_is_right_and_resumes_bitwise(place, tmp_path):
    def callbacks() -> list[Any]:
        save = pl.callbacks.OnExceptionCheckpoint(tmp_path)
        stop = Interrupt("on_validation_end", ZeroDivisionError())
        return [save, EMA(0.8), PreciseBN(ALL), stop] if place == "before" else [PreciseBN(ALL), EMA(0.8), stop, save]

    with pytest.raises(ZeroDivisionError):
        run(*callbacks(), enable_checkpointing=True)
    path = tmp_path / "on_exception.ckpt"
    weights = loaded(path)["state_dict"]
    assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))
    assert not differences(run(*MIXES["before EMA"](), ckpt_path=path).weights, run(*MIXES["before EMA"]()).weights)


# ---------------------------------------------------------------------------------------------------------------------
# What is rejected, with a remedy


class Opened:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle 'socket' object")


def rejection(loader: Any = None, module: Any = None, trick: Any = None, *others: Any, **kwargs: Any) -> str:
    trainer = make_trainer(trick or PreciseBN(), *others, max_epochs=1, num_sanity_val_steps=0, **kwargs)
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(module or module_class("lightning")(), train_loader() if loader is None else loader, eval_loader())
    assert trainer.global_step == 0 or "forward" in str(caught.value)
    return str(caught.value)


def test_rejects_what_it_can_not_rebuild():
    loader = DataLoader(Stream(), batch_size=4)
    loader.dataset.connection = Opened()
    assert "a copy of the DataLoader, and that cannot be copied (TypeError: cannot pickle" in rejection(loader)
    assert "can be read once only: give the Trainer a DataLoader" in rejection(iter(train_loader()))
    shared = DataLoader(images(16), 4)
    shared.dataset.connection = Opened()  # it is not copied
    make_trainer(PreciseBN(), max_epochs=1).fit(module_class("lightning")(), shared, eval_loader())
    del shared.dataset.connection


def test_rejects_a_transform_that_it_can_not_find():
    trick = PreciseBN(transform="eval")
    assert "the validation data set has no such attribute" in rejection(trick=trick)
    assert "a run without validation has no such attribute" in rejection(trick=trick, limit_val_batches=0)
    trainer = make_trainer(trick, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="TensorDataset has no"):
        trainer.fit(module_class("lightning")(), train_loader(), DataLoader(Transformed(plus(0.0)), 4))


def test_rejects_modules_that_it_can_not_run():
    class NoForward(module_class("lightning")):
        forward = pl.LightningModule.forward
        loss = lambda self, batch: self.net(batch[0]).square().mean()  # noqa: E731

        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = None

    class Other(module_class("lightning")):
        def forward(self, image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            if not torch.is_grad_enabled() and self.trainer.global_step:
                raise TypeError("forward() missing 1 required positional argument: 'mask'")
            return super().forward(image)

    assert "PreciseBN runs `forward` of NoForward, which has none" in rejection(module=NoForward())
    assert "here float32 (4, 1, 8, 8), and it failed (TypeError: forward() missing 1" in rejection(module=Other())


@pytest.mark.parametrize("how", ["as they are", "others", "memory format", "not forward"])
def test_warns_if_training_gives_forward_other_inputs(how, recwarn):
    class Module(module_class("lightning")):
        def loss(self, batch: Any) -> Any:
            image, label = batch
            if how == "others":
                image = image / 255
            if how == "memory format":
                image = image.contiguous(memory_format=torch.channels_last).double().float()
            return nn.functional.cross_entropy(self.net(image) if how == "not forward" else self(image), label)

    module = Module()
    make_trainer(PreciseBN(ALL), max_epochs=1).fit(module, train_loader(), eval_loader())
    messages = [
        str(warning.message) for warning in recwarn if "PreciseBN runs `forward` of Module" in str(warning.message)
    ]
    assert len(messages) == (how == "others")
    assert not module._forward_pre_hooks


def test_our_own_data_with_both_transforms():
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.append(nn.Linear(3, 10))

    def fit(*callbacks: Any) -> Any:
        torch.manual_seed(0)
        model, data = Classifier(Net(), 10, input_size=(1, 8, 8)), Digits(batch_size=128)
        make_trainer(*callbacks, max_epochs=1, val_check_interval=3, limit_train_batches=6).fit(model, data)
        return model, data

    plain, data = fit()
    source = data.train_dataloader().dataset.source
    for transform in ("train", "eval"):
        model, _ = fit(PreciseBN(128 * 6, transform=transform))
        for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(param, other), name
        every = torch.stack([data.eval_transform(image) for image, _ in (source[i] for i in range(len(source)))])
        mean, variance = population(
            nn.functional.conv2d(every.double(), *(p.double() for p in model.model[0].parameters()))
        )
        error = ((model.model[1].running_mean - mean).abs() / variance.sqrt()).max()
        assert error < 0.1 if transform == "eval" else error > 0.01  # of a sample of 768


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_rejects_lightnings_averages(name):
    other = getattr(pl.callbacks, name)(**({"swa_lrs": 0.1} if name.startswith("Sto") else {}))
    assert "average with EMA or SWA" in rejection(None, None, None, other)


@pytest.mark.parametrize("strategy", ["FSDP1", "DeepSpeed"])
def test_strategies_that_hide_the_layers_are_rejected(strategy):
    module = module_class("lightning")()
    if strategy == "FSDP1":
        module.other = wrapped_by_fsdp1(nn.Linear(1, 1))
    else:
        module.net[1].weight.ds_id = 0
    assert "PreciseBN cannot run the layers under SingleDeviceStrategy: use FSDP2" in rejection(module=module)


def test_batches_without_inputs_are_rejected():
    from lit_tricks.utils.batch import inputs_of

    images_, labels = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    assert [tuple(t.shape) for t in inputs_of([images_, images_, labels, labels], "PreciseBN")] == 2 * [(4, 3, 8, 8)]
    assert [tuple(t.shape) for t in inputs_of(images_, "PreciseBN")] == [(4, 3, 8, 8)]
    assert [tuple(t.shape) for t in inputs_of({"x": torch.zeros(4, 5)}, "PreciseBN")] == [(4, 5)]
    with pytest.raises(RuntimeError, match=r"PreciseBN found no inputs.*int64 \(4,\)"):
        inputs_of([labels], "PreciseBN")


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

PLANS = ["DDP", "DDP, unequal", "FSDP2, whole", "FSDP2, in shards"]


@pytest.mark.parametrize("plan", PLANS)
def test_two_processes_estimate_from_the_data_of_both_and_train_as_without(plan, bn_ranks):
    for rank in bn_ranks:
        full, first = rank[plan]["full"], bn_ranks[0][plan]["full"]
        assert not differences(full["trained"], rank[plan]["plain"]["trained"])
        assert len(full["validated"]) == 3
        for weights in [*full["validated"], full["weights"]]:
            assert_precise(of(weights), first_layer(weights, images(16).tensors[0]))
        statistics = [of(x["weights"]) for x in (full, first)]
        assert not differences(*statistics)


@pytest.mark.parametrize("plan", PLANS)
def test_two_processes_resume_bitwise(plan, bn_ranks):
    for rank in bn_ranks:
        assert len(rank[plan]["resumed"]) == 3
        for path, weights in rank[plan]["resumed"].items():
            assert not differences(weights, rank[plan]["full"]["weights"]), path


def test_two_processes_with_unequal_numbers_of_batches(bn_ranks):
    for rank in bn_ranks:
        assert_precise(rank["unequal numbers of batches"]["0"], population(images(16).tensors[0]))
