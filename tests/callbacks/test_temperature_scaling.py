"""TemperatureScaling: the fit against scikit-learn and scipy, the scaled weights, and modules of many kinds."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fits import make_trainer, run, weights_of
from helpers.modules import NAMESPACES, eval_loader, images, lightning, module_class, network, train_loader
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassCalibrationError

from lit_tricks import EMA, SWA, Classifier, PreciseBN, TemperatureScaling, TestTimeAugment
from lit_tricks.callbacks.calibration import scaling as _scaling
from lit_tricks.callbacks.calibration.recorder import spread
from lit_tricks.callbacks.calibration.scaling import calibration_scores, fit_temperature, fit_vector_scaling
from lit_tricks.models import LogitScaling


def problem(classes: int = 5, samples: int = 1000, temperature: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return overconfident logits, and labels that are drawn from the softmax at the temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The fit


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_temperature_minimizes_the_loss_in_float64(temperature, classes, monkeypatch):
    monkeypatch.setattr(_scaling, "CHUNK", 97)
    logits, labels = problem(classes, temperature=temperature)

    def loss(beta: float) -> float:
        return float(F.cross_entropy(beta * logits.double(), labels))

    expected = 1 / minimize_scalar(loss, bounds=(0.05, 20), options={"xatol": 1e-12}).x
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_temperature_equals_scikit_learn(seed):
    calibration = pytest.importorskip("sklearn", minversion="1.8") and pytest.importorskip("sklearn.calibration")
    frozen = pytest.importorskip("sklearn.frozen")
    from sklearn.linear_model import LogisticRegression

    features, labels = problem(4, 300, temperature=1.0, seed=seed)
    model = LogisticRegression(C=10, max_iter=1000).fit(features[:40].numpy(), labels[:40].numpy())  # overconfident
    rest, targets = features[40:].numpy(), labels[40:]
    theirs = calibration.CalibratedClassifierCV(frozen.FrozenEstimator(model), method="temperature", ensemble=False)
    theirs.fit(rest, targets.numpy())
    logits = torch.from_numpy(model.decision_function(rest))
    temperature = fit_temperature(logits, targets)
    [beta] = {each.calibrators[0].beta_ for each in theirs.calibrated_classifiers_}
    assert temperature == pytest.approx(1 / float(beta), rel=1e-4)
    assert temperature > 1.1
    np.testing.assert_allclose((logits / temperature).softmax(1), theirs.predict_proba(rest), atol=1e-4)


def views_of(images: int = 300, views: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return overconfident logits of views (V, N, K) that disagree, and labels."""
    generator = torch.Generator().manual_seed(seed)
    common, labels = problem(4, images, temperature=3.0, seed=seed)
    return common + 2 * torch.randn(views, images, 4, generator=generator), labels


@pytest.mark.parametrize("views", [1, 3])
def test_temperature_of_views_maximizes_the_likelihood_of_their_mean(views, monkeypatch):
    monkeypatch.setattr(_scaling, "CHUNK", 97)
    logits, labels = views_of(views=views)

    def loss(log_beta: float) -> float:
        mean = (math.exp(log_beta) * logits.double()).softmax(2).mean(0)
        return -float(mean[torch.arange(len(labels)), labels].log().mean())

    expected = math.exp(-minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-6)
    if views > 1:  # the logarithm of the mean has another temperature
        mean = logits.log_softmax(2).logsumexp(0)
        assert abs(fit_temperature(mean, labels) / expected - 1) > 0.05
    else:
        assert fit_temperature(logits[0], labels) == pytest.approx(expected, rel=1e-6)


def test_likelihood_of_views_may_have_two_maxima():
    """Views that disagree are best at a high temperature, others at a low one. The higher maximum is far from T = 1."""
    first = torch.tensor([20.0] * 10 + [0.1] * 24 + [-0.1] * 6)
    second = torch.tensor([-1.0] * 10 + [0.1] * 24 + [-0.1] * 6)
    logits = torch.stack([torch.stack([view, torch.zeros(40)], 1) for view in (first, second)])
    labels = torch.zeros(40, dtype=torch.long)
    betas = torch.logspace(math.log10(0.05), math.log10(20), 1000, dtype=torch.float64)
    losses = [-float((beta * logits.double()).softmax(2).mean(0)[:, 0].log().mean()) for beta in betas.tolist()]
    slopes = np.diff(losses)
    assert ((slopes[:-1] < 0) & (slopes[1:] > 0)).sum() == 2
    best = 1 / float(betas[int(np.argmin(losses))])
    assert fit_temperature(logits, labels) == pytest.approx(best, rel=1e-2)


@pytest.mark.parametrize("offset", [True, False])
def test_vector_scaling_of_views_maximizes_the_likelihood_of_their_mean(offset):
    logits, labels = views_of()
    temperatures, offsets = fit_vector_scaling(logits, labels, offset)

    def loss(flat: Any) -> tuple[float, Any]:
        both = torch.tensor(flat).requires_grad_()
        mean = (logits.double() * both[:4] + both[4:] * offset).softmax(2).mean(0)
        value = -mean[torch.arange(len(labels)), labels].log().mean()
        value.backward()
        return float(value.detach()), both.grad.numpy()

    start = np.repeat([1 / fit_temperature(logits, labels), 0.0], 4)
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(1 / temperatures, found.x[:4], rtol=1e-4)
    expected = found.x[4:] - found.x[4:].mean() if offset else np.zeros(4)
    np.testing.assert_allclose(offsets, expected, atol=1e-4)


@pytest.mark.parametrize("offset", [True, False])
def test_vector_scaling_minimizes_the_loss_in_float64(offset, monkeypatch):
    monkeypatch.setattr(_scaling, "CHUNK", 333)
    logits, labels = problem(4)
    logits = logits * torch.tensor([1.0, 2.0, 0.5, 1.0]) + torch.tensor([0.0, 1.0, -1.0, 0.5])
    temperatures, offsets = fit_vector_scaling(logits, labels, offset)

    def loss(flat: Any) -> tuple[float, Any]:
        both = torch.tensor(flat).requires_grad_()
        value = F.cross_entropy(logits.double() * both[:4] + both[4:] * offset, labels)
        value.backward()
        return float(value.detach()), both.grad.numpy()

    found = minimize(loss, np.repeat([1.0, 0.0], 4), jac=True, method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(1 / temperatures, found.x[:4], rtol=1e-4)
    expected = found.x[4:] - found.x[4:].mean() if offset else np.zeros(4)
    np.testing.assert_allclose(offsets, expected, atol=1e-4)


def test_degenerate_labels_end_at_a_bound():
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, logits.argmax(1)) == 0.05
    assert fit_temperature(logits, logits.argmin(1)) == 20
    assert fit_temperature(torch.zeros(2, 2), torch.tensor([0, 1])) == 0.05  # any temperature is as good


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "are needed, got"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), r"in \[0, 2\), got 0 to 2"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "not all finite"),
    ],
)
def test_unusable_logits_are_rejected(logits, labels, message):
    for function in (fit_temperature, fit_vector_scaling, calibration_scores):
        with pytest.raises(ValueError, match=message):
            function(logits, labels)


def test_vector_scaling_needs_every_class():
    with pytest.raises(ValueError, match="1 of 3 have none, such as class 2"):
        fit_vector_scaling(torch.eye(3)[:2], torch.tensor([0, 1]))


def test_scores_equal_torchmetrics_and_their_definitions(monkeypatch):
    monkeypatch.setattr(_scaling, "CHUNK", 50)
    logits, labels = problem()
    scores = calibration_scores(logits, labels)
    assert scores.ece == pytest.approx(float(MulticlassCalibrationError(5, n_bins=15)(logits, labels)), abs=1e-6)
    assert scores.nll == pytest.approx(float(F.cross_entropy(logits.double(), labels)))
    distance = logits.double().softmax(1) - F.one_hot(labels, 5)
    assert scores.brier == pytest.approx(float(distance.square().sum(1).mean()))
    assert scores.accuracy == float((logits.argmax(1) == labels).double().mean())


# ---------------------------------------------------------------------------------------------------------------------
# In a fit

SIZE = 200  # images of a validation


def loader(size: int = SIZE) -> DataLoader[Any]:
    return DataLoader(images(size), batch_size=50)


def fitted(*tricks: Any, module: Any = None, namespace: str = "lightning", **kwargs: Any) -> Any:
    """Fit the small module, with a validation of 200 images."""
    module = module_class(namespace)() if module is None else module
    trainer = make_trainer(*tricks, namespace=namespace, **kwargs)
    torch.manual_seed(0)
    trainer.fit(module, train_loader(), loader())
    return module


def outputs(module: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of the validation images, and their labels."""
    data = images(SIZE)
    with torch.no_grad():
        return module.eval()(data.tensors[0]), data.tensors[1]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_weights_are_scaled_by_the_best_temperature(namespace):
    plain, scaled = (fitted(*tricks, namespace=namespace) for tricks in ([], [TemperatureScaling()]))
    logits, labels = outputs(plain)
    temperature = fit_temperature(logits, labels)
    assert abs(temperature - 1) > 0.05
    new, _ = outputs(scaled)
    torch.testing.assert_close(new, logits / temperature, rtol=1e-4, atol=1e-4)
    assert torch.equal(new.argmax(1), logits.argmax(1))
    assert fit_temperature(new, labels) == pytest.approx(1, abs=1e-4)
    before, after = weights_of(plain), weights_of(scaled)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"net.1.weight", "net.1.bias"}
    logged = scaled.trainer.callback_metrics
    assert float(logged["temperature_scaling/temperature"]) == pytest.approx(temperature, rel=1e-4)
    assert float(logged["temperature_scaling/ece"]) == pytest.approx(calibration_scores(new, labels).ece, abs=1e-4)


def test_vector_has_a_temperature_and_an_offset_per_class():
    plain, scaled = fitted(), fitted(TemperatureScaling("vector"))
    logits, labels = outputs(plain)
    temperatures, offsets = fit_vector_scaling(logits, labels)
    expected = (logits / temperatures + offsets).float()
    torch.testing.assert_close(outputs(scaled)[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [lambda: EMA(decay=0.5), lambda: SWA(lr=0.2, start=0.25), lambda: EMA(validate=False)])
@pytest.mark.filterwarnings("ignore:SWA averages the statistics")
def test_the_weights_that_are_tested_are_calibrated(make, tmp_path):
    """The average where it is validated, and a run resumes from the trained weights and the average without scaling."""
    plain, scaled = fitted(make(), PreciseBN(num_samples=16)), fitted(make(), TemperatureScaling(), PreciseBN(16))
    logits, labels = outputs(plain)
    torch.testing.assert_close(outputs(scaled)[0], logits / fit_temperature(logits, labels), rtol=1e-4, atol=1e-4)


def test_last_weights_without_a_validation_are_validated():
    """The fit ends two batches after the last validation. PreciseBN has new statistics then."""
    how = {"max_steps": 6, "max_epochs": -1}
    for other in ([], [PreciseBN(num_samples=16, when="end")], [EMA(decay=0.5)]):
        plain, scaled = fitted(*other, **how), fitted(*other, TemperatureScaling(), **how)
        logits, labels = outputs(plain)
        temperature = fit_temperature(logits, labels)
        torch.testing.assert_close(outputs(scaled)[0], logits / temperature, rtol=1e-4, atol=1e-4)
        assert scaled.trainer.state.stage is None or scaled.trainer.state.stage.value == "train"


def of_views(module: Any) -> tuple[Tensor, Tensor]:
    """Return the logits (V, N, K) of the views of the validation images: as they are, and flipped; and labels."""
    image, labels = images(SIZE).tensors
    with torch.no_grad():
        return torch.stack([module.eval()(image), module(image.flip(-1))]), labels


@pytest.mark.parametrize("order", [1, -1])
def test_temperature_is_that_of_the_mean_over_views(order, tmp_path):
    """The reference is the mean of softmaxes in float64, of a run without the callbacks."""
    best = checkpoints(tmp_path)
    plain = fitted(namespace="lightning")
    tricks = [TemperatureScaling(), TestTimeAugment()][::order]
    module = fitted(*tricks, best, enable_checkpointing=True)
    logits, labels = of_views(plain)

    def loss(beta: float) -> float:
        mean = (beta * logits.double()).softmax(2).mean(0)
        return -float(mean[torch.arange(SIZE), labels].log().mean())

    temperature = 1 / minimize_scalar(loss, bounds=(0.05, 20), options={"xatol": 1e-12}).x
    assert temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-5)
    assert abs(temperature / fit_temperature(logits[0], labels) - 1) > 1e-3  # of single views
    scaled, _ = of_views(module)
    torch.testing.assert_close(scaled, logits / temperature, rtol=1e-4, atol=1e-4)
    assert torch.equal(scaled.argmax(2), logits.argmax(2))
    assert float(module.trainer.callback_metrics["temperature_scaling/ece"]) == pytest.approx(
        calibration_scores((logits / temperature).double().softmax(2).mean(0).log(), labels).ece, abs=1e-4
    )
    found = torch.load(next(tmp_path.glob("*-calibrated.ckpt")), weights_only=True)["calibration"]
    assert found["views"] == 2
    assert "forward" not in vars(module)


def test_vector_scaling_of_the_mean_over_views():
    plain, module = fitted(), fitted(TemperatureScaling("vector"), TestTimeAugment())
    logits, labels = of_views(plain)
    temperatures, offsets = fit_vector_scaling(logits, labels)
    expected = (logits / temperatures + offsets).float()
    torch.testing.assert_close(of_views(module)[0], expected, rtol=2e-3, atol=2e-3)


def test_buffer_after_the_mean_over_views_scales_the_mean():
    """The network is averaged, and the buffer follows in ``forward`` of the Classifier."""
    views = TestTimeAugment(layer="model")
    torch.manual_seed(0)
    plain = fitted(module=classifier(Cosine()))
    torch.manual_seed(0)
    module = fitted(TemperatureScaling(), views, module=classifier(Cosine()))
    logits, labels = of_views(plain)
    mean = logits.double().softmax(2).mean(0).log()
    factor = float(module.logit_scaling.factors)
    assert 1 / factor == pytest.approx(fit_temperature(mean, labels), rel=1e-4)


def test_logits_that_change_after_the_mean_over_views_are_rejected():
    module = with_network(network(), lambda logits: 3 * logits)
    with pytest.raises(RuntimeError, match="changes the logits after the mean over views of net"):
        fitted(TemperatureScaling(), TestTimeAugment(layer="net"), module=module)


def test_views_of_sigmoids_are_rejected():
    with pytest.raises(RuntimeError, match=r"fits a softmax.*activation='sigmoid'"):
        fitted(TemperatureScaling(), TestTimeAugment(activation="sigmoid"))


def checkpoints(folder: Path, **kwargs: Any) -> Any:
    return lightning().callbacks.ModelCheckpoint(folder, filename="best", monitor="val_loss", **kwargs)


@pytest.mark.parametrize("weights_only", [False, True])
def test_best_checkpoint_is_calibrated_in_another_file(weights_only, tmp_path, caplog):
    trick = TemperatureScaling()
    best = checkpoints(tmp_path, save_weights_only=weights_only)
    module = fitted(trick, EMA(decay=0.5), best, enable_checkpointing=True)
    assert trick.checkpoint == str(tmp_path / "best-calibrated.ckpt")
    old, new = (torch.load(path, weights_only=True) for path in (best.best_model_path, trick.checkpoint))
    assert new["calibration"]["weights"] == ("raw" if weights_only else "averaged")
    assert {"callbacks", "optimizer_states", "loops"}.isdisjoint(new)
    values = []
    for state in (old["state_dict"], new["state_dict"]):
        module.load_state_dict(state)
        values.append(outputs(module)[0])
    labels = images(SIZE).tensors[1]
    torch.testing.assert_close(values[1], values[0] / fit_temperature(values[0], labels), rtol=1e-4, atol=1e-4)
    assert torch.equal(values[0].argmax(1), values[1].argmax(1))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("val_loss of the same images chose" in line for line in warnings)


def test_checkpoint_without_a_validation_is_left_as_it_is(tmp_path, caplog):
    best = lightning().callbacks.ModelCheckpoint(tmp_path, filename="some", every_n_train_steps=3)
    trick = TemperatureScaling()
    fitted(trick, best, enable_checkpointing=True, max_epochs=1)
    assert trick.checkpoint == ""
    assert [path.name for path in tmp_path.iterdir()] == ["some.ckpt"]
    assert "not saved right after a validation" in caplog.text


@pytest.mark.parametrize("tricks", [[], [lambda: EMA(decay=0.5)]])
def test_run_resumes_from_a_checkpoint_of_the_calibrated_module(tricks, tmp_path):
    others = [make() for make in tricks]
    first = run(TemperatureScaling(), *others, max_epochs=2)
    first.trainer.save_checkpoint(tmp_path / "after.ckpt")
    scaled = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(scaled[name], value) for name, value in first.weights.items())
    full = run(TemperatureScaling(), *[make() for make in tricks])
    resumed = run(TemperatureScaling(), *[make() for make in tricks], ckpt_path=tmp_path / "after.ckpt")
    assert all(torch.equal(resumed.weights[name], value) for name, value in full.weights.items())


# ---------------------------------------------------------------------------------------------------------------------
# Modules


def with_network(net: nn.Module, output: Any = None, calls: str = "forward") -> Any:
    """Return the small module with another network.

    Args:
        net: gives logits.
        output: function of the logits that ``forward`` returns.
        calls: what validation_step calls: "forward", "net", or "".
    """

    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = net

        def forward(self, image: Tensor) -> Tensor:
            return output(self.net(image)) if output else self.net(image)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            {"forward": self, "net": self.net}.get(calls, type)(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    return Module()


class Homogeneous(nn.Module):
    """Layers after the classifier that scale with it, as in SqueezeNet; and a layer that is defined after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        self.head = nn.Conv2d(4, 3, 1)
        self.unused = nn.Linear(4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.head(self.body(image))).mean((2, 3))


class TwoHeads(nn.Module):
    """The mean of two heads, as in DeiT with distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 3), nn.Linear(64, 3)

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.a, self.b

    def forward(self, image: Tensor) -> Tensor:
        return (self.a(image.flatten(1)) + self.b(image.flatten(1))) / 2


def no_bias() -> nn.Module:
    net = network()
    net[1] = nn.Linear(16, 3, bias=False)
    return net


MODULES = {
    "logits of a submodule": lambda: with_network(network(), calls="net"),
    "log-probabilities": lambda: with_network(network(), lambda logits: logits.log_softmax(1)),
    "probabilities": lambda: with_network(network(), lambda logits: logits.softmax(1)),
    "no bias": lambda: with_network(no_bias()),
    "a convolution": lambda: with_network(Homogeneous()),
    "two heads": lambda: with_network(TwoHeads()),
}


@pytest.mark.parametrize("kind", MODULES)
def test_layer_that_scales_the_logits_is_found(kind):
    made = []
    for tricks in ([], [TemperatureScaling()]):
        torch.manual_seed(0)
        made.append(fitted(*tricks, module=MODULES[kind]()))
    plain, scaled = made
    image, labels = images(SIZE).tensors
    with torch.no_grad():
        logits, new = (module.eval().net(image) for module in (plain, scaled))
    torch.testing.assert_close(new, logits / fit_temperature(logits, labels), rtol=1e-3, atol=1e-3)
    assert torch.equal(new.argmax(1), logits.argmax(1))


class Cosine(nn.Module):
    """Logits by the angle to the rows of the weight, which has no scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(image.flatten(1)), F.normalize(self.fc.weight))


class Tied(nn.Module):
    """A classifier whose weight another layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 3, bias=False), nn.Linear(64, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, image: Tensor) -> Tensor:
        return self.b(image.flatten(1) + self.a(image.flatten(1)).mean(1, keepdim=True))


SCALED_BY_A_BUFFER: dict[str, Any] = {
    "cosine": Cosine,
    "shared weights": Tied,
    "a norm at the end": lambda: nn.Sequential(network(), nn.LayerNorm(3, elementwise_affine=False)),
    "half": lambda: nn.Sequential(Cosine(), nn.Softsign()),
}


def classifier(net: nn.Module) -> Any:
    """Return our module with a network, and no calibration."""
    torch.manual_seed(0)
    return Classifier(net, 3, input_size=(1, 8, 8), optimizer=lambda params: torch.optim.SGD(params, lr=0.01))


@pytest.mark.parametrize("kind", SCALED_BY_A_BUFFER)
def test_network_without_such_a_layer_has_a_buffer(kind, tmp_path):
    """The state of the run has the network without the buffer, and the calibrated file loads as any other one."""
    best, trick = checkpoints(tmp_path, save_last=True), TemperatureScaling()
    best.monitor = "val/loss"
    made = []
    for tricks in ([], [trick, best]):
        torch.manual_seed(0)
        net = SCALED_BY_A_BUFFER[kind]()
        how = {"precision": "bf16-true"} if kind == "half" else {}
        made.append(fitted(*tricks, module=classifier(net), enable_checkpointing=bool(tricks), **how))
    plain, scaled = made
    logits, labels = outputs(plain.float())
    temperature = fit_temperature(logits, labels)
    assert scaled.logit_scaling.factors.dtype == torch.float32
    new, _ = outputs(scaled.float())
    close = {"rtol": 2e-2, "atol": 2e-2} if kind == "half" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(new, logits / temperature, **close)
    assert abs(temperature - 1) > 0.05
    changed = {n for n, v in weights_of(scaled).items() if n not in plain.state_dict()}
    assert changed == {"logit_scaling.factors"}
    if kind == "half":
        return
    assert torch.equal(new.argmax(1), logits.argmax(1))
    assert fit_temperature(new, labels) == pytest.approx(1, abs=1e-3)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (best.best_model_path, trick.checkpoint)]
    assert states[1].keys() - states[0].keys() == {"logit_scaling.factors"}
    values = []
    for path in (best.best_model_path, trick.checkpoint):
        net = SCALED_BY_A_BUFFER[kind]()
        loaded = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True, model=net)
        values.append(outputs(loaded)[0])
    torch.testing.assert_close(values[1], values[0] / fit_temperature(values[0], labels), rtol=1e-4, atol=1e-4)


def test_buffer_has_offsets_for_vector_scaling():
    made = []
    for tricks in ([], [TemperatureScaling("vector")]):
        torch.manual_seed(0)
        made.append(fitted(*tricks, module=classifier(Cosine())))
    plain, scaled = made
    logits, labels = outputs(plain)
    temperatures, offsets = fit_vector_scaling(logits, labels)
    torch.testing.assert_close(outputs(scaled)[0], (logits / temperatures + offsets).float(), rtol=1e-3, atol=1e-3)
    assert set(scaled.state_dict()) - set(plain.state_dict()) == {"logit_scaling.factors", "logit_scaling.offsets"}


def test_run_resumes_without_the_buffer(tmp_path):
    """Also a second fit, which continues from the weights before the scaling."""

    def fit(epochs: int, **how: Any) -> Any:
        trainer = make_trainer(TemperatureScaling(), max_epochs=epochs)
        torch.manual_seed(0)
        module = how.pop("module", None) or classifier(Cosine())
        trainer.fit(module, train_loader(), loader(), **how)
        return trainer

    full = weights_of(fit(3).lightning_module)
    first = fit(2)
    first.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["callbacks"]["TemperatureScaling"]["replaced"] == {"logit_scaling.factors": None}
    assert "logit_scaling.factors" in saved["state_dict"]
    resumed = weights_of(fit(3, ckpt_path=tmp_path / "after.ckpt", weights_only=True).lightning_module)
    first.fit_loop.max_epochs = 3
    first.fit(first.lightning_module, train_loader(), loader())
    for found in (resumed, weights_of(first.lightning_module)):
        assert found.keys() == full.keys()
        assert all(torch.equal(found[name], value) for name, value in full.items())


def test_sharded_weights_get_the_buffer_of_a_calibrated_checkpoint():
    """A strategy has loaded the entries that the module has, and taken the ``state_dict`` out of the checkpoint."""
    module = classifier(Cosine())
    logits = outputs(module)[0]
    module.on_load_checkpoint({"calibration": {"buffers": {"logit_scaling.factors": torch.tensor([0.5])}}})
    assert torch.equal(outputs(module)[0], logits / 2)


def test_module_of_others_ends_with_logit_scaling(tmp_path):
    """Its checkpoint from before loads, and its own code loads the calibrated checkpoint."""
    module = with_network(Cosine())
    torch.save({"state_dict": module.state_dict()}, tmp_path / "before.ckpt")
    module.net = nn.Sequential(module.net, LogitScaling())
    twin = with_network(nn.Sequential(Cosine(), LogitScaling()))
    twin.load_state_dict(module.state_dict())
    before = outputs(twin)[0]
    for _ in range(2):  # a calibration of a calibrated network multiplies
        fitted(TemperatureScaling(), module=module)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(outputs(twin)[0], outputs(module)[0])
    again = copy.deepcopy(pickle.loads(pickle.dumps(module.net[1])))
    again.load_state_dict({"factors": torch.tensor([2.0])})
    assert torch.equal(again(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    assert module.net[1].factors is not None
    twin.load_state_dict({name: value for name, value in module.state_dict().items() if "factors" not in name})
    assert twin.net[1].factors is None
    assert not torch.equal(outputs(twin)[0], before)  # trained


def with_functional_head() -> Any:
    """Return the small module, whose last layer is no module, so that a hidden layer seems to be the last one."""

    class Module(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
            self.head = nn.Parameter(torch.ones(3, 16))

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(F.linear(self.net(batch[0]).relu(), self.head), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


REJECTED = {
    "functional head": (with_functional_head, {}, "loss from other outputs than float32 .*16"),
    "offsets before a factor": (
        lambda: with_network(network(), lambda logits: 4 * logits),
        {"kind": "vector"},
        "not scaled by the weights of one layer.*Or fit one temperature",
    ),
    "cosine": (lambda: with_network(Cosine()), {}, "not by net.fc.*Name the layer.*LogitScaling"),
    "shared weights": (lambda: with_network(Tied()), {}, "no linear layer or convolution has 3 outputs"),
    "another layer": (lambda: with_network(Homogeneous()), {"classifier": "net.unused"}, "classifier='net.unused'"),
    "no such layer": (lambda: with_network(network()), {"classifier": "net.fc"}, "net.fc"),
    "probabilities": (MODULES["probabilities"], {"kind": "vector"}, "outputs probabilities"),
    "no call": (lambda: with_network(network(), calls=""), {}, "found no logits.*Let `forward`"),
    "one logit": (lambda: with_network(nn.Sequential(network(), nn.Linear(3, 1))), {}, "A single logit has no"),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_module_without_such_a_layer_is_rejected_before_training(kind):
    make, arguments, message = REJECTED[kind]
    module = make()
    before = weights_of(module)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        fitted(TemperatureScaling(**arguments), module=module, num_sanity_val_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(module).items() if "weight" in name)


def test_several_labels_per_image_are_rejected():
    labels = torch.zeros(8, 3)
    data = DataLoader(TensorDataset(images(8).tensors[0], labels), batch_size=4)
    trainer = make_trainer(TemperatureScaling(), num_sanity_val_steps=1)
    with pytest.raises(RuntimeError, match=r"several labels per image.*sigmoids"):
        trainer.fit(with_network(network()), train_loader(), data)


def test_weights_of_16_bits_get_a_power_of_two():
    module = module_class("lightning")().to(torch.bfloat16)
    twin = module_class("lightning")().to(torch.bfloat16)
    fitted(TemperatureScaling(), module=module, precision="bf16-true")
    fitted(module=twin, precision="bf16-true")
    ratio = (twin.net[1].weight.float() / module.net[1].weight.float()).detach()
    assert torch.equal(ratio, ratio[0, 0].expand_as(ratio))
    assert math.log2(float(ratio[0, 0])).is_integer()


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return F.interpolate(self.head(self.body(image)), size=image.shape[-2:], mode="bilinear")


def test_pixels_are_calibrated_and_ignored_ones_left_out():
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(3, (40, 8, 8), generator=generator)
    image = torch.randn(40, 1, 8, 8, generator=generator) + masks[:, None]
    masks[:, :2] = 255

    def fit(*tricks: Any) -> Any:
        module = with_network(Pixels())
        module.loss = lambda batch: F.cross_entropy(module.net(batch[0]), batch[1], ignore_index=255)
        data = DataLoader(TensorDataset(image, masks), batch_size=10)
        make_trainer(*tricks).fit(module, data, data)
        with torch.no_grad():
            return module.eval().net(image)

    logits, scaled = fit(), fit(TemperatureScaling())
    flat, labels = logits.permute(0, 2, 3, 1).flatten(0, 2), masks.flatten()
    temperature = fit_temperature(flat[labels < 3], labels[labels < 3])
    torch.testing.assert_close(scaled, logits / temperature, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (224, 224), (512, 768), (1, 5000)])
def test_recorded_pixels_are_spread_over_rows_and_columns(height, width):
    places = spread(height * width, width)
    assert len(places) <= 256
    assert int(places.max()) < height * width
    if height * width > 256:
        assert len(set((places % width).tolist())) > len(places) // 2


# ---------------------------------------------------------------------------------------------------------------------
# Data, and what is rejected


def test_one_class_leaves_the_weights_as_they_are():
    image, labels = images(8).tensors
    one = DataLoader(TensorDataset(image, torch.zeros_like(labels)), batch_size=4)
    module, plain = module_class("lightning")(), run().weights
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="leaves the weights as they are: all 8 samples have the class 0"):
        make_trainer(TemperatureScaling()).fit(module, train_loader(), one)
    assert all(torch.equal(value, plain[name]) for name, value in weights_of(module).items())


def test_logits_that_are_not_finite_leave_the_weights_as_they_are():
    with pytest.warns(UserWarning, match="not all finite"):
        fitted(TemperatureScaling(), module=with_network(network(), lambda logits: logits * math.nan))


def test_images_that_are_all_right_determine_no_temperature(tmp_path):
    module = with_network(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-6)
    image = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = module(image).argmax(1)
    data = DataLoader(TensorDataset(image, labels), batch_size=8)
    best, trick = lightning().callbacks.ModelCheckpoint(tmp_path), TemperatureScaling()
    make_trainer(trick, best, enable_checkpointing=True).fit(module, data, data)
    note = torch.load(trick.checkpoint, weights_only=True)["calibration"]["note"]
    assert "temperature 0.05 is an end of its range" in note


def test_run_without_validation_is_rejected():
    with pytest.raises(RuntimeError, match="needs logits of images that are not trained on"):
        run(TemperatureScaling(), limit_val_batches=0)


def test_validation_by_itself_changes_nothing():
    module = module_class("lightning")()
    before = weights_of(module)
    make_trainer(TemperatureScaling()).validate(module, eval_loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(module).items())
