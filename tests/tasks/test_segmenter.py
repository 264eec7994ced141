"""The Segmenter: loss and metrics against independent formulas, what it rejects, and its runs from the command line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import COSINE, QUIET, checkpoint, cli, done, metrics, results, workplace
from helpers.fits import differences
from helpers.masks import CLASSES, write_folder, write_voc
from helpers.segmenters import FIT, IGNORED, TINY, TINY_YAML, K, loader, pairs, segmenter, trainer
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_tricks import Classifier, Segmenter
from lit_tricks.run.reading.mask_predictions import palette


def fit(module: Segmenter, samples: list[Any]) -> None:
    trainer().fit(module, loader(samples), loader(samples))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def confusion(labels: npt.NDArray[Any], predicted: npt.NDArray[Any], classes: int = K) -> npt.NDArray[np.float64]:
    matrix = np.zeros((classes, classes))
    for label, prediction in zip(labels.ravel(), predicted.ravel(), strict=True):
        if label != IGNORED:
            matrix[label, prediction] += 1
    return matrix


def miou(matrix: npt.NDArray[np.float64]) -> float:
    """Mean over the classes that occur, in the labels or among what was predicted."""
    union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return float((np.diag(matrix)[union > 0] / union[union > 0]).mean())


def mean_loss(logits: Tensor, masks: Tensor, gamma: float = 0.0) -> float:
    """In float64, pixel by pixel."""
    p = logits.double().softmax(1).movedim(1, -1)[masks != IGNORED]
    p = p.gather(1, masks[masks != IGNORED][:, None]).squeeze(1)
    return float(((1 - p) ** gamma * -p.log()).mean())


@pytest.mark.parametrize("args", [{}, {"loss": "focal", "gamma": 2.0}], ids=["cross_entropy", "focal"])
def test_validation_against_a_confusion_matrix_and_the_formula(args: dict[str, Any]) -> None:
    """Over all pixels, whatever the batches: of 3, 3 and 1 images, of different numbers of ignored pixels."""
    module, samples = segmenter(**args), pairs(7)
    samples[6][1][:12] = IGNORED
    found = trainer().validate(module, loader(samples, 3), verbose=False)[0]
    images, masks = (torch.stack(each) for each in zip(*samples, strict=True))
    with torch.no_grad():
        logits = module.eval()(images)
    matrix = confusion(masks.numpy(), logits.argmax(1).numpy())
    assert found["val/miou"] == pytest.approx(miou(matrix), abs=1e-6)
    assert found["val/pixel_accuracy"] == pytest.approx(np.diag(matrix).sum() / matrix.sum(), abs=1e-6)
    assert found["val/loss"] == pytest.approx(mean_loss(logits, masks, module.gamma), rel=1e-5)


def test_the_mean_is_over_the_classes_that_occur() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return nn.functional.one_hot(images[:, 0].long(), K).movedim(-1, 1).float(), None

    module = segmenter()
    module.model = Fixed()  # type: ignore[assignment]
    predicted, mask = torch.tensor([[0, 0, 1, 3]]), torch.tensor([[0, 1, 1, IGNORED]])  # (H, W) = (1, 4)
    found = trainer().validate(module, DataLoader([(predicted[None].float(), mask)]), verbose=False)[0]
    assert found["val/miou"] == pytest.approx(
        (1 / 2 + 1 / 2) / 2
    )  # 3 was predicted of an ignored pixel, 2 and 4 of none
    assert found["val/pixel_accuracy"] == pytest.approx(2 / 3)
    predicted[0, 3] = 3
    mask[0, 3] = 0
    found = trainer().validate(module, DataLoader([(predicted[None].float(), mask)]), verbose=False)[0]
    assert found["val/miou"] == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)  # 3 was predicted, and is never right


@pytest.mark.parametrize("aux_weight", [0.0, 0.5])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_the_loss_of_a_step_is_that_of_both_heads(aux_weight: float, loss: Any) -> None:
    module = segmenter(aux_weight=aux_weight, loss=loss, model_args=TINY | {"norm": "layer"}).train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    images, masks = (torch.stack(each) for each in zip(*pairs(4), strict=True))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.model.aux = module.model.aux and nn.Sequential(*[p for p in module.model.aux if not is_norm(p)])
    module.model.decoder.body.layers = nn.Sequential(*[p for p in module.model.decoder.body.layers if not is_norm(p)])
    with torch.no_grad():
        logits, aux = module.model(images)
        expected = mean_loss(logits, masks, module.gamma)
        if aux_weight:
            expected += aux_weight * mean_loss(aux, masks, module.gamma)
        assert module.training_step([images, masks], 0).item() == pytest.approx(expected, rel=1e-5)
    assert (aux is None) == (aux_weight == 0)


def is_norm(part: nn.Module) -> bool:
    return isinstance(part, nn.BatchNorm2d)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_ignored_pixels_move_nothing(loss: Any) -> None:
    module = segmenter(loss=loss)
    logits = torch.randn(2, K, 8, 8, requires_grad=True)
    masks = torch.randint(K, (2, 8, 8))
    masks[0, :5] = IGNORED
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]

    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, None]:
            return logits, None

    module.model = Fixed()  # type: ignore[assignment]
    module.training_step([torch.zeros(2, 1, 8, 8), masks], 0).backward()
    assert logits.grad is not None
    assert (logits.grad[0, :, :5] == 0).all()
    assert (logits.grad[masks.unsqueeze(1).expand_as(logits) != IGNORED] != 0).all()


def test_a_batch_of_ignored_pixels_has_no_loss() -> None:
    """And does not turn the weights, or the loss of the epoch, into NaN."""
    samples = pairs(4)
    for _, mask in samples[:2]:
        mask[:] = IGNORED
    module, run = segmenter(), trainer()
    run.fit(module, loader(samples), loader(samples))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    images, masks = (torch.stack(each) for each in zip(*samples, strict=True))
    with torch.no_grad():
        assert run.callback_metrics["val/loss"] == pytest.approx(mean_loss(module.eval()(images), masks), rel=1e-5)


def test_prediction_gives_labels() -> None:
    module, images = segmenter().eval(), torch.randn(3, 1, 20, 13)
    labels = module.predict_step([images, ["a", "b", "c"]])
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, module(images).argmax(1).to(torch.uint8))
    assert torch.equal(module.predict_step(images), labels)


def test_segmenter_of_digits_learns() -> None:
    """Labels that are plain to see in the image."""
    torch.manual_seed(0)
    masks = torch.randint(3, (16, 4, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    samples = list(zip(masks.unsqueeze(1).float() - 1, masks, strict=True))
    module = segmenter(num_classes=3, model_args=TINY | {"output_stride": 8}, optimizer=adam)
    found = trainer(max_epochs=20)
    found.fit(module, loader(samples, 4), loader(samples, 4))
    assert found.callback_metrics["val/miou"] > 0.75
    assert found.callback_metrics["train/miou"] > 0.6


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Where it starts


def saved(module: Any, path: Path) -> str:
    run = trainer()
    module.trainer = run
    run.strategy.connect(module)
    run.save_checkpoint(path, weights_only=False)
    return str(path)


def test_the_encoder_starts_from_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = Classifier("resnet", 7, TINY, input_size=(1, 16, 16))
    path = saved(classifier, tmp_path / "classifier.ckpt")
    module = segmenter(weights=path, model_args=TINY | {"output_stride": 8})
    state = module.model.backbone.net.state_dict()
    expected = {key: value for key, value in classifier.model.state_dict().items() if not key.startswith("fc")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_segmenter_starts_from_a_segmenter(tmp_path: Path) -> None:
    first = segmenter()
    nn.init.ones_(first.model.decoder.body.layers[0].weight)
    path = saved(first, tmp_path / "first.ckpt")
    for classes in (K, 3):
        module = segmenter(weights=path, num_classes=classes)
        for (name, value), old in zip(module.state_dict().items(), first.state_dict().values(), strict=True):
            assert torch.equal(value, old) or (classes != K and name.startswith("model.decoder.body.layers.4."))
    with pytest.raises(RuntimeError, match="another architecture"):
        segmenter(weights=path, decoder="aspp")


def test_a_frozen_encoder_stays_as_it_is() -> None:
    module = segmenter(freeze=["backbone"], aux_weight=0.4)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fit(module, pairs(4))
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in moved if key.startswith("model.backbone")]
    assert {key.split(".")[1] for key in moved if key.startswith("model.")} == {"aux", "decoder"}


def test_rates_of_layers() -> None:
    module = segmenter(layer_decay=0.5, aux_weight=0.4)
    optimizer = module.configure_optimizers()
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(module.parameters()))
    net, heads = module.model.backbone.net, (module.model.decoder, module.model.aux)
    assert {rates[p] for head in heads for p in head.parameters()} == {0.01}  # type: ignore[union-attr]
    first, last = (rates[next(getattr(net, name).parameters())] for name in ("layer1", "layer4"))
    assert 0 < first < last < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Misuse

MISUSE: dict[str, tuple[dict[str, Any], str]] = {
    "classes": ({"num_classes": 1}, "num_classes=1"),
    "ignored class": ({"ignore_index": 4}, "ignore_index=4 is one of the 5 classes: give a label that none has, as -1"),
    "many classes": ({"num_classes": 300}, "ignore_index=255 is one of the 300 classes"),
    "decoder": ({"decoder": "unet"}, "decoder='unet' is unknown: choose one of 'fcn'"),
    "loss": ({"loss": "dice"}, "loss='dice' is unknown: write 'cross_entropy' or 'focal'"),
    "aux": ({"aux_weight": -1.0}, r"aux_weight=-1\.0"),
    "gamma": ({"gamma": -1.0}, r"gamma=-1\.0"),
    "no model": ({"model": "resnet5o", "model_args": None}, "is neither 'resnet', 'small_vgg' nor a model of timm"),
    "names": ({"class_names": ["a"]}, r"class_names=\['a'\], num_classes=5"),
    "freeze": ({"freeze": ["layer9"]}, "freeze='layer9' is no part of ResNet"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_segmenter_wrong_argument_raises(case: str) -> None:
    args, message = MISUSE[case]
    with pytest.raises(ValueError, match=message):
        segmenter(**args)


def test_labels_that_are_no_class() -> None:
    with pytest.raises((IndexError, RuntimeError, ValueError), match=r"[Tt]arget"):
        fit(segmenter(), pairs(4, classes=K + 2))


def test_data_of_another_kind() -> None:
    class Data(LightningDataModule):
        num_classes, ignore_index = K, 0

        def train_dataloader(self) -> DataLoader[Any]:
            return loader(pairs(4))

        val_dataloader = train_dataloader

    data = Data()
    with pytest.raises(ValueError, match=r"ignore_index=255 .*, 0"):
        trainer().fit(segmenter(), data)
    data.num_classes, data.ignore_index = K + 1, IGNORED
    with pytest.raises(ValueError, match=r"num_classes=5 .*6 classes"):
        trainer().fit(segmenter(), data)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line

EACH_STEP = ("--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_top_k=-1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        Path("small.yaml").write_text(TINY_YAML)
        yield tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits."""
    with workplace(tmp_path_factory.mktemp("run"), curves=True) as folder:
        Path("small.yaml").write_text(TINY_YAML)
        done(*FIT)
    return folder / "runs" / "small" / "v0"


def test_a_fit_leaves_its_metrics_and_report(run: Path) -> None:
    names = {name for row in metrics(run) for name in row}
    for split in ("train", "val", "test"):
        assert {f"{split}/miou", f"{split}/pixel_accuracy"} <= names
    assert {"train/loss_epoch", "val/loss", "test/loss"} <= names
    assert "miou" in (run / "report.md").read_text()
    assert (run / "curves.png").is_file()
    best = checkpoint(run / "checkpoints" / "best.ckpt")
    assert best["hyper_parameters"]["class_names"][:2] == ["ground", "0"]
    assert "miou" in str(results(run))


def test_a_checkpoint_rebuilds_the_module(run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    module = Segmenter.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    state = checkpoint(path)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert (module.num_classes, module.class_names[10], module.aux_weight) == (11, "9", 0.4)
    assert module.configure_optimizers().defaults["lr"] == 0.01


def test_test_and_validate_a_checkpoint(run: Path) -> None:
    best = run / "checkpoints" / "best.ckpt"
    for command, split in (("test", "test"), ("validate", "val")):
        outcome = done(command, "--ckpt_path", str(best), *QUIET, f"--trainer.limit_{split}_batches=2")
        assert "miou" in outcome.out


def test_a_run_that_is_resumed_ends_as_if_it_was_not(folder: Path) -> None:
    words = (*FIT, "--model.decoder=pan", "--model.aux_weight=0", *COSINE)  # the others drop out
    done(*words)
    (whole,) = Path("runs/small").iterdir()
    done(*words, "--trainer.limit_train_batches=3", "--trainer.callbacks+=ModelCheckpoint", *EACH_STEP)
    (middle,) = Path("runs/small/v1/checkpoints").glob("*step=2.ckpt")
    done(*words, f"--ckpt_path={middle}")
    ours, theirs = (checkpoint(each / "checkpoints/last.ckpt") for each in (Path("runs/small/v2"), whole))
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    assert differences(ours["optimizer_states"], theirs["optimizer_states"]) == []


def test_masks_are_predicted(run: Path, folder: Path) -> None:
    for name, size in (("a.png", (80, 64)), ("b/c.jpg", (30, 70)), ("a.jpg", (64, 64))):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(len(name))
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / "images" / name)
    best = str(run / "checkpoints" / "best.ckpt")
    outcome = done("predict", "--ckpt_path", best, "--images=images", "--output=predicted.csv", *QUIET)
    assert "3 masks written to predicted, their shares written to predicted.csv" in outcome.log
    with open("predicted.csv", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["file", "mask", "ground", *map(str, range(10)), "error"]
    assert [row[:2] for row in rows] == [
        ["images/a.jpg", "predicted/a.png"],
        ["images/a.png", "predicted/a.png.png"],
        ["images/b/c.jpg", "predicted/b/c.png"],
    ]
    for file, path, *shares, _ in rows:
        with Image.open(path) as mask, Image.open(file) as image:
            assert mask.size == image.size
            assert mask.mode == "P"
            labels = np.array(mask)
            assert bytes(mask.getpalette()[:6]) == bytes([0, 0, 0, 128, 0, 0])  # type: ignore[index]
        found = np.bincount(labels.ravel(), minlength=11) / labels.size
        assert [float(share) for share in shares] == pytest.approx(found.tolist(), abs=1e-6)
    module = Segmenter.load_from_checkpoint(best, map_location="cpu", weights_only=True).eval()
    with Image.open("images/a.jpg") as image:  # of 64 pixels, as in training
        gray = torch.from_numpy(np.array(image.convert("L"))).float()
    predicted = module(((gray - 31.97) / 53.16)[None, None]).argmax(1)[0]
    assert (torch.from_numpy(np.array(Image.open("predicted/a.png"))) == predicted).float().mean() > 0.99


def test_the_palette_is_that_of_voc() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: tuple(palette()[label].tolist()) for label in known} == known


def test_a_folder_and_voc_from_the_command_line(folder: Path) -> None:
    write_folder(folder / "cells")
    write_voc(folder / "voc")
    sizes = ("--data.crop_size=16", "--data.base_size=20", "--data.batch_size=2", "--data.num_workers=0")
    for name, root, classes in (("SegmentationFolder", "cells", len(CLASSES)), ("VOCSegmentation", "voc", 21)):
        done(*FIT, f"--data={name}", f"--data.root={root}", *sizes, "--trainer.fast_dev_run=true")
        done(*FIT, f"--data={name}", f"--data.root={root}", *sizes, f"--name={root}", "--trainer.limit_train_batches=1")
        made = checkpoint(f"runs/{root}/v0/checkpoints/last.ckpt")
        assert made["hyper_parameters"]["num_classes"] == classes
        assert list(made["hyper_parameters"]["input_size"]) == [3, 16, 16]


REJECTED = {
    "decoder": (("--model.decoder=unet",), "'unet'"),
    "classes": (("--model.num_classes=7",), r"num_classes=7 disagrees with the data, which has 11"),
    "name": (("--model=Segmentor",), "did you mean 'Segmenter'"),
    "argument": (("--model.decodr=fcn",), "Segmenter has no argument 'decodr'; did you mean 'decoder'"),
    "data": (("--data=DigitSegmentatoin",), "did you mean 'DigitSegmentation'"),
    "data of labels": (("--data=Digits",), r"."),
}


@pytest.mark.parametrize("case", REJECTED)
def test_fit_with_wrong_option_explains_itself(case: str) -> None:
    words, message = REJECTED[case]
    outcome = cli(*FIT, *words)
    assert outcome.code in (1, 2)
    assert outcome.err.count("\n") == 1
    assert re.search(message, outcome.err), outcome.err


def test_the_card_says_what_it_is_for(run: Path) -> None:
    done("card", str(run / "checkpoints" / "best.ckpt"), "--output=card.md")
    text = Path("card.md").read_text()
    assert "pipeline_tag: image-segmentation" in text
    assert "image-classification" not in text
    assert "ece" not in text.partition("## Recipe")[0]
