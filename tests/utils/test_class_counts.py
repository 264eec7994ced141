"""Test how the classes of any training set are counted, and the tricks that need the counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fits import log_lines, make_trainer, run
from helpers.modules import NAMESPACES, eval_loader, image_and_label, lightning, module_class
from helpers.photos import jpeg, photo
from helpers.segmenters import segmenter
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision import datasets
from torchvision.transforms import v2

from lit_tricks.callbacks import ClassBalanced, LogitAdjustment
from lit_tricks.data import Digits, DigitSegmentation, ImageFolder
from lit_tricks.utils.class_counts import listed_labels

LABELS = torch.tensor([0] * 7 + [1] * 4 + [2] * 2)  # of 13 images
IMAGES = torch.randn(13, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Items(Dataset[Any]):
    """Images whose labels are in an attribute, or only in the items."""

    def __init__(self, change: Callable[[int], int] = int, **attributes: Any) -> None:
        self.change = change
        self.loaded: list[int] = []
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded.append(index)
        return IMAGES[index] + torch.rand(()), self.change(int(LABELS[index]))


class Wrapper(Dataset[Any]):
    """Another's items, as many write it to give each split its own transform."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        image, label = self.dataset[index]
        return image * 2, label


def counted(loader: Any, trick: Any = None, namespace: str = "lightning", **kwargs: Any) -> tuple[list[int], list[str]]:
    """Fit for a batch, and return the counts of the trick and what it logged."""
    trick = trick or LogitAdjustment()
    with log_lines() as records:
        run(trick, loader=loader, namespace=namespace, **{"max_epochs": 1, "limit_train_batches": 1, **kwargs})
    return trick.state_dict()["classes"], [record.getMessage() for record in records]


def loader(dataset: Any, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, **kwargs)


LISTS = {
    "targets": lambda: Items(targets=LABELS.tolist()),
    "array": lambda: Items(targets=LABELS.numpy().astype(np.uint8)),
    "column": lambda: Items(labels=LABELS[:, None]),
    "samples": lambda: Items(samples=[(f"{i}.jpg", int(label)) for i, label in enumerate(LABELS)]),
    "imgs": lambda: Items(imgs=[(f"{i}.jpg", int(label)) for i, label in enumerate(LABELS)]),
    "private of torchvision": lambda: Items(_labels=LABELS.tolist()),
    "tensors": lambda: TensorDataset(IMAGES, LABELS),
    "concatenation": lambda: ConcatDataset(
        [Subset(Items(targets=LABELS), range(5)), Subset(Items(targets=LABELS), range(5, 13))]
    ),
    "wrapper": lambda: Wrapper(Items(targets=LABELS)),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_listed_labels_are_not_loaded(kind, namespace):
    dataset = LISTS[kind]()
    counts, lines = counted(loader(dataset), namespace=namespace)
    assert counts == [7, 4, 2]
    assert len(lines) == 1
    assert "13 training items, 2 to 7 images per class" in lines[0]


def test_subsets_count_their_own_items():
    parts = random_split(Items(targets=LABELS.tolist()), [9, 4], torch.Generator().manual_seed(0))
    counts, _ = counted(loader(Subset(parts[0], range(6))))
    chosen = torch.tensor(parts[0].indices)[:6]
    assert counts == LABELS[chosen].bincount().tolist()


def test_a_sampler_of_some_items_counts_these():
    counts, _ = counted(loader(Items(targets=LABELS), sampler=SubsetRandomSampler([0, 1, 7, 11, 12])))
    assert counts == [2, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: Items(),
        lambda: Items(labels=["ant", "bee", "cow"]),  # the names of the classes
        lambda: Items(change=lambda label: 2 - label, targets=LABELS),  # labels change while they are loaded
        lambda: Items(targets=LABELS[:5]),
        lambda: Items(targets=torch.rand(13)),
        lambda: Items(samples=Items(), imgs=[np.zeros((4, 4), np.uint8)] * 13),  # no labels, and not to be loaded
    ],
    ids=["none", "names", "changed", "short", "floats", "images"],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_other_items_are_loaded_once(dataset, workers):
    dataset = dataset()
    expected = torch.tensor([dataset[i][1] for i in range(13)]).bincount().tolist()
    counts, lines = counted(loader(dataset, num_workers=workers))
    assert counts == expected
    assert not getattr(getattr(dataset, "samples", None), "loaded", None)
    assert len(lines) == 2
    assert "one pass over 13 training items" in lines[0]
    assert "counts=" in lines[0]


def test_the_pass_draws_no_number_of_the_run():
    def seen(*tricks: Any) -> list[Tensor]:
        found: list[Tensor] = []

        class Module(module_class("lightning")):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                found.append(image_and_label(batch)[0])
                return super().training_step(batch, batch_idx)

        trainer = make_trainer(*tricks, max_epochs=2)
        torch.manual_seed(3)
        trainer.fit(Module(), loader(Items(), shuffle=True), eval_loader())
        return found

    assert all(map(torch.equal, seen(LogitAdjustment()), seen()))


def test_target_transform_of_torchvision(tmp_path: Path):
    for label, count in enumerate((3, 2, 1)):
        (tmp_path / str(label)).mkdir()
        for index in range(count):
            (tmp_path / str(label) / f"{index}.jpg").write_bytes(jpeg(photo(8, 8, seed=index)))
    transform = v2.Compose([v2.Grayscale(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = datasets.ImageFolder(tmp_path, transform, target_transform=lambda label: (label + 1) % 3)
    counts, lines = counted(loader(dataset))
    assert counts == [1, 3, 2]
    assert len(lines) == 1


class Column:
    """A data set with columns, as Hugging Face's: labels by name, items as dictionaries."""

    column_names = ("image", "label")

    def __init__(self, formatted: bool = True) -> None:
        self.features = {"image": object(), "label": type("ClassLabel", (), {"names": ["a", "b", "c"]})()}
        self.formatted = formatted

    def with_format(self, kind: None) -> Column:
        return Column(formatted=False)

    def __len__(self) -> int:
        return 13

    def __getitem__(self, key: Any) -> Any:
        if key == "label":
            assert not self.formatted, "a column goes through the transform of the data set"
            return LABELS.tolist()
        return {"image": IMAGES[key], "label": int(LABELS[key])}


def test_columns():
    counts, lines = counted(loader(Column()))
    assert counts == [7, 4, 2]
    assert len(lines) == 1


def test_columns_of_hugging_face():
    hub = pytest.importorskip("datasets")
    table = {"image": IMAGES.flatten(1).tolist(), "label": LABELS.tolist()}
    features = hub.Features(
        {"image": hub.Sequence(hub.Value("float32")), "label": hub.ClassLabel(names=["a", "b", "c"])}
    )
    dataset = hub.Dataset.from_dict(table, features=features).with_transform(lambda row: {"x": row["image"], "y": 0})
    labels = listed_labels(dataset)
    assert labels is not None
    assert labels.bincount().tolist() == [7, 4, 2]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(IMAGES, LABELS, strict=True)


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter([[IMAGES[:4], LABELS[:4]]])


REJECTED = {
    "stream": (lambda: loader(Stream()), r"a Stream does not list its items.*counts=\[...\]"),
    "own loader": (lambda: Batches(), r"a Batches does not list its items.*counts=\[...\]"),
    "two loaders": (
        lambda: {"a": loader(Items()), "b": loader(TensorDataset(IMAGES))},
        r"2 training loaders.*counts=\[...\]",
    ),
    "weights": (
        lambda: loader(Items(targets=LABELS), sampler=WeightedRandomSampler([1.0] * 13, 13)),
        r"WeightedRandomSampler .*draws by weights.*counts=\[...\]",
    ),
}


@pytest.mark.parametrize("kind", REJECTED)
def test_rejects_what_cannot_be_counted(kind):
    make, message = REJECTED[kind]
    with pytest.raises(RuntimeError, match=rf"^LogitAdjustment.*{message}"):
        run(LogitAdjustment(), loader=make())
    if kind != "two loaders":  # the module of these tests takes one batch
        counts, _ = counted(make(), LogitAdjustment(counts=[7, 4, 2]))
        assert counts == [7, 4, 2]


@pytest.mark.parametrize("trick", [LogitAdjustment, ClassBalanced])
@pytest.mark.parametrize(("labels", "message"), [([0, 0, 2, 2], "label 1"), ([0, 0, 1, 1], "label 2")])
def test_a_class_without_images_is_an_error(trick, labels, message):
    dataset = TensorDataset(IMAGES[:4], torch.tensor(labels))
    with pytest.raises(RuntimeError, match=rf"^{trick.__name__}: 1 of the 3 classes .*{message}.*counts="):
        run(trick(), loader=loader(dataset))


def test_given_counts_must_fit_the_loss():
    with pytest.raises(RuntimeError, match="there are 4 counts, and the loss has 3 classes"):
        run(LogitAdjustment(counts=[1, 2, 3, 4]))


# Our own data


def test_our_data_modules_list_their_labels(tmp_path: Path):
    from lit_tricks import Classifier

    data = Digits()
    data.setup("fit")
    expected = torch.tensor([label for _, label in (data.source("train")[i] for i in range(len(data.source("train"))))])
    trick = ClassBalanced(beta=0.99)
    module = Classifier("resnet", 10, {"depth": 18, "width": 0.0625, "small_input": True}, input_size=(1, 8, 8))
    with log_lines() as records:
        make_trainer(trick, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    assert trick.state_dict()["classes"] == expected.bincount().tolist()
    assert len([record for record in records if record.levelno == logging.INFO]) == 1
    for label, count in enumerate((5, 3, 2)):
        for split in ("train", "val"):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for index in range(count):
                (tmp_path / split / str(label) / f"{index}.jpg").write_bytes(jpeg(photo(16, 16, seed=index)))
    folder = ImageFolder(str(tmp_path), 16, 4, 0)
    folder.setup("fit")
    assert folder.train_dataloader().dataset.targets.bincount().tolist() == [5, 3, 2]  # type: ignore[attr-defined]
    module = Classifier("resnet", 3, {"depth": 18, "width": 0.0625, "small_input": True}, input_size=(3, 16, 16))
    with pytest.raises(RuntimeError, match=r"BalancedSampler .*draws by weights"):
        make_trainer(LogitAdjustment(), max_epochs=1).fit(module, ImageFolder(str(tmp_path), 16, 4, 0, balance=0.5))


def test_pixels_of_masks_are_counted_as_training_gives_them():
    data = DigitSegmentation(batch_size=4)
    data.setup("fit")
    batches = [data.train_dataloader().dataset[i][1] for i in range(len(data.source("train")))]
    expected = torch.stack(batches)
    expected = expected[expected != 255].bincount(minlength=11).tolist()
    trick = LogitAdjustment()
    module = segmenter(num_classes=11, input_size=(1, 64, 64))
    torch.manual_seed(torch.initial_seed())
    make_trainer(trick, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    assert trick.state_dict()["is_dense"]
    assert trick.state_dict()["classes"][:11] == expected


# Checkpoints and processes


def test_a_resumed_run_does_not_count_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = run(LogitAdjustment(), loader=loader(Items(targets=LABELS)), max_epochs=1)
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    monkeypatch.setattr("lit_tricks.callbacks.soft_targets.counted.count_classes", None)
    trick = LogitAdjustment()
    with log_lines() as records:
        run(trick, loader=loader(Items(targets=LABELS)), max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert trick.state_dict()["classes"] == [7, 4, 2]
    assert "counts: the checkpoint" in records[0].getMessage()
    more = ConcatDataset([Items(targets=LABELS)] * 2)
    with pytest.warns(UserWarning, match="started with 13 training items and continues with 26"):
        run(LogitAdjustment(), loader=loader(more), max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    with pytest.raises(ValueError, match=r"counts=\[1, 2, 3\]"):
        run(LogitAdjustment(counts=[1, 2, 3]), max_epochs=2, ckpt_path=tmp_path / "first.ckpt")


def test_another_fit_counts_anew():
    trick = LogitAdjustment()
    assert counted(loader(Items(targets=LABELS)), trick)[0] == [7, 4, 2]
    assert counted(loader(Subset(Items(targets=LABELS), [0, 7, 8, 12])), trick)[0] == [1, 2, 1]


class Writes(lightning().Callback):  # type: ignore[misc]
    def __init__(self, folder: Path, trick: Any) -> None:
        self.folder, self.trick = folder, trick

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save(self.trick.state_dict(), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:This process .* is multi-threaded:DeprecationWarning"
)
@pytest.mark.parametrize("dataset", [Items, lambda: Items(targets=LABELS)], ids=["a pass", "a list"])
def test_two_processes_count_the_whole_set(dataset, tmp_path: Path):
    trick = LogitAdjustment()
    trainer = make_trainer(
        trick, Writes(tmp_path, trick), devices=2, strategy="ddp_fork", max_epochs=1, limit_val_batches=0
    )
    trainer.fit(module_class("lightning")(), loader(dataset()), eval_loader())
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == {"classes": [7, 4, 2], "items": 13, "is_dense": False}
