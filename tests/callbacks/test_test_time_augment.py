"""TestTimeAugment: the views, the logits of their mean, and where it acts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.fits import log_lines, make_trainer
from helpers.modules import lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lit_tricks import EMA, PreciseBN, TestTimeAugment
from lit_tricks.callbacks.test_time_augment import mean_logits, tta_views


def images(number: int = 2, side: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(1)) * 255).to(dtype)


@pytest.mark.parametrize(
    ("kwargs", "count"),
    [
        ({"flip": False, "crops": 5, "scales": [1.0]}, 5),
        ({"flip": True, "crops": 5, "scales": [1.0]}, 10),
        ({"flip": True, "crops": 10, "scales": [1.0]}, 10),
        ({"flip": True, "crops": 1, "scales": [0.5, 1.0, 1.5]}, 6),
    ],
)
def test_views_are_those_of_torchvision(kwargs, count):
    found = list(tta_views(images(), **kwargs))
    expected = []
    for scale in kwargs["scales"]:
        side = round(16 * scale)
        scaled = v2.functional.resize(images(), [side, side], antialias=True) if scale != 1 else images()
        crops = [scaled] if kwargs["crops"] == 1 else v2.functional.five_crop(scaled, [14, 14])
        expected += [flipped for crop in crops for flipped in ([crop, crop.flip(-1)] if kwargs["flip"] else [crop])]
    if kwargs["crops"] == 10:
        ten = v2.functional.ten_crop(images(), [14, 14])
        assert all(any(torch.equal(crop, view) for view in found) for crop in ten)
    assert len(found) == len(expected) == count
    key = lambda view: float(view[0, 0, 0, 0] + 1000 * view[0, 1, 2, 3])  # noqa: E731
    for view, other in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        torch.testing.assert_close(view, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_logits_are_those_of_the_mean_of_probabilities(activation, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = [(8 * torch.randn(5, 4, generator=generator)).to(dtype) for _ in range(6)]
    activate = (lambda x: x.softmax(-1)) if activation == "softmax" else torch.sigmoid
    mean = torch.stack([activate(x.double()) for x in logits]).mean(0)
    found = mean_logits(logits, activation)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(activate(found.double()), mean, rtol=1e-5, atol=1e-7)
    labels = torch.tensor([0, 1, 2, 3, 0])
    if activation == "softmax":
        loss = -mean[range(5), labels].log().mean()
        torch.testing.assert_close(F.cross_entropy(found.double(), labels), loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.argmax(-1), mean.argmax(-1))
    huge = mean_logits([torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])], "softmax")
    torch.testing.assert_close(huge.softmax(-1), torch.full((1, 2), 0.5))


class Net(lightning().LightningModule):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, classes, 5),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.seen: dict[str, list[Tensor]] = {"train": [], "sanity": [], "val": [], "test": [], "predict": []}

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.seen["train"].append(logits.detach())
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["sanity" if self.trainer.sanity_checking else "val"].append(self(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(self(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(-1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    return DataLoader([(image / 255, i % 3) for i, image in enumerate(images(4))], batch_size=2)


def expected(module: Net, **kwargs: Any) -> list[Tensor]:
    """Mean probabilities, by hand."""
    module.eval()
    with torch.no_grad():
        return [
            torch.stack([module.net(view).softmax(-1) for view in tta_views(batch, **kwargs)]).mean(0)
            for batch, _ in loader()
        ]


@pytest.mark.parametrize("layer", [None, "net"])
def test_evaluation_is_by_the_mean_and_training_as_ever(layer):
    module, kwargs = Net(), {"flip": True, "crops": 5, "scales": [1.0, 1.25]}
    trainer = make_trainer(TestTimeAugment(**kwargs, layer=layer), num_sanity_val_steps=2, max_epochs=1)
    trainer.fit(module, loader(), loader())
    plain = Net()
    make_trainer(num_sanity_val_steps=2, max_epochs=1).fit(plain, loader(), loader())
    for stage in ("train", "sanity"):
        assert all(map(torch.equal, module.seen[stage], plain.seen[stage])), stage
    trainer.validate(module, loader(), verbose=False)
    with log_lines() as records:
        trainer.test(module, loader(), verbose=False)
    assert [record.getMessage() for record in records] == ["TestTimeAugment: 20 views per image, in the test"]
    predicted = trainer.predict(module, loader())
    reference = expected(module, **kwargs)
    found = {"fit": module.seen["val"][:2], "validate": module.seen["val"][2:], "test": module.seen["test"]}
    for stage, logits in found.items():
        for mean, each in zip(reference, logits, strict=True):
            torch.testing.assert_close(each.exp(), mean, msg=stage)
    torch.testing.assert_close(predicted, reference)
    assert "forward" not in vars(module)
    assert "forward" not in vars(module.net)


def test_averaged_weights_and_precise_statistics_are_what_is_evaluated():
    module = Net()
    trainer = make_trainer(TestTimeAugment(), EMA(0.5), PreciseBN(4), max_epochs=1)
    trainer.fit(module, loader(), loader())
    means = expected(module, flip=True, crops=1, scales=[1.0])
    for mean, logits in zip(means, module.seen["val"], strict=True):
        torch.testing.assert_close(logits.exp(), mean)


def test_works_for_a_single_logit_and_several_labels():
    module, trainer = Net(classes=1), make_trainer(TestTimeAugment(activation="sigmoid"))
    trainer.test(module, loader(), verbose=False)
    module.eval()
    batch = next(iter(loader()))[0]
    with torch.no_grad():
        mean = (module.net(batch).sigmoid() + module.net(batch.flip(-1)).sigmoid()) / 2
    torch.testing.assert_close(module.seen["test"][0].sigmoid(), mean)


# ---------------------------------------------------------------------------------------------------------------------
# Misuse


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"crops": 3}, "crops=3"),
        ({"scales": []}, r"scales=\[\]"),
        ({"scales": 1.0}, "scales=1.0"),
        ({"scales": [1.0, 0]}, "scales=.+"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"flip": False}, "flip=False, crops=1"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TestTimeAugment(**kwargs)


def test_rejects_what_it_can_not_average() -> None:
    def error(trick: TestTimeAugment, module: Any = None, data: Any = None) -> str:
        with pytest.raises(RuntimeError) as caught:
            make_trainer(trick).test(module or Net(), data or loader(), verbose=False)
        return str(caught.value)

    class Dense(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.net[0](images)

    class Vector(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[1])

    assert "layer='head'): Net has no such module. Its parts are net." in error(TestTimeAugment(layer="head"))
    assert "gives a single logit: give activation='sigmoid'" in error(TestTimeAugment(), Net(classes=1))
    assert "gives float32 (2, 4, 14, 14): name the module that does" in error(TestTimeAugment(), Dense())
    assert "makes views of images (N, C, H, W), and `forward` gets none" in error(TestTimeAugment(), Vector())
    fixed = Net()
    fixed.net = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3
    )
    make_trainer(TestTimeAugment()).test(fixed, loader(), verbose=False)
    assert "`forward` failed for a view of 20 x 20 pixels" in error(TestTimeAugment(scales=[1.25]), fixed)


def test_warns_if_forward_is_not_called():
    class Inner(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    with pytest.warns(UserWarning, match=r"forward of Inner .*TestTimeAugment\(layer=\"model\"\)"):
        make_trainer(TestTimeAugment()).test(Inner(), loader(), verbose=False)
