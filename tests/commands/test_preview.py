"""lit-tricks data preview: the first training batch as the model sees it; the same picture once a run in W&B."""

from __future__ import annotations

import csv
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import FIT, cli, done, workplace, write_image_folder
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

import lit_tricks
from lit_tricks.commands.data import preview
from lit_tricks.data import CIFAR10, Digits, ImageFolder
from lit_tricks.run.preview import PreviewLogger, preview_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
    "ignore:You passed in a `val_dataloader` but have no",
    "ignore:`max_epochs` was not set",
    "ignore:The number of training batches",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


class Foreign(LightningDataModule):
    """Batches are dicts, with images from 0 to 1."""

    def __init__(self, low: float = 0.0) -> None:
        super().__init__()
        self.low = low

    def train_dataloader(self) -> DataLoader[Any]:
        images = torch.linspace(self.low, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
        return DataLoader([{"image": image, "label": label} for label, image in enumerate(images)], batch_size=4)


def table(path: str) -> list[list[str]]:
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))[1:]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.slow
def test_from_the_command_line() -> None:
    outcome = done("data", "preview", *FIT[1:], "--out=digits.png", "--count", "9")
    assert "digits.png: 9 training images as the model's input: 1 x 8 x 8" in outcome.log
    width, height = size_of(Path("digits.png"))
    assert width > 500
    assert height > 500
    rows = table("digits.csv")
    assert len(rows) == 9
    assert {row[1] for row in rows} <= set("0123456789")
    assert {row[2] for row in rows} == {"1.0"}
    assert not Path("runs").exists()


@pytest.mark.slow
def test_preview_shows_the_first_batch_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    with monkeypatch.context() as patch:
        module = sys.modules["lit_tricks.commands.data.batch_preview"]  # the package has the function by that name
        patch.setattr(module, "preview_of", lambda batch, *args: (seen.append(batch), preview_of(batch, *args))[1])
        done("data", "preview", *FIT[1:], "--config=tricks/mixup", "--out=x.png")
    original = lit_tricks.Classifier.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(batch)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(lit_tricks.Classifier, "training_step", step)
    done(*FIT, "--config=tricks/mixup")
    (shown, labels), (trained, targets) = seen[:2]
    assert torch.equal(shown, trained)
    assert torch.equal(labels.parts["weight"], targets.parts["weight"])


def test_pixels_are_those_of_the_data() -> None:
    data = Digits()
    data.train_transform = data.eval_transform
    found = preview_of(next(iter(data.train_dataloader())), data, 5)
    assert (found.images.shape, found.size, found.note) == ((5, 8, 8), (1, 8, 8), "")
    ink = {np.asarray(image).round().astype(np.uint8).tobytes() for image, _ in data.source("train")}  # type: ignore[attr-defined]
    assert {image.tobytes() for image in found.images} <= ink


def test_colours_of_photos_come_back(folder: Path) -> None:
    data = ImageFolder(str(write_image_folder(folder / "photos")), 16, 4, num_workers=0, augmentation="none")
    images, labels = next(iter(data.val_dataloader()))
    found = preview_of(data.on_after_batch_transfer([images, labels], 0), data, 4)
    np.testing.assert_array_equal(found.images, images.permute(0, 2, 3, 1).numpy())
    assert [list(each) for each in found.labels] == [["ant"], ["ant"], ["bee"], ["bee"]]


def test_cifar_can_be_turned_back(tmp_path: Path) -> None:
    data = CIFAR10(root=str(tmp_path))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    batch = [data.eval_transform(image)[None], torch.tensor([3])]
    found = preview_of(batch, data, 1)
    np.testing.assert_array_equal(found.images[0], np.asarray(image))
    assert found.titles() == ["cat"]


@pytest.mark.parametrize(("low", "note"), [(0.0, ""), (-2.0, "-2 shown as black, 1 as white")])
def test_a_foreign_module(folder: Path, low: float, note: str) -> None:
    batch = next(iter(Foreign(low).train_dataloader()))
    found = preview_of(batch, Foreign(), 16)
    assert found.note == note
    assert (found.images.min(), found.images.max()) == (0, 255)
    assert found.titles() == ["0", "1", "2", "3"]
    assert preview(Foreign(low), out="foreign.png") == Path("foreign.png")
    assert len(table("foreign.csv")) == 4


@pytest.mark.slow
def test_labels_of_a_mixture(folder: Path) -> None:
    done("data", "preview", *FIT[1:], "--config=tricks/mixup", "--trainer.callbacks.alpha=50", "--out=mixed.png")
    shares: dict[str, list[float]] = {}
    for image, _, share in table("mixed.csv"):
        shares.setdefault(image, []).append(float(share))
    assert len(shares) == 16
    assert max(map(len, shares.values())) == 2
    assert all(sum(each) == pytest.approx(1) for each in shares.values())


def test_preview_titles_show_any_class_name() -> None:
    target = torch.tensor([0, 1])
    found = preview_of([torch.zeros(2, 3, 4, 4), target], SimpleNamespace(classes=["кот", "$x^", "犬" * 40]), 2)
    assert found.titles() == ["кот", "$x^"]
    assert found.png().startswith(b"\x89PNG")


def test_batch_without_labels_has_empty_titles() -> None:
    assert preview_of([torch.rand(2, 3, 4, 4)], None, 8).titles() == ["", ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out=x.jpg",), "--out x.jpg does not end in .png, and a PNG file is what is written."),
        (("--out=nowhere/x.png",), "--out nowhere/x.png lies in a folder that does not exist: make it first."),
        (("--count=0",), "--count=0 is below 1: it is the number of images to draw."),
        (("--count=many",), "--count: 'many' is not int."),
        (("--data.batch_sise=3",), "Digits has no argument 'batch_sise'; did you mean 'batch_size'?"),
        (("--trainer.limit_train_batches=0",), "there was no training batch: check "),
    ],
)
def test_preview_wrong_arguments_explain_themselves(words: tuple[str, ...], message: str) -> None:
    outcome = cli("data", "preview", *FIT[1:], *words)
    assert outcome.code in (1, 2)
    assert outcome.err.startswith(f"lit-tricks: error: {message}")
    assert not list(Path().glob("*.png"))


def test_no_images_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="holds no images"):
        preview_of([torch.rand(4, 3), torch.arange(4)], None, 4)


# Logged


class Sink(WandbLogger):
    """Takes what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any, Any]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((key, images, step))


def at(step: int, loggers: list[Any], data: Any = None) -> Any:
    return SimpleNamespace(global_step=step, is_global_zero=True, loggers=loggers, datamodule=data)


def test_the_first_batch_is_logged_once_and_disturbs_nothing() -> None:
    sink, batch = Sink(), [torch.rand(4, 3, 8, 8), torch.arange(4)]
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
    logger = PreviewLogger(count=3)
    for step in range(3):
        logger.on_train_batch_start(at(step, [sink]), LightningModule(), batch, step)
    [(key, [image], step)] = sink.logged
    assert (key, step) == ("data/preview", 0)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    assert image.size == Image.open(io.BytesIO(preview_of(batch, None, 3).png())).size
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # type: ignore[union-attr]


def test_a_picture_that_can_not_be_made_stops_nothing() -> None:
    sink = Sink()
    PreviewLogger().on_train_batch_start(at(0, [sink]), LightningModule(), ["text"], 0)
    PreviewLogger().on_train_batch_start(at(0, [object()]), LightningModule(), ["text"], 0)
    assert sink.logged == []


def test_what_is_not_shown_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("it was built")

    monkeypatch.setattr(lit_tricks.Classifier, "configure_optimizers", fail)
    monkeypatch.setattr("lit_tricks.callbacks.knowledge_distillation.load_teacher", fail)
    stack = ("mixup", "knowledge_distillation", "ema", "warmup_cosine", "linear_scaling", "compile")
    words = [f"--config=tricks/{name}" for name in stack]
    teacher = "--trainer.callbacks.KnowledgeDistillation.teacher=gone.ckpt"
    done("data", "preview", *FIT[1:], *words, teacher, "--out=x.png", "--count=4")
    assert any(0 < float(share) < 1 for _, _, share in table("x.csv"))
