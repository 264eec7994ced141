"""``lit-tricks fixres``: the convex problem, the pass that continues, the checkpoint, and what it rejects."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cli import FIT, QUIET, checkpoint, cli, done, workplace, write_image_folder
from helpers.fits import log_lines, make_trainer
from lightning import LightningModule
from scipy.optimize import minimize
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet18

from lit_tricks import Classifier
from lit_tricks.commands import fixres
from lit_tricks.commands.sizes import features as _features
from lit_tricks.commands.sizes import logistic as _logistic
from lit_tricks.commands.sizes.logistic import Classified, Linear, choose_weight_decay, evaluate, fit, moments
from lit_tricks.data import Digits, ImageFolder

command: Any = sys.modules["lit_tricks.commands.sizes.fixres_pass"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint of a tiny network on the digits."""
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT)
    return str(folder / "runs/tiny/v0/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


def state(path: str) -> dict[str, Tensor]:
    return dict(checkpoint(path)["state_dict"])


def features_of(path: str, size: int) -> tuple[Tensor, Tensor, Any]:
    """Return the classifier's inputs for the training images, their labels, and the classifier."""
    model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    found: list[Tensor] = []
    model.model.fc.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    data = Digits(batch_size=1257)
    data.setup("fit")
    samples = data.train_dataloader().dataset
    samples.transform = data.eval_transform_at(size)
    images, labels = zip(*(samples[i] for i in range(len(samples))), strict=True)
    with torch.no_grad():
        model(torch.stack(images))
    return found[0].double(), torch.tensor(labels), model.model.fc


# ---------------------------------------------------------------------------------------------------------------------
# The convex problem


def problem(offset: float = 0.0, samples: int = 400) -> Classified:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 6)  # ill-conditioned
    features = torch.randn(samples, 6, generator=generator) * scales + offset
    logits = (features - offset) / scales @ torch.randn(6, 3, generator=generator)
    labels = (logits + torch.randn(samples, 3, generator=generator)).argmax(1)
    return Classified(features, labels, torch.device("cpu"))


def by_scipy(data: Classified, weight_decay: float, bias: bool) -> tuple[np.ndarray[Any, Any], float]:
    """The solution in float64."""
    features, labels = data.features.double(), data.labels

    def objective(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        both = torch.tensor(flat).view(3, 7).requires_grad_()
        logits = features @ both[:, :6].T + both[:, 6] * bias
        loss = F.cross_entropy(logits, labels) + weight_decay / 2 * both[:, :6].square().sum()
        loss.backward()
        return float(loss.detach()), both.grad.flatten().numpy()

    found = minimize(objective, np.zeros(21), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    return found.x.reshape(3, 7), found.fun


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_is_that_in_float64(weight_decay, bias, monkeypatch):
    monkeypatch.setattr(_logistic, "CHUNK", 64)
    data = problem(offset=2.0)
    start = Linear(torch.randn(3, 6), torch.randn(3) if bias else None)
    found = fit(start, data, weight_decay, moments(data))
    expected, loss = by_scipy(data, weight_decay, bias)
    reached, right = evaluate(found, data)
    assert reached + weight_decay / 2 * float(found.weight.square().sum()) == pytest.approx(loss, abs=1e-4)
    if weight_decay > 1e-4:  # below that the loss is flat
        np.testing.assert_allclose(found.weight, expected[:, :6], rtol=0.02, atol=0.02)
    assert (found.bias is None) == (not bias)
    logits = F.linear(data.features, found.weight, found.bias)
    assert right == pytest.approx(float((logits.argmax(1) == data.labels).double().mean()))
    assert reached == pytest.approx(float(F.cross_entropy(logits, data.labels)), rel=1e-5)


def test_few_passes_do(monkeypatch):
    data = problem(offset=2.0)
    passes: list[int] = []
    chunks = Classified.chunks
    monkeypatch.setattr(Classified, "chunks", lambda self: (passes.append(1), chunks(self))[1])
    fit(Linear(torch.zeros(3, 6), torch.zeros(3)), data, 1e-4, moments(data))
    assert len(passes) < 60


def test_weight_decay_is_the_best_for_others():
    data = problem(samples=60)
    train, held_out = data[torch.arange(20)], data[torch.arange(20, 60)]
    start, candidates = Linear(torch.zeros(3, 6), torch.zeros(3)), (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
    chosen, found = choose_weight_decay(start, train, held_out, candidates, moments(train))
    losses = {wd: evaluate(fit(start, train, wd, moments(train)), held_out)[0] for wd in candidates}
    assert chosen == min(losses, key=lambda wd: losses[wd])
    assert chosen not in (candidates[0], candidates[-1])
    assert evaluate(found, held_out)[0] == pytest.approx(losses[chosen], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint


@pytest.mark.slow
def test_fixres_writes_checkpoint_of_lower_loss(trained):
    outcome = done("fixres", f"--ckpt={trained}", "--test-size=12", "-o", "x.ckpt")
    text = r"classifier model.fc, 16 features of 1257 images, weight decay .* cross entropy ([\d.]+) -> ([\d.]+), top-1"
    before, after = map(float, re.search(text, outcome.log).groups())
    assert after < before
    assert "x.ckpt: for test images of 12 pixels" in outcome.log
    assert sorted(path.name for path in Path().iterdir()) == ["tiny.yaml", "x.ckpt"]

    old, new = state(trained), state("x.ckpt")
    changed = {name for name, value in new.items() if not torch.equal(value, old[name])}
    norm = "model.layer4.1.bn2"
    assert changed == {f"{norm}.running_mean", f"{norm}.running_var", "model.fc.weight", "model.fc.bias"}
    assert not {"callbacks", "optimizer_states", "loops"} & checkpoint("x.ckpt").keys()

    test = done("test", "--ckpt_path=x.ckpt", *QUIET, "--trainer.logger=false").out
    model = Classifier.load_from_checkpoint("x.ckpt", map_location="cpu", weights_only=True)
    [expected] = make_trainer().test(model, Digits(eval_size=12), verbose=False)
    assert f" {expected['test/top1']:.2%} " in test


@pytest.mark.slow
def test_the_classifier_is_optimal_for_its_features(trained):
    done("fixres", f"--ckpt={trained}", "--test-size=12", "-o", "x.ckpt", "--weight_decay=0.001")
    features, labels, head = features_of("x.ckpt", 12)
    weight, bias = head.weight.detach().double().requires_grad_(), head.bias.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(features, weight, bias), labels) + 0.0005 * weight.square().sum()
    loss.backward()
    assert max(float(weight.grad.abs().max()), float(bias.grad.abs().max())) < 1e-4


@pytest.mark.slow
def test_the_statistics_are_those_at_the_new_size(trained):
    done("fixres", f"--ckpt={trained}", "--test-size=12", "-o", "x.ckpt", "--data.batch_size=1257")
    model = Classifier.load_from_checkpoint(trained, map_location="cpu", weights_only=True).eval().double()
    seen: list[Tensor] = []
    model.model.layer4[1].bn2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data = Digits(batch_size=1257)
    data.setup("fit")
    samples = data.train_dataloader().dataset
    samples.transform = data.eval_transform_at(12)
    with torch.no_grad():
        model(torch.stack([samples[i][0] for i in range(len(samples))]).double())
    found = state("x.ckpt")
    mean, variance = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), correction=0)
    torch.testing.assert_close(found["model.layer4.1.bn2.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["model.layer4.1.bn2.running_var"].double(), variance, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_statistics_or_none(trained):
    old = state(trained)
    for which in ("all", "none"):
        done("fixres", f"--ckpt={trained}", "--test-size=12", "-o", f"{which}.ckpt", f"--train_bn={which}")
        new = state(f"{which}.ckpt")
        changed = {name for name in new if "running" in name and not torch.equal(new[name], old[name])}
        assert changed == ({name for name in old if "running" in name} if which == "all" else set())


@pytest.mark.slow
def test_crop_ratio_and_size_are_settings_of_an_image_folder(tmp_path):
    root = write_image_folder(tmp_path / "images")
    words = ("--ckpt=test_resnet", "--data=ImageFolder", f"--data.root={root}", "--data.batch_size=3")
    torch.manual_seed(0)
    torch.save(Classifier("test_resnet", 3).model.state_dict(), "weights.pth")
    words += ("--data.image_size=32", "--data.num_workers=0", "--weights=weights.pth")
    done("fixres", *words, "--test-size=48", "--crop-ratio=0.9", "-o", "x.ckpt")
    settings = checkpoint("x.ckpt")["datamodule_hyper_parameters"]
    assert (settings["image_size"], settings["eval_size"], settings["resize_size"]) == (32, 48, round(32 / 0.9))
    assert settings["mean"] == pytest.approx([127.5] * 3)
    assert "top1" in done("validate", "--ckpt_path=x.ckpt", *QUIET, "--trainer.logger=false").out


class Vision(LightningModule):
    """A network of torchvision's."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "head", "norm"),
    [
        (resnet18, "network.fc", "network.layer4.1.bn2"),
        (mobilenet_v3_small, "network.classifier.3", "network.features.12.1"),
    ],
)
def test_networks_of_torchvision(build, head, norm, tmp_path):
    root = write_image_folder(tmp_path / "images")
    torch.manual_seed(0)
    module = Vision(build(num_classes=3))
    old = {name: value.clone() for name, value in module.state_dict().items()}
    data = ImageFolder(str(root), 32, batch_size=6, num_workers=0)
    fixres(module=module, test_size=48, output="x.ckpt", data=data)
    new = state("x.ckpt")
    changed = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert changed == {f"{norm}.running_mean", f"{norm}.running_var", f"{head}.weight", f"{head}.bias"}


# ---------------------------------------------------------------------------------------------------------------------
# The pass


class Stopped(_features.FeatureFile):
    """Interrupted after two batches."""

    def append(self, features: Tensor, labels: Tensor) -> None:
        if self.done >= 128:
            raise KeyboardInterrupt
        super().append(features, labels)


def stop(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(command, "FeatureFile", Stopped)
        assert cli("fixres", f"--ckpt={trained}", "--test-size=10", "-o", "x.ckpt").code == 130
    assert not Path("x.ckpt").exists()
    assert json.loads(Path("x.ckpt.features/state.json").read_text())["done"] == 128


@pytest.mark.slow
def test_an_interrupted_pass_goes_on_and_ends_the_same(trained, monkeypatch):
    stop(trained, monkeypatch)
    outcome = done("fixres", f"--ckpt={trained}", "--test-size=10", "-o", "x.ckpt")
    assert "x.ckpt.features: continues after 128 of 1257 images" in outcome.log
    outcome = done("fixres", f"--ckpt={trained}", "--test-size=10", "-o", "y.ckpt")
    assert "continues after" not in outcome.log
    first, second = state("x.ckpt"), state("y.ckpt")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not list(Path().glob("*.features"))


@pytest.mark.slow
def test_another_size_model_or_data_starts_anew(trained, monkeypatch):
    content = torch.load(trained, weights_only=True)
    content["state_dict"]["model.bn1.weight"] *= 1.01
    torch.save(content, "other.ckpt")
    for words in (
        (f"--ckpt={trained}", "--test-size=11"),
        (f"--ckpt={trained}", "--test-size=10", "--data.split_seed=1"),
        (f"--ckpt={trained}", "--test-size=10", "--num_samples=99"),
        ("--ckpt=other.ckpt", "--test-size=10"),
    ):
        stop(trained, monkeypatch)
        assert "continues after" not in done("fixres", *words, "-o", "x.ckpt").log
        Path("x.ckpt").unlink()


def test_files_are_known_by_size_and_time(tmp_path):
    root = write_image_folder(tmp_path / "images")
    data = ImageFolder(str(root), 8, batch_size=2, num_workers=0)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    before = _features.digest_of_data(dataset, lambda _: [])
    assert before == _features.digest_of_data(dataset, lambda _: [])
    path = root / "train" / "bee" / "3.jpg"
    path.write_bytes(path.read_bytes() + b"0")
    assert before != _features.digest_of_data(dataset, lambda _: [])


# ---------------------------------------------------------------------------------------------------------------------
# What it rejects


def rejected(message: str, *words: str) -> None:
    before = sorted(Path().iterdir())
    outcome = cli("fixres", *words)
    assert re.fullmatch(rf"(?s)lit-tricks: error: {message}\n", outcome.err), outcome
    assert outcome.code in (1, 2)
    assert sorted(Path().iterdir()) == before


@pytest.mark.slow
def test_fixres_wrong_arguments_explain_themselves(trained):
    good = (f"--ckpt={trained}", "--test-size=10", "-o", "x.ckpt")
    rejected("give --ckpt, .*", "--test-size=10", "-o", "x.ckpt")
    rejected("--ckpt no.ckpt: there is no such file. .*", "--ckpt=no.ckpt", "--test-size=10", "-o", "x.ckpt")
    rejected("--test_size=0 is below 1: .*", f"--ckpt={trained}", "--test-size=0", "-o", "x.ckpt")
    rejected("nothing of an image is left at 3 pixels .*", f"--ckpt={trained}", "--test-size=3", "-o", "x.ckpt")
    rejected("--crop_ratio 0.9: Digits does not support it. Leave it out.", *good, "--crop-ratio=0.9")
    rejected("--crop_ratio 9 is not above 0 .*", *good, "--crop-ratio=9")
    rejected("--num_samples=0 is below 1; .*", *good, "--num_samples=0")
    rejected("--weight_decay=0.0 must be above 0: .*", *good, "--weight_decay=0")
    rejected(".*has no BatchNorm 'bn9' with running statistics: give --train_bn none, .*", *good, "--batch_norm=bn9")
    rejected(
        "the classifier .* got model.layer4 .*for 'model.layer4': .*--classifier.*", *good, "--classifier=model.layer4"
    )
    rejected("--output no/x.ckpt lies in a folder that does not exist: make it first.", *good[:2], "-o", "no/x.ckpt")
    Path("x.ckpt").write_text("precious")
    rejected("--output x.ckpt exists: .* --overwrite .*", *good)
    done("fixres", *good, "--overwrite")
    assert state("x.ckpt")


def test_a_network_without_batchnorm(tmp_path):
    root = write_image_folder(tmp_path / "images")
    module = Vision(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )
    data = ImageFolder(str(root), 8, batch_size=6, num_workers=0)
    with pytest.raises(ValueError, match=r"Vision .*--train_bn none"):
        fixres(module=module, test_size=12, output="x.ckpt", data=data)
    with log_lines() as records:
        fixres(module=module, test_size=12, output="x.ckpt", data=data, train_bn="none")
    assert any("classifier network.4, 4 features of 12 images" in record.getMessage() for record in records)


def test_fixres_help_explains_arguments():
    assert "fixres" in done("--help").out
    text = done("fixres", "--help").out
    for word in ("--ckpt", "--test-size", "-o, --output", "--crop-ratio", "--train-bn", "Touvron"):
        assert word in text
