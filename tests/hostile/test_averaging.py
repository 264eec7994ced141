"""Averages of modules whose state is more than weights: buffers of all kinds, norms, adapters, and edits by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.averages import Interrupt, loaded
from helpers.fits import Saver, differences, log_lines, make_trainer, weights_of
from helpers.modules import CLASSES, lightning, train_loader
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.nn.utils import weight_norm as weight_norm_hook
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks.callbacks import EMA, SWA, FixRes, PreciseBN
from lit_tricks.commands import average
from lit_tricks.commands.checkpoint_average import mean_of
from lit_tricks.utils.modules import is_statistic
from lit_tricks.utils.spectral_norm import singular_vectors, spectral_norms

pl = lightning()
pytestmark = pytest.mark.filterwarnings("ignore:SWA averages the statistics of the BatchNorm layers")
SPECTRAL = {"hook": spectral_norm_hook, "parametrization": parametrizations.spectral_norm}
each_norm = pytest.mark.parametrize("norm", SPECTRAL)


class Module(pl.LightningModule):
    """Train a network with cross entropy, and keep what a validation sees."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.seen: list[Any] = []  # logits of the first batch of each validation

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())
        if batch_idx == 0:
            self.seen.append(logits.detach().clone())

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, self.lr, momentum=0.9)


def checkpoints(folder: Any) -> dict[str, Any]:
    """Arguments of a Trainer that may have a callback for checkpoints."""
    return {"enable_checkpointing": True, "default_root_dir": folder}


def assert_same(actual: Any, expected: Any) -> None:
    """Bit by bit, where NaN is NaN."""
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def fit(module: Any, *callbacks: Any, loaders: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Any:
    trainer = make_trainer(*callbacks, **kwargs)
    torch.manual_seed(0)
    train, val = loaders or (train_loader(), train_loader())
    trainer.fit(module, train, val, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# Spectral norm


def spectral_network(norm: str) -> nn.Module:
    wrap = SPECTRAL[norm]
    torch.manual_seed(0)
    body = [wrap(nn.Conv2d(3, 16, 3, padding=1)), nn.ReLU(), wrap(nn.Conv2d(16, 16, 3, padding=1)), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(16, 4)))


@pytest.fixture(scope="module")
def four_classes() -> Any:
    """The classes are told apart by the means of channels."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(64) % 4
    image = torch.randn(64, 3, 6, 6, generator=generator) / 2 + F.one_hot(label, 4)[:, :3, None, None]
    data = TensorDataset(image, label)
    return DataLoader(data, 16, shuffle=True, generator=generator), DataLoader(data, 16)


def norms_of(network: nn.Module) -> list[float]:
    """Spectral norms of the weights that layers use in evaluation."""
    network.eval()
    network(torch.zeros(2, 3, 6, 6))  # hooks set the weight
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]


@pytest.fixture(scope="module", params=SPECTRAL)
def spectral_runs(request: Any, four_classes: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """A run without a trick, and its checkpoints."""
    folder = tmp_path_factory.mktemp("spectral")
    module = Module(spectral_network(request.param))
    trainer = fit(module, Saver(folder, steps=(28, 36, 44, 48)), loaders=four_classes, max_epochs=12)
    assert trainer.callback_metrics["accuracy"] == 1
    paths = [str(path) for path in sorted(folder.glob("*-batch.ckpt"))]
    return {"norm": request.param, "paths": paths}


AVERAGES: dict[str, Callable[[], Any]] = {
    "EMA": lambda: EMA(0.95),
    "EMA that copies": lambda: EMA(0.95, buffers="copy"),
    "EMA of all": lambda: EMA(0.95, buffers="average"),
    "EMA on the CPU": lambda: EMA(0.95, device="cpu"),
    "EMA beside the raw weights": lambda: EMA(0.95, validate="both"),
    "SWA": lambda: SWA(0.1, start=0.2),
}


@each_norm
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_spectral_norm_of_an_average_is_one(norm, make, four_classes, tmp_path):
    module = Module(spectral_network(norm))
    trainer = fit(module, make(), loaders=four_classes, max_epochs=12)
    assert trainer.callback_metrics["accuracy"] == 1
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert norms_of(module) == pytest.approx([1, 1, 1], abs=1e-3)
    other = Module(spectral_network(norm))
    other.load_state_dict(loaded(tmp_path / "after.ckpt")["state_dict"])
    assert norms_of(other) == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("known", [True, False], ids=["with the module", "by names"])
def test_spectral_norm_of_averaged_checkpoints_is_one(known, spectral_runs, four_classes, tmp_path):
    module = Module(spectral_network(spectral_runs["norm"]))
    average(spectral_runs["paths"], str(tmp_path / "soup.ckpt"), module=module if known else None)
    module = Module(spectral_network(spectral_runs["norm"]))
    module.load_state_dict(loaded(tmp_path / "soup.ckpt")["state_dict"])
    assert norms_of(module.net) == pytest.approx([1, 1, 1], abs=1e-3)
    [metrics] = make_trainer().validate(module, four_classes[1], verbose=False)
    assert metrics["accuracy"] == 1


@each_norm
def test_vectors_are_a_fixed_point_of_the_power_iteration(norm, four_classes):
    module = Module(spectral_network(norm))
    fit(module, EMA(0.9), loaders=four_classes, max_epochs=1)
    for found in spectral_norms(module):
        u, v = (getattr(*vector) for vector in (found.u, found.v))
        matrix = found.matrix()
        torch.testing.assert_close(F.normalize(matrix @ v, dim=0), u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(F.normalize(matrix.T @ u, dim=0), v, rtol=1e-4, atol=1e-5)


@each_norm
@pytest.mark.parametrize("make", [AVERAGES["EMA"], AVERAGES["SWA"]], ids=["EMA", "SWA"])
def test_spectral_norm_resumes_bitwise_and_leaves_training_alone(norm, make, tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(SPECTRAL[norm](nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))

    trained: dict[str, list[Any]] = {"with": [], "without": []}

    class Keep(pl.Callback):
        def __init__(self, where: list[Any]) -> None:
            self.where = where

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.where.append(weights_of(module))

    saver = Saver(tmp_path, steps=(3, 8))
    full = fit(Module(net()), make(), saver, Keep(trained["with"]), max_epochs=3).lightning_module
    fit(Module(net()), Keep(trained["without"]), max_epochs=3)
    assert not differences(trained["with"], trained["without"])
    for path in saver.paths:
        resumed = Module(net())
        fit(resumed, make(), ckpt_path=path, max_epochs=3)
        assert_same(weights_of(resumed), weights_of(full))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a convolution": (lambda: nn.Conv2d(4, 6, 3), torch.zeros(2, 4, 5, 5)),
    "a square transposed convolution": (lambda: nn.ConvTranspose2d(6, 6, 3), torch.zeros(2, 6, 5, 5)),
    "a wide layer": (lambda: nn.Linear(30, 5), torch.zeros(2, 30)),
    "a tall layer": (lambda: nn.Linear(5, 30), torch.zeros(2, 5)),
    "an embedding": (lambda: nn.Embedding(40, 8), torch.zeros(2, dtype=torch.int64)),
}


@each_norm
@pytest.mark.parametrize(("layer", "example"), LAYERS.values(), ids=LAYERS)
def test_average_finds_the_dimension_of_a_norm_by_its_vectors(norm, layer, example):
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers.append(SPECTRAL[norm](layer(), n_power_iterations=30).train())
        layers[-1](example)
    mean = mean_of([each.state_dict() for each in layers])
    layers[0].load_state_dict(mean)
    [found] = spectral_norms(layers[0])
    exact = torch.linalg.matrix_norm(found.matrix(), 2)
    u, v = (getattr(*vector) for vector in (found.u, found.v))
    torch.testing.assert_close(u @ found.matrix() @ v, exact)


def test_spectral_norm_of_a_weight_that_is_normalized_before():
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(6, 4)))
    module = Module(nn.Sequential(nn.Flatten(), nn.Linear(64, 6), layer, nn.Linear(4, CLASSES)))
    fit(module, EMA(0.9), max_epochs=2)
    module.eval()
    assert float(torch.linalg.matrix_norm(module.net[2].weight.detach(), 2)) == pytest.approx(1, abs=1e-3)


def test_singular_vectors_of_what_is_not_finite_or_degenerate():
    assert singular_vectors(torch.full((3, 4), math.nan)) is None
    for matrix in (torch.zeros(3, 4), torch.eye(5), torch.ones(1, 1), -torch.eye(2), torch.randn(3, 2).bfloat16()):
        u, v = singular_vectors(matrix)
        exact = torch.linalg.matrix_norm(matrix.double(), 2)
        torch.testing.assert_close((u @ matrix.double() @ v).abs(), exact, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Buffers


class CustomNorm(nn.Module):
    """Known by its two statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))
        self.register_buffer("limit", torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.mean().detach(), 0.1)
            self.running_var.lerp_(x.var().detach(), 0.1)
            self.limit.add_(1)
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


class StdNorm(CustomNorm):
    """Known by its name."""

    def __init__(self) -> None:
        super().__init__()
        del self.running_var
        self.register_buffer("running_std", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_std.lerp_(x.std().detach(), 0.1)
        return x / self.running_std


class State(nn.Module):
    """Buffers that are no statistics; each changes with the steps, if it is not a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([2.0, 0.0, 1.0]))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]))
        self.register_buffer("constant", torch.tensor([0.1, 0.3], dtype=torch.float64))
        self.register_buffer("running_steps", torch.zeros(()))
        self.register_buffer("nothing", torch.tensor([math.nan]))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.index = self.index.roll(1)  # another tensor in its place
            self.mask.copy_(self.mask.roll(1))
            self.running_steps += 1
        return x


def buffered(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers, State(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def timm_norm() -> nn.Module:
    return pytest.importorskip("timm").layers.BatchNormAct2d(4)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "a subclass": lambda: type("Renormalized", (nn.BatchNorm2d,), {})(4),
    "timm's": timm_norm,
    "two statistics": CustomNorm,
    "called a norm": StdNorm,
}
STATISTICS = {"running_mean", "running_var", "running_std"}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("trick", ["EMA", "SWA", "average"])
def test_statistics_of_norm_layers_are_averaged_and_other_buffers_are_not(norm, trick, tmp_path):
    history: list[dict[str, Tensor]] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            history.append({name: value.double() for name, value in weights_of(module).items()})

    module = Module(buffered(norm()))
    tricks = {"EMA": [EMA(0.5, warmup=False)], "SWA": [SWA(0.1, start=0, every_n_steps=1)], "average": []}[trick]
    saver = Saver(tmp_path, steps=(1, 2, 3, 4))
    fit(module, *tricks, Keep(), saver, max_epochs=1, limit_val_batches=0)
    found = {k: v.double() for k, v in weights_of(module).items()}
    expected = dict(history[0])
    for i, weights in enumerate(history[1:], start=2):
        share = 0.5 if trick == "EMA" else 1 / i
        expected = {name: torch.lerp(old, weights[name], share) for name, old in expected.items()}
    copied = history[-1]
    if trick == "average":
        average([str(path) for path in saver.paths if "batch" in path.name], str(tmp_path / "a.ckpt"), module=module)
        found = {k: v.double() for k, v in loaded(tmp_path / "a.ckpt")["state_dict"].items()}
        copied = history[0]
    statistics = {name for name in found if name.rpartition(".")[2] in STATISTICS}
    assert statistics
    for name, value in found.items():
        is_averaged = name in statistics or name.endswith(("weight", "bias"))
        right = expected[name] if is_averaged else copied[name]
        torch.testing.assert_close(
            value, right, rtol=1e-5, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def with_buffers(*names: str) -> nn.Module:
    module = nn.Module()
    for name in names:
        module.register_buffer(name, torch.zeros(1))
    return module


def test_names_of_statistics():
    for owner, name, expected in (
        (nn.BatchNorm2d(1), "running_var", True),
        (nn.BatchNorm2d(1), "num_batches_tracked", False),
        (nn.LazyBatchNorm2d(), "running_mean", True),
        (CustomNorm(), "limit", False),
        (State(), "running_steps", False),
        (nn.Linear(1, 1), "running_mean", False),  # alone, it may be anything
        (type("EvoNorm2dB0", (nn.Module,), {})(), "running_var", True),
        (type("EvoNorm2dB0", (nn.Module,), {})(), "eps", False),
        (with_buffers("moving_mean", "moving_variance"), "moving_variance", True),
        (with_buffers("running_mean", "running_covar"), "running_covar", True),
        (with_buffers("running_var"), "running_var", False),
    ):
        assert is_statistic(owner, name) == expected, (owner, name)


@pytest.mark.parametrize("buffers", ["statistics", "average"])
def test_training_of_shared_statistics_is_that_without_an_average(buffers):
    def run(*callbacks: Any) -> list[Tensor]:
        first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        second.running_mean, second.running_var = first.running_mean, first.running_var
        trained: list[Tensor] = []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                trained.append(first.running_mean.clone())

        module = Module(buffered(first, nn.ReLU(), second))
        fit(module, *callbacks, Keep())
        assert first.running_mean is second.running_mean
        return trained

    assert_same(dict(enumerate(run(EMA(0.5, buffers=buffers)))), dict(enumerate(run())))


def test_spectral_norms_with_shared_vectors_of_a_shared_weight():
    torch.manual_seed(0)
    first, second = spectral_norm_hook(nn.Linear(16, 16)), spectral_norm_hook(nn.Linear(16, 16))
    second.weight_orig, second.weight_u, second.weight_v = first.weight_orig, first.weight_u, first.weight_v
    module = Module(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), first, second, nn.Linear(16, CLASSES)))
    fit(module, EMA(0.5))
    module.eval()(torch.zeros(1, 1, 8, 8))
    for layer in (first, second):
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("known", [None, "without the mask", "pruned"])
def test_masks_of_pruned_weights_are_not_averaged(known, tmp_path):
    module = Module(buffered())
    prune.random_unstructured(module.net[0], "weight", 0.5)
    mask, paths = module.net[0].weight_mask.clone(), []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.ckpt"))
        state = {name: value.clone() for name, value in module.state_dict().items()}
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.0"}, paths[-1])
        module.net[0].weight_mask.copy_(1 - mask)
    other = {None: None, "without the mask": Module(buffered()), "pruned": module}[known]
    average(paths, str(tmp_path / "a.ckpt"), module=other)
    assert torch.equal(loaded(tmp_path / "a.ckpt")["state_dict"]["net.0.weight_mask"], mask)


@pytest.mark.parametrize("make", [lambda: EMA(0.5), lambda: SWA(0.1, start=0.2)], ids=["EMA", "SWA"])
def test_pruning_by_a_callback_is_permanent_in_checkpoints(make, tmp_path):
    def run(ckpt_path: Any = None) -> Any:
        module, saver = Module(buffered()), Saver(tmp_path, steps=(8,))
        pruning = pl.callbacks.ModelPruning("l1_unstructured", [(module.net[0], "weight")], amount=0.5)
        trainer = fit(module, make(), pruning, saver, ckpt_path=ckpt_path)
        return module, trainer, [path for path in saver.paths if path.name == "8-batch.ckpt"]

    module, trainer, [path] = run()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for saved in (path, tmp_path / "after.ckpt"):
        weight = loaded(saved)["state_dict"]["net.0.weight"]
        assert 0.4 < float((weight == 0).float().mean()) < 0.9
    other = Module(buffered())
    other.load_state_dict(loaded(tmp_path / "after.ckpt")["state_dict"])
    image = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(other.eval()(image), module.eval()(image))
    run(path)


def test_average_warns_of_tensors_that_the_module_lacks(tmp_path, caplog):
    module, paths = Module(buffered()), []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.ckpt"))
        state = module.state_dict() | {"net.0.scale_of_observer": torch.full((1,), float(i))}
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.0"}, paths[-1])
    average(paths, str(tmp_path / "a.ckpt"), module=module)
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "net.0.scale_of_observer" in record.getMessage()


def test_buffers_can_be_averaged_all_and_infinities_stay():
    module = Module(buffered())
    fit(module, EMA(0.5, warmup=False, buffers="average"), max_epochs=1, limit_val_batches=0)
    state = module.net[1]
    assert float(state.running_steps) == 1 / 8 + 2 / 8 + 3 / 4 + 4 / 2
    assert sorted(state.mask.tolist())[0] == -math.inf
    assert not state.mask[torch.isfinite(state.mask)].isnan().any()


def test_log_says_what_is_averaged_and_what_is_copied():
    network = buffered(nn.BatchNorm2d(4), spectral_norm_hook(nn.Conv2d(4, 4, 1)))
    with log_lines() as records:
        fit(Module(network), EMA(0.5), max_epochs=1)
    [record] = records
    assert "2 averaged, 6 copied (net.3.index, " in record.getMessage()
    assert "2 computed" in record.getMessage()


def test_average_warns_of_what_it_can_not_tell(tmp_path, caplog):
    saver = Saver(tmp_path, steps=(1, 2))
    fit(Module(buffered()), saver, max_epochs=1, limit_val_batches=0)
    average([str(path) for path in saver.paths if "batch" in path.name], str(tmp_path / "a.ckpt"))
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "net.1.index" in record.getMessage()
    assert "--module" in record.getMessage()
    state = loaded(tmp_path / "a.ckpt")["state_dict"]
    assert state["net.1.constant"].tolist() == [0.1, 0.3]


@pytest.mark.parametrize("wrap", [weight_norm_hook, parametrizations.weight_norm], ids=["hook", "parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_is_that_of_the_averaged_parts(wrap):
    torch.manual_seed(0)
    module = Module(nn.Sequential(nn.Flatten(), wrap(nn.Linear(64, CLASSES))))
    history: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            history.append(weights_of(module))

    fit(module, EMA(0.5, warmup=False), Keep(), max_epochs=1)
    names = [name for name in history[0] if not name.endswith("bias")]
    g, v = sorted(names, key=lambda name: history[0][name].numel())
    parts = {}
    for name in (g, v):
        parts[name] = history[0][name]
        for weights in history[1:]:
            parts[name] = torch.lerp(parts[name], weights[name], 0.5)
    module.eval()(torch.zeros(1, 1, 8, 8))
    exact = parts[g] * parts[v] / parts[v].norm(dim=1, keepdim=True)
    torch.testing.assert_close(module.net[1].weight.detach(), exact)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("buffers", ["statistics", "average", "copy"])
def test_a_run_resumes_whatever_is_not_finite(value, buffers, tmp_path):
    def module() -> Module:
        made = Module(buffered(nn.BatchNorm2d(4)), lr=0.0)
        made.net[1].running_mean.fill_(value)
        made.net[2].constant.fill_(value)
        return made

    saver = Saver(tmp_path, steps=(3,))
    full = module()
    fit(full, EMA(0.5, buffers=buffers), saver, max_epochs=2, limit_val_batches=0)
    finite = Module(buffered(nn.BatchNorm2d(4)), lr=0.0)
    fit(finite, EMA(0.5, buffers=buffers), ckpt_path=saver.paths[0], max_epochs=2, limit_val_batches=0)
    assert_same(weights_of(finite), weights_of(full))


@pytest.mark.parametrize(("before", "after"), [("average", "copy"), ("copy", "average"), ("average", "statistics")])
def test_another_choice_of_buffers_resumes_from_those_that_were_trained(before, after, tmp_path):
    saver = Saver(tmp_path, steps=(3,))
    full, resumed = Module(buffered(nn.BatchNorm2d(4))), Module(buffered(nn.BatchNorm2d(4)))
    fit(full, EMA(0.5, buffers=before, validate=True), saver, max_epochs=1, limit_val_batches=0)
    fit(resumed, EMA(0.5, buffers=after), ckpt_path=saver.paths[0], max_epochs=1, limit_val_batches=0)
    assert float(resumed.net[2].running_steps) == pytest.approx(4, abs=2 if after == "average" else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that depend on the mode


class Adapter(nn.Linear):
    """A frozen layer with a low-rank adapter, which merges into it for evaluation."""

    def __init__(self, size: int, how: str) -> None:
        super().__init__(size, size)
        self.how, self.merged = how, False
        self.weight.requires_grad = self.bias.requires_grad = False
        self.a, self.b = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(size, 2) / 10)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            delta = (self.b @ self.a).detach() * (-1 if mode else 1)
            if self.how == "replaces":
                self.weight.data = self.weight.data + delta
            else:
                self.weight.data += delta
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        is_apart = self.training if self.how == "by mode" else not self.merged
        return super().forward(x) + (x @ self.a.T @ self.b.T if is_apart else 0)


class Around(nn.Module):
    """The adapter has the frozen layer as a part, and merges by itself."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = Adapter(size, "in place")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "in place": lambda: Adapter(16, "in place"),
    "replaces": lambda: Adapter(16, "replaces"),
    "by mode": lambda: Adapter(16, "by mode"),
    "around": lambda: Around(16),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


class Adapted(Module):
    """Unmerges where Lightning restores flags alone."""

    def __init__(self, adapter: Callable[[], nn.Module], where: str = "on_validation_model_train") -> None:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        super().__init__(nn.Sequential(body, adapter(), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)))
        self.layer = next(part for part in self.modules() if isinstance(part, Adapter))
        self.base = self.layer.weight.detach().clone()
        setattr(self, where, lambda *args: self.train())
        self.deltas: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            layer = self.layer
            self.deltas.append((layer.weight - self.base - layer.b @ layer.a).detach().abs().max())


@each_adapter
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("where", ["on_validation_model_train", "on_train_epoch_start"])
def test_frozen_weights_below_an_adapter_stay_as_they_are(adapter, make, where, tmp_path):
    trained: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            trained.append(module.layer.weight.detach().clone())

    module, saver = Adapted(adapter, where), Saver(tmp_path, steps=(4, 8))
    trainer = fit(module, make(), Keep(), saver)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert all(torch.equal(weight, module.base) for weight in trained)
    assert max(module.deltas) < 1e-5  # in evaluation it is merged, once
    assert torch.equal(module.layer.weight, module.base)
    name = next(name for name, param in module.named_parameters() if param is module.layer.weight)
    for path in (*saver.paths, tmp_path / "after.ckpt"):  # in validation too, where it is merged
        checkpoint = loaded(path)
        assert torch.equal(checkpoint["state_dict"][name], module.base), path.name
        for state in checkpoint["callbacks"].values():
            assert torch.equal(state.get("raw", {}).get(name, module.base), module.base), path.name


@each_adapter
def test_an_adapter_is_validated_as_it_is_saved(adapter, tmp_path):
    module, saver = Adapted(adapter), Saver(tmp_path, steps=(4, 8))
    image = next(iter(train_loader()))[0]
    fit(module, EMA(0.8), saver)
    paths = [path for path in saver.paths if "validation" in path.name]
    for path, logits in zip(paths, module.seen, strict=False):
        other = Adapted(adapter)
        other.load_state_dict(loaded(path)["state_dict"])
        torch.testing.assert_close(other.eval()(image), logits, rtol=1e-4, atol=1e-5)


@each_adapter
def test_training_of_an_adapter_is_that_without_an_average(adapter):
    def run(*callbacks: Any) -> Any:
        trained: list[Any] = []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                trained.append(weights_of(module))

        fit(Adapted(adapter), *callbacks, Keep())
        return trained

    plain = run()
    for made in (EMA(0.8), EMA(0.8, validate="both")):
        for ours, theirs in zip(run(made), plain, strict=True):
            for name, value in ours.items():  # theirs is rounded by each merge
                torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@each_adapter
def test_adapters_resume_bitwise(adapter, tmp_path):
    saver, full = Saver(tmp_path, steps=(3, 4, 8)), Adapted(adapter)
    fit(full, EMA(0.8), saver)
    for path in saver.paths:
        resumed = Adapted(adapter)
        fit(resumed, EMA(0.8), ckpt_path=path)
        assert_same(weights_of(resumed), weights_of(full))


@each_adapter
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=.*:UserWarning")
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_end", "on_train_batch_end"])
def test_an_error_leaves_an_adapter_unmerged(adapter, hook, tmp_path):
    module = Adapted(adapter)
    saver = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, EMA(0.8), Interrupt(hook, RuntimeError("stop")), saver, **checkpoints(tmp_path))
    name = next(name for name, param in module.named_parameters() if param is module.layer.weight)
    checkpoint = loaded(tmp_path / "on_exception.ckpt")
    assert torch.equal(checkpoint["state_dict"][name], module.base)
    assert torch.equal(module.train().layer.weight, module.base)


@each_adapter
@pytest.mark.parametrize("between", ["eval", "validate", "test twice", "nothing"])
def test_a_second_fit_after_an_evaluation_goes_on(adapter, between, tmp_path):
    module = Adapted(adapter)
    trainer = fit(module, EMA(0.8), max_epochs=2)
    if between == "eval":
        module.eval()
    elif between != "nothing":
        for _ in range(between.count("t")):
            trainer.validate(module, train_loader(), verbose=False)
            module.train()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    name = next(name for name, param in module.named_parameters() if param is module.layer.weight)
    assert loaded(tmp_path / "after.ckpt")["callbacks"]["EMA"]["updates"] == 8
    assert torch.equal(loaded(tmp_path / "after.ckpt")["state_dict"][name], module.base)
    module.train()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, train_loader(), train_loader())
    assert torch.equal(module.layer.weight, module.base)


@each_adapter
@pytest.mark.parametrize("merged", [True, False])
def test_an_edit_of_an_adapter_after_the_fit_is_not_reverted(adapter, merged, tmp_path):
    module = Adapted(adapter)
    trainer = fit(module, EMA(0.8), max_epochs=1)
    module.train(not merged)
    module.layer.weight.data[3, 5] += 1e-3
    edited = weights_of(module)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(weights_of(module), edited)
    assert_same(loaded(tmp_path / "after.ckpt")["state_dict"], edited)


@each_adapter
def test_average_scores_an_adapter_as_it_is_saved(adapter, tmp_path):
    saver = Saver(tmp_path, steps=(1, 4, 8, 12))
    fit(Adapted(adapter), EMA(0.8), saver)
    paths = [str(path) for path in saver.paths if "batch" in path.name]

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return train_loader()

        def val_dataloader(self) -> Any:
            return train_loader(batches=8)

    module = Adapted(adapter)
    average(paths, str(tmp_path / "soup.ckpt"), greedy=True, metric="accuracy", data=Data(), module=module)
    for path, logits in zip(reversed(paths), module.seen[: len(paths)][::-1], strict=True):
        other = Adapted(adapter)
        other.load_state_dict(loaded(path)["state_dict"])
        torch.testing.assert_close(other.eval()(next(iter(train_loader(batches=8)))[0]), logits, rtol=1e-4, atol=1e-5)


@each_adapter
@pytest.mark.parametrize("ema", [True, False], ids=["with EMA", "alone"])
def test_statistics_below_an_adapter_are_those_of_the_merged_weights(adapter, ema):
    module = Adapted(adapter)
    fit(module, PreciseBN(1000), *([EMA(0.8)] if ema else []))
    module.train()
    images = torch.cat([batch[0] for batch in train_loader()])
    for part in module.modules():
        part.training = False
    body, layer = module.net[0].double(), module.layer.double()
    features = body(images.double())
    with torch.no_grad():
        features = F.linear(features, layer.weight + layer.b @ layer.a, layer.bias)
    torch.testing.assert_close(module.net[2].running_mean.double(), features.mean(0), rtol=1e-4, atol=1e-4)
    if ema:
        assert torch.equal(layer.weight.float(), module.base)


def test_fixres_rejects_weights_that_depend_on_the_mode():
    module = Adapted(ADAPTERS["in place"])
    base = module.layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"FixRes .*'net\.1\.weight'.* merge"):
        fit(module, FixRes(None), max_epochs=1)
    assert torch.equal(module.layer.weight, base)


class Cached(nn.Module):
    """Computes a bias from a weight once, in evaluation, and forgets it in ``train()``, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.zeros(16)), None

    def train(self, mode: bool = True) -> Any:
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.weight.exp()
        self.cache = self.weight.exp() if self.cache is None else self.cache
        return x + self.cache


@pytest.mark.parametrize("validate", [True, "both"])
def test_what_a_layer_caches_is_of_the_weights_that_are_shown(validate, tmp_path):
    torch.manual_seed(0)
    module = Module(nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), Cached(), nn.Linear(16, CLASSES)))
    saver = Saver(tmp_path, steps=(4, 8, 12))
    fit(module, EMA(0.5, validate=validate), saver)
    image = next(iter(train_loader()))[0]
    paths = [path for path in saver.paths if "validation" in path.name]
    assert len(paths) == len(module.seen) == 3
    for path, logits in zip(paths, module.seen, strict=True):
        module.train().load_state_dict(loaded(path)["state_dict"])
        torch.testing.assert_close(module.eval()(image), logits)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are changed after the fit


def edit_replace(module: Any) -> None:
    edited = module.net[0].weight.detach().clone()
    edited[1, 0, 2, 2] += 1e-6
    module.net[0].weight.data = edited


def edit_in_place(module: Any) -> None:
    with torch.no_grad():
        module.net[0].weight[2, 0, 1, 1] = torch.nextafter(module.net[0].weight[2, 0, 1, 1], torch.tensor(9.0))


def edit_by_data(module: Any) -> None:
    module.net[-1].bias.data[0] += 1


def edit_swap_rows(module: Any) -> None:
    module.net[-1].weight.data = module.net[-1].weight.data[[1, 0, 2]].contiguous()


def edit_load(module: Any) -> None:
    module.load_state_dict({name: value * 2 for name, value in module.state_dict().items()})


def edit_assign(module: Any) -> None:
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    module.net[-1].bias.data[0] += 1


def edit_statistics(module: Any) -> None:
    module.net[1].running_mean = module.net[1].running_mean + 1


def edit_layer(module: Any) -> None:
    module.net[-1] = nn.Linear(4, 3)


def edit_zeros(module: Any) -> None:
    module.net[-1].bias.data = torch.zeros(3)


EDITS = {
    edit.__name__.removeprefix("edit_"): edit
    for edit in (
        edit_replace,
        edit_in_place,
        edit_by_data,
        edit_swap_rows,
        edit_load,
        edit_assign,
        edit_statistics,
        edit_layer,
        edit_zeros,
    )
}


@pytest.mark.parametrize("make", [lambda: EMA(0.8), lambda: SWA(0.1, start=0.2)], ids=["EMA", "SWA"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("then", ["save", "save weights", "fit"])
def test_an_edit_after_the_fit_is_never_reverted(make, edit, then, tmp_path):
    module = Module(buffered(nn.BatchNorm2d(4)), lr=0.0)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    trainer = fit(module, make(), max_epochs=1)
    edit(module)
    edited = weights_of(module)
    if then == "fit":
        start: list[Any] = []
        module.on_train_start = lambda: start.append(weights_of(module))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, train_loader(), train_loader())
        assert_same(start[0], edited)
    else:
        trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=then == "save weights")
        assert_same(loaded(tmp_path / "after.ckpt")["state_dict"], edited)
        assert_same(weights_of(module), edited)


def test_without_an_edit_a_second_fit_goes_on_from_the_trained_weights():
    module = Module(buffered(nn.BatchNorm2d(4)))
    trainer = fit(module, EMA(0.8), max_epochs=1)
    module.double().float()  # to another type and back: the same values
    shown = weights_of(module)
    module.on_train_start = lambda: shown.update(raw=weights_of(module))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_loader(), train_loader())
    raw = shown.pop("raw")
    assert differences(raw, shown)
