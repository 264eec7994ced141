"""The Classifier: its metrics against scikit-learn, its checkpoints from the file alone, its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from helpers.cli import FIT, TINY, done, workplace
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks import Classifier
from lit_tricks.models import create_model

SMALL = {"depth": 18, "width": 0.03125, "small_input": True}


def trainer(**kwargs: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "num_sanity_val_steps": 0}
    return Trainer(**(quiet | settings | kwargs))


def loader(inputs: Tensor, labels: Tensor, batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


def fit(run: Trainer, module: Classifier, batches: DataLoader[Any], **kwargs: Any) -> Trainer:
    """Validate on the training data: without any, Lightning warns."""
    run.fit(module, batches, batches, **kwargs)
    return run


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(count: int, classes: int) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(1))


def calibration_error(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Expected calibration error with 15 bins of equal width (Guo et al., 2017), by the definition."""
    confidence, right = scores.max(1), scores.argmax(1) == labels
    error = 0.0
    for lower in range(15):
        inside = (confidence > lower / 15) & (confidence <= (lower + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def reference(logits: Tensor, labels: Tensor) -> dict[str, float]:
    scores, truth = logits.double().softmax(1).numpy(), labels.numpy()
    classes = list(range(logits.shape[1]))
    found = {
        "loss": log_loss(truth, scores, labels=classes),
        "top1": accuracy_score(truth, scores.argmax(1)),
        "ece": calibration_error(scores, truth),
    }
    if len(classes) > 5:
        found["top5"] = top_k_accuracy_score(truth, scores, k=5, labels=classes)
    return found


class Flat(nn.Module):
    """One layer on flattened images.

    Args:
        inputs: values of an image.
        classes: number of logits.
    """

    def __init__(self, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


# Metrics


@pytest.mark.parametrize("classes", [2, 5, 6, 12])
@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_of_all_samples_with_a_ragged_last_batch(split: str, classes: int) -> None:
    module = Classifier(nn.Identity(), num_classes=classes)  # the "images" are the logits
    run = trainer()
    evaluate = run.validate if split == "val" else run.test
    for count in (203, 41):  # nothing is left over from the first ones
        logits, labels = 2 * noise(count, classes, seed=count), labels_of(count, classes)
        (found,) = evaluate(module, loader(logits, labels, 20), verbose=False)
        expected = {f"{split}/{name}": value for name, value in reference(logits, labels).items()}
        assert found == pytest.approx(expected, abs=1e-6)


def test_metrics_of_the_training(tmp_path: Path) -> None:
    images, labels = noise(203, 64), labels_of(203, 10)
    model = Flat()
    with torch.no_grad():
        expected = reference(model(images), labels)
    still = Classifier(model, num_classes=10, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    run = fit(trainer(max_epochs=2), still, loader(images, labels, 20))
    assert run.callback_metrics["train/loss_epoch"].item() == pytest.approx(expected["loss"], abs=1e-6)
    assert run.callback_metrics["train/top1"].item() == pytest.approx(expected["top1"], abs=1e-6)
    last = reference(model(images[200:]).detach(), labels[200:])["loss"]
    assert run.callback_metrics["train/loss_step"].item() == pytest.approx(last, abs=1e-6)


def test_predictions_are_probabilities() -> None:
    images = noise(7, 1, 8, 8)
    module = Classifier(Flat(), num_classes=10)
    expected = module.model(images).softmax(1)
    paths = [str(i) for i in range(7)]
    for batch in (images, (images, paths), [images, paths]):
        assert torch.equal(module.predict_step(batch), expected)
    batches = trainer().predict(module, loader(images, torch.zeros(7), 4))
    assert batches is not None
    torch.testing.assert_close(torch.cat(batches), expected)


# Training

OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Lars": lambda p: timm.optim.Lars(p, lr=5.0),
    "Lamb": lambda p: timm.optim.Lamb(p, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name: str) -> None:
    torch.manual_seed(0)
    images, labels = noise(64, 64), labels_of(64, 4)
    module = Classifier(Flat(classes=4), num_classes=4, optimizer=OPTIMIZERS[name])
    with torch.no_grad():
        before = nn.functional.cross_entropy(module(images), labels)
        fit(trainer(max_epochs=10), module, loader(images, labels, 16))
        after = nn.functional.cross_entropy(module.cpu()(images), labels)
    assert type(module.configure_optimizers()).__name__ == name
    assert after < 0.75 * before


def test_the_default_optimizer_is_that_of_the_paper() -> None:
    optimizer = Classifier(Flat(), num_classes=10).configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True, "dampening": 0}
    assert {name: optimizer.defaults[name] for name in numbers} == numbers
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_the_example_is_an_input() -> None:
    module = Classifier("resnet", num_classes=7, model_args=SMALL, input_size=(1, 16, 24))
    assert module.example_input_array is not None
    assert module.example_input_array.shape == (2, 1, 16, 24)
    assert module(module.example_input_array).shape == (2, 7)
    assert Classifier(Flat(), num_classes=10).example_input_array.shape == (2, 3, 224, 224)


def test_any_model_of_timm() -> None:
    module = Classifier("mobilenetv1_100", num_classes=3, model_args={"drop_rate": 0.5})
    assert module(noise(2, 3, 32, 32)).shape == (2, 3)
    assert module.model.drop_rate == 0.5


# Checkpoints


def saved(folder: Path, module: Classifier, images: Tensor, labels: Tensor) -> str:
    """Path of a checkpoint of the trained module."""
    run = fit(trainer(), module, loader(images, labels, 8))
    run.save_checkpoint(folder / "model.ckpt", weights_only=False)
    return str(folder / "model.ckpt")


def same(one: Classifier, other: Classifier, images: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.eval()(images), other.eval()(images))


def test_a_model_by_name_comes_back_from_the_file_alone(tmp_path: Path) -> None:
    images, labels = noise(16, 1, 8, 8), labels_of(16, 6)
    names = ["a", "b", "c", "d", "e", "f"]
    module = Classifier("resnet", 6, model_args=SMALL, class_names=names, input_size=(1, 8, 8))
    path = saved(tmp_path, module, images, labels)
    loaded = Classifier.load_from_checkpoint(path, weights_only=True)
    assert same(loaded, module, images)
    assert (loaded.num_classes, loaded.class_names, loaded.example_input_array.shape) == (6, names, (2, 1, 8, 8))
    assert type(loaded.configure_optimizers()) is torch.optim.SGD


def test_a_module_given_in_python_is_given_again(tmp_path: Path) -> None:
    images, labels = noise(16, 1, 8, 8), labels_of(16, 10)
    module = Classifier(Flat(), num_classes=10, optimizer=OPTIMIZERS["Adam"])
    path = saved(tmp_path, module, images, labels)
    loaded = Classifier.load_from_checkpoint(path, weights_only=True, model=Flat())
    assert same(loaded, module, images)
    again = Classifier(Flat(), num_classes=10, optimizer=OPTIMIZERS["Adam"])
    fit(trainer(max_epochs=2), again, loader(images, labels, 8), ckpt_path=path, weights_only=True)
    assert not same(again, module, images)


def test_a_module_of_a_configuration_comes_back_from_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workplace(tmp_path):
        model = "model: {class_path: mine.Net, init_args: {classes: 10}}"
        Path("tiny.yaml").write_text(TINY.replace("model_args: {depth: 18, width: 0.03125, small_input: true}", model))
        Path("mine.py").write_text("from test_classifier import Flat\n\n\nclass Net(Flat):\n    pass\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        done(*FIT, "--model.optimizer.lr=0.2")
        path = "runs/tiny/v0/checkpoints/last.ckpt"
        loaded = Classifier.load_from_checkpoint(path, weights_only=True)
        assert type(loaded.model).__name__ == "Net"
        state = torch.load(path, weights_only=True)["state_dict"]
        assert torch.equal(loaded.model.layer.weight, state["model.layer.weight"])
        assert (loaded.num_classes, loaded.class_names[9]) == (10, "9")
        assert loaded.configure_optimizers().defaults["lr"] == 0.2
        done("test", f"--ckpt_path={path}", "--trainer.enable_progress_bar=false")


def test_a_model_of_the_command_line_comes_back_from_the_file_alone(tmp_path: Path) -> None:
    with workplace(tmp_path):
        done(*FIT, "--model.optimizer=AdamW", "--model.optimizer.lr=0.003")
        path = "runs/tiny/v0/checkpoints/best.ckpt"
        loaded = Classifier.load_from_checkpoint(path, weights_only=True)
    state = {f"model.{name}": value for name, value in loaded.model.state_dict().items()}
    torch.testing.assert_close(state, torch.load(tmp_path / path, weights_only=True)["state_dict"], rtol=0, atol=0)
    optimizer = loaded.configure_optimizers()
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 0.003)
    assert loaded(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_weights_to_start_from_are_not_looked_for_on_load(tmp_path: Path) -> None:
    images, labels = noise(16, 1, 8, 8), labels_of(16, 6)
    source = tmp_path / "start.pth"
    torch.manual_seed(7)
    start = create_model("resnet", 6, in_chans=1, **SMALL)  # type: ignore[arg-type]
    torch.save(start.state_dict(), source)
    module = Classifier("resnet", 6, model_args=SMALL, weights=str(source), input_size=(1, 8, 8))
    for name, value in start.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value)
    path = saved(tmp_path, module, images, labels)
    source.unlink()
    loaded = Classifier.load_from_checkpoint(path, weights_only=True)
    assert same(loaded, module, images)
    # a checkpoint is such a file too
    other = Classifier("resnet", 6, model_args=SMALL, weights=path, input_size=(1, 8, 8))
    assert same(other, module, images)


def test_the_command_line_starts_from_weights(tmp_path: Path) -> None:
    with workplace(tmp_path):
        done(*FIT)
        path = "runs/tiny/v0/checkpoints/last.ckpt"
        still = ("--model.optimizer.lr=0", "--model.optimizer.weight_decay=0")
        done(*FIT, f"--model.weights={path}", *still)
        one, other = (torch.load(p, weights_only=True)["state_dict"] for p in (path, path.replace("v0", "v1")))
        Path(path).unlink()
        loaded = Classifier.load_from_checkpoint(path.replace("v0", "v1"), weights_only=True)
    assert torch.equal(one["model.fc.weight"], other["model.fc.weight"])
    assert torch.equal(loaded.model.fc.weight, other["model.fc.weight"])


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "class_names has 2 names"),
        ({"model": Flat(), "model_args": {"depth": 18}}, r"model_args=.* are for a model given by name; Flat is built"),
        (
            {"model": "resnet5O"},
            "name='resnet5O' is neither 'resnet', 'small_vgg' nor a model of timm; did you mean 'resnet50'",
        ),
        ({"model_args": {"depht": 18}}, "'depht' is no argument of model 'resnet'; did you mean 'depth'"),
        ({"model": "vgg11", "model_args": {"depht": 18}}, "'depht' is no argument of model 'vgg11'"),
        ({"model_args": {"width": 0.3}}, "width=0.3 would give the stem 9.6 channels"),
    ],
)
def test_arguments_that_are_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(**arguments)


@pytest.mark.parametrize("shape", [(4, 7), (4, 10, 1), (4,)])
def test_logits_of_another_shape(shape: tuple[int, ...]) -> None:
    module = Classifier(nn.Identity(), num_classes=10)
    for batch in ((torch.zeros(shape), torch.zeros(4, dtype=torch.int64)),):
        with pytest.raises(ValueError, match=r"Identity .*\(4.*num_classes=10"):
            module.training_step(batch, 0)


def test_classes_other_than_those_of_the_data(tmp_path: Path) -> None:
    from lit_tricks.data import Digits

    module, data = Classifier(Flat(classes=7), num_classes=7), Digits()
    for stage in ("fit", "validate", "test"):
        with pytest.raises(ValueError, match=r"num_classes=7 .*10 classes"):
            getattr(trainer(), stage)(module, data)
    assert not list(tmp_path.iterdir())


def test_labels_out_of_range_end_the_run() -> None:
    module = Classifier(Flat(classes=3), num_classes=3)
    with pytest.raises((IndexError, RuntimeError, ValueError), match=r"[Tt]arget|label"):
        fit(trainer(), module, loader(noise(8, 64), labels_of(8, 10), 4))


def test_a_resumed_optimizer_of_another_kind(tmp_path: Path) -> None:
    images, labels = noise(16, 1, 8, 8), labels_of(16, 10)
    path = saved(tmp_path, Classifier(Flat(), num_classes=10), images, labels)
    other = Classifier(Flat(), num_classes=10, optimizer=OPTIMIZERS["Adam"])
    with pytest.raises(ValueError, match=r"state of SGD.*Adam"):
        fit(trainer(max_epochs=2), other, loader(images, labels, 8), ckpt_path=path, weights_only=True)
    fit(trainer(), other, loader(images, labels, 8))  # from the beginning it may be anything
