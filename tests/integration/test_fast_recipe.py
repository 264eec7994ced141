"""recipes/cifar10_fast in a Trainer against a loop of torch with the same batches and weights, in float64."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from helpers.fits import make_trainer
from helpers.modules import lightning
from torch import Tensor, nn

from lit_tricks import Classifier, callbacks
from lit_tricks.data import CIFAR10
from lit_tricks.utils.config_files import CONFIGS

STEPS = 4  # rounding errors grow by a factor of about five per step


class Recorder(lightning().Callback):  # type: ignore[misc,name-defined]
    """Keeps the batches, the losses, and the network before the first step."""

    def __init__(self) -> None:
        self.net: Any = None
        self.batches: list[list[Tensor]] = []
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.net is None:
            self.net = copy.deepcopy(pl_module.model)
        self.batches.append([part.clone().as_subclass(Tensor) for part in batch])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())


def newton_schulz(matrix: Tensor) -> Tensor:
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def loop(net: Any, batches: list[list[Tensor]], tricks: dict[str, Any], sgd: dict[str, Any]) -> list[Tensor]:
    """Train as https://arxiv.org/abs/2404.00498 and https://kellerjordan.github.io/posts/muon describe it."""
    muon, smoothing = tricks["Muon"], tricks["LabelSmoothing"]["smoothing"]
    stages = (net.layer1, net.layer2, net.layer3)
    filters = [stage.get_submodule(name).weight for stage in stages for name in ("conv1", "conv2")]
    biases = [stage.get_submodule(name).bias for stage in stages for name in ("norm1", "norm2")]
    rest = torch.optim.SGD([*biases, net.fc.weight], **sgd)
    momenta = [torch.zeros_like(weight) for weight in filters]
    losses = []
    for step, (images, labels) in enumerate(batches):
        left = 1 - step / STEPS
        net.zero_grad()
        losses.append(F.cross_entropy(net(images), labels, label_smoothing=smoothing))
        losses[-1].backward()
        rest.param_groups[0]["lr"] = sgd["lr"] * left
        rest.step()
        lr = muon["lr"] * left
        with torch.no_grad():
            for weight, momentum in zip(filters, momenta, strict=True):
                momentum.mul_(muon["momentum"]).add_(weight.grad)
                update = newton_schulz((weight.grad + muon["momentum"] * momentum).flatten(1))
                weight.mul_(1 - lr * muon["weight_decay"]).sub_(lr * update.view_as(weight))
    return losses


def test_steps_are_those_of_a_loop(cifar: Path) -> None:
    config = yaml.safe_load((CONFIGS / "recipes" / "cifar10_fast.yaml").read_text())
    tricks = {trick["class_path"]: trick.get("init_args", {}) for trick in config["trainer"]["callbacks"]}
    model, data = config["model"]["init_args"], config["data"]["init_args"] | {"root": str(cifar), "batch_size": 8}
    sgd = model["optimizer"]["init_args"]
    torch.manual_seed(0)
    arguments = model["model_args"] | {"width": 1 / 32}
    make = partial(torch.optim.SGD, **sgd)
    module = Classifier("small_vgg", 10, model_args=arguments, optimizer=make, input_size=(3, 32, 32))
    found = [getattr(callbacks, name)(**init_args) for name, init_args in tricks.items()]
    recorder = Recorder()
    trainer = make_trainer(*found, recorder, max_epochs=-1, max_steps=STEPS, precision="64-true", limit_val_batches=0)
    trainer.fit(module, datamodule=CIFAR10(**data, download=False))
    net: nn.Module = recorder.net
    stem = recorder.net.stem.weight.clone()
    losses = loop(net, recorder.batches, tricks, sgd)
    torch.testing.assert_close(torch.stack(recorder.losses), torch.stack(losses), rtol=1e-7, atol=0)
    torch.testing.assert_close(module.model.state_dict(), net.state_dict(), rtol=1e-5, atol=1e-6)
    assert torch.equal(module.model.get_parameter("stem.weight"), stem)
