"""FixRes: what is trained, at which size, and that all else stays as it is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.cli import FIT, QUIET, checkpoint, done, results, workplace
from helpers.fits import Saver, differences, make_trainer, weights_of
from helpers.modules import lightning
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision import models, transforms
from torchvision.transforms import v2

from lit_tricks import (
    EMA,
    DropPath,
    FixRes,
    LinearScaling,
    NoBiasDecay,
    ProgressiveResizing,
    WarmupStep,
    XavierInit,
    ZeroGamma,
)
from lit_tricks.data import Digits
from lit_tricks.models import resnet
from lit_tricks.utils.dataset_transforms import at_size, changed
from lit_tricks.utils.modules import find_classifier, find_norms

pytestmark = pytest.mark.filterwarnings("ignore:FixRes fine-tunes a trained network")


class Photos(Dataset[Any]):
    """Random pictures of 40 x 40 pixels, through a transform."""

    def __init__(self, transform: Any, size: int = 12) -> None:
        self.transform, self.size = transform, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return self.transform(Image.fromarray(pixels.numpy())), index % 3


def to_tensor(*steps: Any) -> Any:
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


TRAIN = to_tensor(v2.RandomResizedCrop(16))
TEST = to_tensor(v2.Resize(20), v2.CenterCrop(16))


class Net(lightning().LightningModule):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        )
        self.head = nn.Linear(6, 3)
        self.seen: list[tuple[str, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(("train", batch[0]))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("sanity" if self.trainer.sanity_checking else "val", batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(("test", batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)


def loaders(**kwargs: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    train = DataLoader(Subset(Photos(TRAIN), range(8)), batch_size=4, **kwargs)
    return train, DataLoader(Photos(TEST), batch_size=4, **kwargs)


@pytest.mark.parametrize("workers", [0, 1])
def test_all_batches_come_through_the_test_transform_at_the_size(workers):
    train, val = loaders(num_workers=workers, persistent_workers=bool(workers))
    before = train.dataset, val.dataset
    module, trainer = Net(), make_trainer(FixRes(24), max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, train, val)
    expected = to_tensor(v2.Resize(30), v2.CenterCrop(24))
    batch = torch.stack([Photos(expected)[i][0] for i in range(4)])
    assert [stage for stage, _ in module.seen] == ["sanity", *2 * ["train", "train", "val", "val", "val"]]
    for i in (0, 1, 3, 6, 8):
        assert torch.equal(module.seen[i][1], batch), i
    assert (train.dataset, val.dataset) == before
    assert next(iter(train))[0].shape == (4, 3, 16, 16)  # also of workers that live on


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def moved_by(trick: FixRes, module: Any = None, **kwargs: Any) -> set[str]:
    """Names of what a fit moved."""
    module = module or Net()
    before = weights_of(module)
    make_trainer(trick, **kwargs).fit(module, *loaders())
    return {name for name, value in weights_of(module).items() if not torch.equal(value, before[name])}


def test_only_the_classifier_and_the_last_norm_move():
    module = Net()
    norm = {f"body.4.{name}" for name in ("weight", "bias", *STATISTICS)}
    assert moved_by(FixRes(24), module) == {"head.weight", "head.bias"} | norm
    assert all(param.requires_grad for param in module.parameters())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize(
    ("kwargs", "moved"),
    [
        ({"train_affine": False}, {f"body.4.{name}" for name in STATISTICS}),
        ({"train_bn": "none"}, set()),
        ({"batch_norm": "body.1", "train_affine": False}, {f"body.1.{name}" for name in STATISTICS}),
        (
            {"train_bn": "all"},
            {f"body.{i}.{name}" for i in (1, 4) for name in (*STATISTICS, "weight", "bias")},
        ),
    ],
)
def test_trained_parts_follow_the_arguments(kwargs, moved):
    assert moved_by(FixRes(24, **kwargs)) == {"head.weight", "head.bias"} | moved


def test_the_rest_stays_in_evaluation_mode_whoever_calls_train():
    class Trains(Net):
        def on_train_epoch_start(self) -> None:
            self.train()

        def on_validation_model_train(self) -> None:
            self.train()

    assert moved_by(FixRes(24), module=Trains(), val_check_interval=1) == moved_by(FixRes(24))

    class TrainsInTheStep(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.body.train()
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="TrainsInTheStep"):
        make_trainer(FixRes(24)).fit(TrainsInTheStep(), *loaders())


@pytest.mark.filterwarnings("ignore:Found .+ in eval mode at the start of training")
def test_a_module_that_was_handed_over_in_evaluation_mode_is_trained_and_goes_back_to_it():
    module = Net().eval()
    assert moved_by(FixRes(24), module=module) == moved_by(FixRes(24))
    assert not any(part.training for part in module.modules())


def test_a_resumed_fit_is_the_same_with_an_average(tmp_path):
    def fit(*callbacks: Any, **kwargs: Any) -> dict[str, Tensor]:
        module = Net()
        make_trainer(FixRes(24, transform="test"), EMA(0.9), *callbacks).fit(module, *loaders(), **kwargs)
        return weights_of(module)

    saver = Saver(tmp_path, steps=[2])
    full = fit(saver)
    assert not differences(fit(ckpt_path=saver.paths[-1], weights_only=True), full)


def test_flips_are_for_half_of_the_training_images_only():
    module, trainer = Net(), make_trainer(FixRes(24, transform="test+flip"), max_epochs=8)
    trainer.fit(module, *loaders())
    plain = torch.stack([Photos(to_tensor(v2.Resize(30), v2.CenterCrop(24)))[i][0] for i in range(12)])
    flips = [
        bool(torch.equal(image, plain[4 * (i % 2) + j].flip(-1)))
        for i, batch in enumerate(images for stage, images in module.seen if stage == "train")
        for j, image in enumerate(batch)
    ]
    assert len(flips) == 64
    assert 16 < sum(flips) < 48
    for i, batch in enumerate(images for stage, images in module.seen if stage == "val"):
        assert torch.equal(batch, plain[4 * (i % 3) : 4 * (i % 3) + 4])


def test_a_function_takes_the_place_of_all_transforms():
    def small(image: Any) -> Tensor:
        return v2.functional.to_image(image.resize((10, 10))).float()

    module = Net()
    make_trainer(FixRes(10, transform=small), max_epochs=1).fit(module, *loaders())
    assert {tuple(images.shape[1:]) for _, images in module.seen} == {(3, 10, 10)}


def test_the_test_is_at_the_size_and_loaders_get_their_data_back():
    module, trainer = Net(), make_trainer(FixRes(24))
    _, loader = loaders()
    trainer.test(module, loader, verbose=False)
    assert {tuple(images.shape[1:]) for _, images in module.seen} == {(3, 24, 24)}
    assert loader.dataset.transform is TEST


def test_a_datamodule_gives_its_transform_and_checkpoints_note_the_size(tmp_path):
    class Gray(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[0], self.head = nn.Conv2d(1, 4, 3), nn.Linear(6, 10)

    data, module, trainer = Digits(batch_size=400), Gray(), make_trainer(FixRes(12), max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert {tuple(images.shape[1:]) for _, images in module.seen} == {(1, 12, 12)}
    for i, weights_only in enumerate((False, True)):
        trainer.save_checkpoint(tmp_path / f"{i}.ckpt", weights_only=weights_only)
    trainer = make_trainer(FixRes(12), Saver(tmp_path, steps=[3]), max_epochs=1)
    trainer.fit(Gray(), datamodule=data)
    for path in (tmp_path / "0.ckpt", *tmp_path.glob("3-*.ckpt")):
        settings = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
        assert settings["eval_size"] == 12
        assert next(iter(Digits(**settings).val_dataloader()))[0].shape[2:] == (12, 12)
    assert data.hparams["eval_size"] is None


RATES = {
    "alone": ([], 0.008),
    "LinearScaling": ([LinearScaling(8)], 0.004),
    "WarmupStep": ([WarmupStep([2], warmup_epochs=0)], 0.008),
    "NoBiasDecay": ([NoBiasDecay()], 0.008),
}


@pytest.mark.parametrize("name", RATES)
def test_the_rate_is_set_before_others_scale_or_schedule_it(name):
    others, rate = RATES[name]
    for callbacks in ([FixRes(24), *others], [*others, FixRes(24)]):
        trainer = make_trainer(*callbacks, max_epochs=1)
        trainer.fit(Net(), *loaders())
        assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {rate}
    trainer = make_trainer(FixRes(24, lr=None), max_epochs=1)
    trainer.fit(Net(), *loaders())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=9),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=0.5),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_a_scheduler_that_ignores_the_rate_is_rejected(scheduler):
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [scheduler(optimizer)]

    with pytest.raises(RuntimeError, match=r"FixRes\(lr=0.008\): a scheduler"):
        make_trainer(FixRes(24), max_epochs=1).fit(Scheduled(), *loaders())
    make_trainer(FixRes(24, lr=None), max_epochs=1).fit(Scheduled(), *loaders())


def test_tricks_for_a_run_from_scratch_leave_trained_weights_alone():
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    make_trainer(FixRes(24), XavierInit(), ZeroGamma(layers=["body.4"]), max_epochs=1).fit(module, *loaders())
    assert torch.equal(module.body[0].weight, before["body.0.weight"])
    assert module.body[4].weight.gt(0.9).all()


# ---------------------------------------------------------------------------------------------------------------------
# Where networks end

ENDS = {
    "resnet, ours": (lambda: resnet(18, small_input=True, width=1 / 8), "fc", "layer4.1.bn2"),
    "timm test_resnet": (lambda: timm.create_model("test_resnet"), "fc", "layer4.0.bn2"),
    "timm efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), "classifier", "bn2"),
    "timm mobilenetv3_small_050": (
        lambda: timm.create_model("mobilenetv3_small_050"),
        "classifier",
        "blocks.5.0.bn1",
    ),
    "timm densenet121": (lambda: timm.create_model("densenet121"), "classifier", "features.norm5"),
    "timm resnetv2_18": (lambda: timm.create_model("resnetv2_18"), "head.fc", "norm"),
    "resnet18": (models.resnet18, "fc", "layer4.1.bn2"),
    "efficientnet_b0": (models.efficientnet_b0, "classifier.1", "features.8.1"),
    "mobilenet_v2": (models.mobilenet_v2, "classifier.1", "features.18.1"),
    "densenet121": (models.densenet121, "classifier", "features.norm5"),
    "regnet_y_400mf": (models.regnet_y_400mf, "fc", "trunk_output.block4.block4-5.f.c.1"),
    "googlenet": (lambda: models.googlenet(init_weights=False), "fc", "inception5b.branch4.1.bn"),
    "vgg11_bn": (models.vgg11_bn, "classifier.6", "features.26"),
    "squeezenet1_1": (models.squeezenet1_1, "classifier.1", None),
    "convnext_tiny": (models.convnext_tiny, "classifier.2", None),
    "vit_b_32": (models.vit_b_32, "heads.head", None),
}


@pytest.mark.parametrize("name", ENDS)
def test_finds_where_a_network_ends(name):
    make, classifier, norm = ENDS[name]
    with torch.device("cpu" if name == "regnet_y_400mf" else "meta"):  # it draws numbers by copying them
        network = make()
    holder = nn.ModuleDict({"model": network})
    assert list(find_classifier(holder)) == [f"model.{classifier}"]
    if norm:
        assert list(find_norms(holder, "last")) == [f"model.{norm}"]
    else:
        with pytest.raises(RuntimeError, match=r"FixRes\(train_bn=\"none\"\)"):
            find_norms(holder, "last")


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def sizes_in(transform: Any) -> tuple[Any, ...]:
    steps = getattr(transform, "transforms", None)
    return tuple(size for step in steps for size in sizes_in(step)) if steps else (transform.size,)


class OwnResize(v2.Resize):
    """A step that a user has derived."""


STEPS = {
    "torchvision v1": (transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)]), (329, (288, 288))),
    "torchvision v2": (v2.Compose([v2.Resize(256), v2.CenterCrop(224)]), ([329], (288, 288))),
    "no crop": (v2.Compose([v2.Resize((200, 224))]), ([288, 323],)),
    "derived": (v2.Compose([OwnResize(256), v2.CenterCrop(224)]), ([329], (288, 288))),
    "nested": (v2.Compose([v2.Compose([v2.Resize(256)]), v2.CenterCrop(224)]), ([329], (288, 288))),
}


@pytest.mark.parametrize("name", STEPS)
def test_transforms_of_torchvision_are_scaled(name):
    transform, expected = STEPS[name]
    before = repr(transform)
    assert sizes_in(at_size(transform, 288)) == expected
    assert repr(transform) == before


def test_transforms_of_timm_and_presets_are_scaled():
    picture = Image.fromarray((torch.arange(300 * 400 * 3) % 255).to(torch.uint8).view(300, 400, 3).numpy())
    for crop_mode in ("center", "squash", "border"):
        same, scaled = (timm.data.create_transform(size, crop_pct=0.875, crop_mode=crop_mode) for size in (224, 288))
        assert torch.equal(at_size(same, 288)(picture), scaled(picture))
    preset = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert at_size(preset, 288)(picture).shape == (3, 288, 288)


def test_data_sets_of_data_sets_are_looked_through_and_stay_as_they_are():
    inner, other = Photos(TRAIN), Photos(TRAIN)
    both = ConcatDataset([Subset(inner, [0, 1]), other])

    def change(part: Any) -> None:
        part.transform = TEST

    twin = changed(both, change)
    assert torch.equal(twin[1][0], Photos(TEST)[1][0])
    assert torch.equal(twin[2][0], Photos(TEST)[0][0])
    assert inner.transform is other.transform is TRAIN


# ---------------------------------------------------------------------------------------------------------------------
# Misuse


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"test_size": 0}, "test_size=0"),
        ({"test_size": 24.5}, "test_size=24.5"),
        ({"test_size": 24, "lr": 0}, "lr=0"),
        ({"test_size": 24, "train_bn": "first"}, "train_bn='first'"),
        ({"test_size": 24, "transform": "flip"}, "transform='flip'"),
        ({"test_size": None, "transform": "test[+]flip"}, "test_size=None"),
        ({"test_size": 24, "train_bn": "all", "batch_norm": "bn2"}, "batch_norm='bn2'"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(kwargs, message):
    kwargs = {name: value.replace("[+]", "+") if isinstance(value, str) else value for name, value in kwargs.items()}
    with pytest.raises(ValueError, match=message):
        FixRes(**kwargs)


def fit_error(*callbacks: Any, module: Any = None, data: Any = None, **kwargs: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        make_trainer(*callbacks, **kwargs).fit(module or Net(), *(data or loaders()))
    return str(error.value)


def test_rejects_what_it_can_not_find():
    assert fit_error(FixRes(24, classifier="fc")).startswith("FixRes(classifier='fc'): Net has no such module. Its par")
    assert "no BatchNorm with running statistics that is called 'bn'" in fit_error(FixRes(24, batch_norm="bn"))

    class Empty(Net):
        def __init__(self) -> None:
            super().__init__()
            for param in self.parameters():
                param.requires_grad = False

    assert "found no classifier in Empty" in fit_error(FixRes(24), module=Empty())


def test_rejects_data_without_a_transform_to_switch():
    plain = DataLoader(TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)), batch_size=4)
    assert "and TensorDataset has no such attribute" in fit_error(FixRes(24), data=(plain, plain))
    assert "and a run without validation has no such" in fit_error(FixRes(24), limit_val_batches=0)
    fixed = DataLoader(Photos(to_tensor(lambda image: image.resize((16, 16)))), batch_size=4)
    assert "expects images of 24 pixels, and the batch is list(float32 (4, 3, 16, 16), int64 (4,))" in fit_error(
        FixRes(24), data=(fixed, fixed)
    )


def test_rejects_layers_that_take_no_part():
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare_norm, self.spare = nn.BatchNorm2d(3), nn.Linear(3, 3)

    assert "trains spare, spare_norm, and the loss of Spare depends on none" in fit_error(FixRes(24), module=Spare())
    error = fit_error(FixRes(24, classifier="head"), module=Spare())
    assert error.startswith("FixRes took spare_norm for the last BatchNorm of Spare")
    error = fit_error(FixRes(24, batch_norm="body.4"), module=Spare())
    assert error.startswith("FixRes took spare for the classifier of Spare")


def test_rejects_other_callbacks_that_freeze_drop_or_resize():
    finetuning = lightning().callbacks.BackboneFinetuning()
    for rival in (DropPath(0.1, layers=["body.4"]), ProgressiveResizing(), finetuning):
        assert fit_error(FixRes(24), rival).startswith(f"FixRes: {type(rival).__name__} ")


def test_rejects_to_go_on_with_the_run_that_trained_the_weights(tmp_path):
    saver = Saver(tmp_path, steps=[2])
    make_trainer(saver, max_epochs=1).fit(Net(), *loaders())
    with pytest.raises(RuntimeError, match="Load only the weights"):
        make_trainer(FixRes(24)).fit(Net(), *loaders(), ckpt_path=saver.paths[0], weights_only=True)


def test_rejects_sizes_that_the_network_can_not_take():
    class Timm(Net):
        def __init__(self, name: str, **kwargs: Any) -> None:
            super().__init__()
            self.body = timm.create_model(name, num_classes=6, **kwargs)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.body(images))

    vit = Timm("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    vit.example_input_array = torch.zeros(1, 3, 16, 16)
    assert "takes images of 16 x 16, and none of 24 x 24 pixels" in fit_error(FixRes(24, train_bn="none"), module=vit)
    small = Timm("test_resnet")
    assert "images of 8 x 8 pixels are too small for Timm: at body.layer3.0, which" in fit_error(
        FixRes(8), module=small
    )


def test_warns_of_random_weights_and_not_of_trained_ones():
    with pytest.warns(UserWarning, match=r"Net .*random weights"):
        make_trainer(FixRes(24), max_epochs=1).fit(Net(), *loaders())
    module = Net()
    module.body[1].running_mean += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(FixRes(24), max_epochs=1).fit(module, *loaders())


# ---------------------------------------------------------------------------------------------------------------------
# From the terminal


def test_the_whole_command(tmp_path):
    with workplace(tmp_path):
        done(*FIT, "--name=base", "--trainer.callbacks+=ZeroGamma")
        trained = "runs/base/v0/checkpoints/best.ckpt"
        fine_tune = ("--config", "tricks/fixres", "--trainer.callbacks.test_size=12", f"--model.weights={trained}")
        outcome = done(*FIT, "--name=tuned", "--trainer.callbacks+=ZeroGamma", *fine_tune)
        assert "FixRes: trains model.fc (classifier), model.layer4.1.bn2 (BatchNorm) at 12 pixels" in outcome.log
        assert "ZeroGamma: nothing to do, FixRes starts from trained weights" in outcome.log
        best = "runs/tuned/v0/checkpoints/best.ckpt"
        tested = done("test", "--ckpt_path", best, "--trainer.limit_test_batches=1", *QUIET)
        before, after = checkpoint(trained), checkpoint(best)
    assert after["datamodule_hyper_parameters"]["eval_size"] == 12
    moved = {n for n, value in after["state_dict"].items() if not torch.equal(value, before["state_dict"][n])}
    assert {name.rpartition(".")[0] for name in moved} == {"model.fc", "model.layer4.1.bn2"}
    with workplace(tmp_path):
        loss = results("runs/tuned/v0")["raw"]["test"]["loss"]
    assert f" {loss:.4f} " in tested.out
