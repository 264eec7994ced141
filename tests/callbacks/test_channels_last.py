"""ChannelsLast: which tensors change their order and when, equal numbers, and a restored module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fits import differences, log_lines, make_trainer, run, weights_of
from helpers.losses import loader_of
from helpers.modules import eval_loader, module_class
from torch import Tensor, nn

from lit_tricks.callbacks import ChannelsLast, MixUp

NHWC = torch.channels_last


def is_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=NHWC) and not tensor.is_contiguous()


class Color(module_class("lightning")):
    """Classifies images with three channels, so that their order in memory shows."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(quiet=True, **kwargs)
        torch.manual_seed(0)
        self.net = self.build()
        self.example_input_array = None
        self.images: list[bool] = []
        self.features: list[bool] = []
        self.filters: list[bool] = []

    def build(self) -> nn.Module:
        conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2))
        return nn.Sequential(conv, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def forward(self, image: Tensor) -> Tensor:
        self.images.append(is_last(image))
        features = self.net[0](image)
        self.features.append(is_last(features))
        self.filters.append(is_last(self.net[0][3].weight))
        return self.net[1](features)


def batches() -> Any:
    generator = torch.Generator().manual_seed(1)
    image, label = torch.randn(4, 4, 3, 8, 8, generator=generator), torch.randint(3, (4, 4), generator=generator)
    return loader_of(*([x, y] for x, y in zip(image, label, strict=True)))


def fit(module: Any, *tricks: Any, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    make_trainer(*tricks, **({"max_epochs": 2} | kwargs)).fit(module, batches(), batches())
    return weights_of(module)


def test_images_filters_and_features_are_laid_out():
    module = Color()
    found = fit(module, ChannelsLast())
    training, validation = [True] * 4, [False] * 4
    assert module.images == 2 * (training + validation)
    assert set(module.filters) == set(module.features) == {True}
    assert not any(is_last(weight) for weight in module.parameters())
    assert not differences({name: w.is_contiguous() for name, w in found.items()}, dict.fromkeys(found, True))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_outputs_in_channels_last_are_equal(precision):
    found, expected = (fit(Color(), *tricks, precision=precision) for tricks in ([ChannelsLast()], []))
    tolerance = 1e-12 if precision == "64-true" else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_optimizer_sees_filters_as_they_are_trained():
    class Looking(Color):
        def configure_optimizers(self) -> Any:
            assert is_last(self.net[0][0].weight)
            return super().configure_optimizers()

    module = Looking()
    trainer = make_trainer(ChannelsLast(), max_epochs=1)
    trainer.fit(module, batches(), batches())
    state = trainer.optimizers[0].state
    assert is_last(state[module.net[0][0].weight]["momentum_buffer"])


def test_checkpoint_is_that_of_any_run(tmp_path):
    module = Color()
    saved: dict[str, Any] = {}

    class Saving(MixUp):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)

    fit(module, ChannelsLast(), Saving())
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    other = Color()
    other.load_state_dict(saved)
    assert not differences(weights_of(other), weights_of(module))
    assert other.net[0][0].weight.is_contiguous()


def test_layers_that_configure_model_builds():
    class Late(Color):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = self.build()

    module = Late()
    fit(module, ChannelsLast(), max_epochs=1)
    assert set(module.filters) == {True}
    assert not any(is_last(weight) for weight in module.parameters())


@pytest.mark.parametrize("order", [1, -1])
def test_after_mixing_in_any_order(order):
    module = Color()
    fit(module, *[MixUp(alpha=1.0), ChannelsLast()][::order], max_epochs=1, limit_val_batches=0)
    assert module.images == [True] * 4


def test_weights_false_converts_images_only():
    module = Color()
    with log_lines() as records:
        fit(module, ChannelsLast(weights=False), max_epochs=1, limit_val_batches=0)
    assert module.images == [True] * 4
    assert set(module.filters) == {False}
    assert set(module.features) == {True}
    assert records[0].getMessage() == "ChannelsLast: images of training batches, and 0 of 2 filters"


def test_tensors_of_other_kinds_stay():
    seen = {}

    class Looking(Color):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.update({name: value.stride() for name, value in batch.items()})
            return self(batch["image"]).sum()

    batch = {
        "image": torch.zeros(4, 3, 8, 8),
        "bytes": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "mask": torch.zeros(4, 3, 8, 8, dtype=torch.long),
        "video": torch.zeros(4, 3, 2, 8, 8),
        "vector": torch.zeros(4, 3),
    }
    trainer = make_trainer(ChannelsLast(), max_epochs=1, limit_val_batches=0)
    trainer.fit(Looking(), loader_of(batch), batches())
    changed = {name for name, value in batch.items() if seen[name] != value.stride()}
    assert changed == {"image", "bytes"}
    assert seen["image"] == (192, 1, 24, 3)


def test_no_convolution_is_an_error():
    class Flat(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    with pytest.raises(RuntimeError, match=r"ChannelsLast has no effect: .*Flat"):
        make_trainer(ChannelsLast()).fit(Flat(), eval_loader(), eval_loader())


def test_a_parametrized_convolution_keeps_its_weight():
    class Normed(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__(quiet=True)
            nn.utils.parametrizations.weight_norm(self.net[0][0])
            self.net[0].append(nn.Unflatten(1, (4, 2, 2)))
            self.net[0].extend([nn.Conv2d(4, 4, 1), nn.Flatten()])

    with log_lines() as records:
        make_trainer(ChannelsLast(), max_epochs=1).fit(Normed(), eval_loader(), eval_loader())
    assert records[0].getMessage().endswith("and 1 of 1 filters")


def test_a_copy_of_a_used_one_holds_no_weights():
    trick = ChannelsLast()
    run(trick, max_epochs=1)
    assert trick._laid_out == ()
