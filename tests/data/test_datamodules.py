"""The data modules: what a batch is, that the seed alone decides it, and what bad input is answered with."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from lit_tricks.data import CIFAR10, CIFAR100, Digits, ImageFolder
from lit_tricks.data.datamodule import ImageDataModule, Split
from lit_tricks.data.io.jpeg import read_image
from lit_tricks.data.loader import ShuffleSampler
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.data.samples import Samples

CLASSES = ("ant", "bee", "cow")
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# Lightning and Python warn according to the machine (its cores, its GPU, its way to start processes) and when a run is
# resumed in its own folder; and Lightning uses what torch has deprecated since.
any_machine = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:.*does not have many workers",
    "ignore:GPU available but not used",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)


class Recorder(LightningModule):
    """One layer that notes the batches it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append((self.current_epoch, fingerprint(batch)))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.layer(batch[0].flatten(1)).sum())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("count", float(len(batch[1])), reduce_fx="sum")

    def predict_step(self, batch: list[Any], batch_idx: int) -> tuple[str, ...]:
        return tuple(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SeedsApart(Recorder):
    """A module that does not train, whose processes have different random states, and which writes what each saw."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.folder = folder
        self.rows: list[tuple[bytes, int]] = []

    def setup(self, stage: str) -> None:
        torch.manual_seed(100 + self.global_rank)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        self.rows += [(image.numpy().tobytes(), int(label)) for image, label in zip(*batch, strict=True)]

    def on_train_end(self) -> None:
        (self.folder / f"{self.global_rank}.pickle").write_bytes(pickle.dumps(self.rows))


def fingerprint(batch: Iterable[Tensor]) -> str:
    return hashlib.sha1(b"".join(part.numpy().tobytes() for part in batch)).hexdigest()


def trainer(**kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{"devices": 1, "enable_checkpointing": False, **quiet, **kwargs})


def passes(data: ImageDataModule, epochs: Iterable[int]) -> list[list[str]]:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, ShuffleSampler)
    result = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        result.append([fingerprint(batch) for batch in loader])
    return result


def final(data: ImageDataModule, loader: Iterable[Any]) -> list[Any]:
    """The batches as the model sees them."""
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def write_images(folder: Path, count: int, size: tuple[int, int] = (24, 20), seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    for index in range(count):
        pixels = rng.randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(folder / f"{index}.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of 12 training and 6 validation images."""
    for label, name in enumerate(CLASSES):
        write_images(tmp_path / "train" / name, 4, seed=label)
        write_images(tmp_path / "val" / name, 2, seed=10 + label)
    return tmp_path


# Digits


def test_digits_are_split_in_proportion_and_for_good() -> None:
    data = Digits()
    assert (data.classes, data.num_classes, data.input_size) == (list("0123456789"), 10, (1, 8, 8))
    data.setup()
    sources = {split: data.source(split) for split in SPLITS}
    assert {split: len(source) for split, source in sources.items()} == {"train": 1257, "val": 180, "test": 360}
    pictures = [np.asarray(source[i][0]).tobytes() for source in sources.values() for i in range(len(source))]
    assert sorted(pictures) == sorted((255 / 16 * image).astype(np.float32).tobytes() for image in load_digits().images)
    for source in sources.values():
        counts = np.bincount([source[index][1] for index in range(len(source))])
        assert np.abs(counts - len(source) / 10).max() <= 0.06 * len(source) / 10 + 1
    again, other = Digits().source("test"), Digits(split_seed=1).source("test")
    labels = [[source[index][1] for index in range(360)] for source in (sources["test"], again, other)]
    assert labels[0] == labels[1] != labels[2]


def test_digits_constants_are_those_of_the_training_images() -> None:
    source = Digits().source("train")
    ink = np.stack([np.asarray(source[index][0]) for index in range(len(source))]) / (255 / 16)
    assert (round(float(ink.mean()), 2), round(float(ink.std()), 2)) == (4.88, 6.02)
    images, labels = next(iter(Digits(batch_size=180).val_dataloader()))
    assert images.shape == (180, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    back = images.double() * 6.02 + 4.88
    torch.testing.assert_close(back, back.round(), rtol=0, atol=1e-5)  # ink is not rounded to 8 bits


def test_digits_train_transform_shifts_by_a_pixel() -> None:
    data = Digits()
    image = data.source("train")[0][0]
    padded = torch.nn.functional.pad(data.eval_transform(image), (1, 1, 1, 1), value=-4.88 / 6.02)
    shifts = [padded[:, row : row + 8, column : column + 8] for row in range(3) for column in range(3)]
    torch.manual_seed(0)
    results = [data.train_transform(image) for _ in range(100)]
    hits = [[torch.allclose(result, shift) for shift in shifts].index(True) for result in results]
    assert set(hits) == set(range(9))


def test_digits_of_another_size_are_the_same_scaled() -> None:
    data = Digits(image_size=24)
    assert data.input_size == (1, 24, 24)
    image = data.source("train")[0][0]
    ink = torch.from_numpy(np.array(image))[None, None] * 16 / 255
    want = torch.nn.functional.interpolate(ink, 24, mode="bilinear")
    want = (want[0] - 4.88) / 6.02
    torch.testing.assert_close(data.eval_transform(image), want, rtol=1e-4, atol=1e-4)
    padded = torch.nn.functional.pad(want, (3, 3, 3, 3), value=-4.88 / 6.02)
    shifts = [padded[:, row : row + 24, column : column + 24] for row in range(7) for column in range(7)]
    for _ in range(10):
        result = data.train_transform(image)
        assert any(torch.allclose(result, shift, atol=1e-4) for shift in shifts)
    with pytest.raises(ValueError, match=r"image_size=0"):
        Digits(image_size=0)


def test_digits_predict_any_image(tmp_path: Path) -> None:
    data = Digits(predict_dir=str(tmp_path))
    digit = data.source("val")[3][0]
    pixels = Image.fromarray(np.asarray(digit).round().astype(np.uint8))
    (tmp_path / "b" / "c").mkdir(parents=True)
    pixels.save(tmp_path / "b" / "c" / "gray.png")
    pixels.convert("RGB").resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    images, paths = next(iter(data.predict_dataloader()))
    assert list(paths) == [str(tmp_path / "a.PNG"), str(tmp_path / "b" / "c" / "gray.png")]
    exact = data.eval_transform(digit)
    torch.testing.assert_close(images[1], exact, rtol=0, atol=0.5 / 255 * 16 / 6.02 + 1e-6)
    assert torch.corrcoef(torch.stack([images[0].flatten(), exact.flatten()]))[0, 1] > 0.95


# The seed alone decides


@pytest.mark.slow
@any_machine
def test_batches_do_not_depend_on_the_workers() -> None:
    runs = []
    for workers in (0, 1, 2):
        lightning.seed_everything(3, verbose=False)
        data = Digits(batch_size=256, num_workers=workers)
        torch.rand(workers)  # what is drawn before does not matter
        runs.append(passes(data, (0, 1)))
        loader = data.train_dataloader()
        assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)
    assert runs[0] == runs[1] == runs[2]
    assert len({batch for epoch in runs[0] for batch in epoch}) == 2 * 4


def test_an_epoch_depends_on_seed_and_number_only() -> None:
    lightning.seed_everything(3, verbose=False)
    third, first, third_again = passes(Digits(batch_size=256), (3, 1, 3))
    assert third == third_again != first
    lightning.seed_everything(4, verbose=False)
    assert not set(third) & set(passes(Digits(batch_size=256), (3,))[0])


def test_an_epoch_is_a_permutation_and_augments_anew() -> None:
    data = Digits(batch_size=1257)
    data.train_transform = data.eval_transform
    loader = data.train_dataloader()
    first, labels = next(iter(loader))
    assert isinstance(loader.sampler, ShuffleSampler)
    loader.sampler.set_epoch(1)
    second, _ = next(iter(loader))
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort()[0], second.flatten(1).sum(1).sort()[0])
    assert np.bincount(labels).tolist() == np.bincount([data.source("train")[i][1] for i in range(1257)]).tolist()
    samples = Digits().train_dataloader().dataset
    assert isinstance(samples, Samples)
    pictures = [samples[5 + epoch * len(samples)][0] for epoch in range(8)]
    assert torch.equal(samples[5][0], pictures[0])
    assert len({picture.numpy().tobytes() for picture in pictures}) > 2


@any_machine
@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state(workers: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    data = Digits(num_workers=workers)
    before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    passes(data, (0, 1))
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 180
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == numpy_before
    assert torch.initial_seed() == 1


def test_the_accelerators_are_not_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded the GPU"))
    next(iter(Digits().train_dataloader()))


def test_transform_of_a_loader_may_be_switched() -> None:
    data = Digits(batch_size=64)
    loader = data.train_dataloader()
    assert isinstance(loader.dataset, Samples)
    loader.dataset.transform = data.eval_transform
    source = data.source("train")
    clean = {data.eval_transform(source[index][0]).numpy().tobytes() for index in range(len(source))}
    assert all(image.numpy().tobytes() in clean for image in next(iter(loader))[0])
    other = data.train_dataloader().dataset
    assert isinstance(other, Samples)
    assert other.transform is data.train_transform


# With a Trainer


@pytest.mark.slow
@any_machine
def test_trainer_sees_the_same_batches_with_and_without_workers() -> None:
    runs = []
    for workers in (0, 2):
        lightning.seed_everything(7, verbose=False)
        model, data = Recorder(), Digits(batch_size=128, num_workers=workers)
        trainer(max_epochs=2).fit(model, data)
        runs.append((model.seen, model.layer.weight))
    (seen, weight), (seen_with_workers, weight_with_workers) = runs
    assert seen == seen_with_workers
    assert torch.equal(weight, weight_with_workers)
    assert len({batch for _, batch in seen}) == len(seen) == 2 * 9
    lightning.seed_everything(7, verbose=False)
    assert [batch for epoch in passes(Digits(batch_size=128), (0, 1)) for batch in epoch] == [b for _, b in seen]


@any_machine
def test_each_fit_takes_the_seed_of_its_time() -> None:
    data, runs = Digits(batch_size=600), []
    for seed in (1, 1, 2):
        lightning.seed_everything(seed, verbose=False)
        model = Recorder()
        trainer(max_epochs=1).fit(model, data)
        runs.append(model.seen)
    assert runs[0] == runs[1] != runs[2]


@any_machine
@pytest.mark.parametrize(
    ("when", "workers"),
    [
        ({"every_n_train_steps": 1}, 0),
        pytest.param({"every_n_train_steps": 1}, 1, marks=pytest.mark.slow),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, 0),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, 0),
    ],
    ids=["batch", "batch with a worker", "epoch", "validation"],
)
def test_a_resumed_run_sees_what_the_whole_run_saw(tmp_path: Path, when: dict[str, Any], workers: int) -> None:
    def fit(model: Recorder, path: Path | None = None) -> None:
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
        run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keep])
        run.fit(model, Digits(batch_size=400, num_workers=workers), ckpt_path=path, weights_only=True)

    torch.manual_seed(5)
    whole = Recorder()
    fit(whole)
    assert len(whole.seen) == 6
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == (6 if "every_n_train_steps" in when else 2)
    for path in paths[1:4] if workers else paths:
        torch.manual_seed(6)  # the seed comes from the checkpoint
        resumed = Recorder()
        fit(resumed, path)
        assert resumed.seen == whole.seen[int(path.stem.split("=")[1]) :], path.stem
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@any_machine
def test_trainer_runs_every_stage(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("L", (9, 9)).save(folder / "more" / "one.png")
    data, model = Digits(predict_dir=str(folder)), Recorder()
    run = trainer(max_epochs=1)
    run.fit(model, data)
    assert run.validate(model, data, verbose=False)
    assert run.test(model, data, verbose=False) == [{"count": 360.0}]
    predicted = run.predict(model, data)
    assert predicted == [tuple(sorted(str(path) for path in folder.rglob("*.*g")))]


# Several processes


@pytest.mark.parametrize(("size", "replicas"), [(12, 2), (13, 4), (3, 8)])
def test_ranks_are_disjoint_and_cover_everything(size: int, replicas: int) -> None:
    source = [(Image.new("L", (1, 1)), 0)] * size
    samples = Samples(source, lambda image: torch.zeros(1), seed=0)
    samplers = [ShuffleSampler(samples, replicas, rank, seed=1) for rank in range(replicas)]
    shares = []
    for sampler in samplers:
        sampler.set_epoch(2)
        shares.append([index - 2 * size for index in sampler])
        assert len(shares[-1]) == len(sampler)
    everything = [index for share in shares for index in share]
    assert set(everything) == set(range(size))
    assert len(everything) == -(-size // replicas) * replicas
    if size % replicas == 0:
        assert len(set(everything)) == len(everything)


@pytest.mark.slow
@any_machine
def test_two_processes_share_the_training_images(tmp_path: Path) -> None:
    data = Digits(batch_size=629)
    data.train_transform = data.eval_transform
    run = trainer(max_epochs=2, devices=2, strategy="ddp_fork", limit_val_batches=0)
    run.fit(SeedsApart(tmp_path), data)
    shares = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    source = data.source("train")
    whole = sorted((data.eval_transform(source[i][0]).numpy().tobytes(), source[i][1]) for i in range(len(source)))
    for epoch in (0, 1):
        both = [row for share in shares for row in share[epoch * 629 : (epoch + 1) * 629]]
        assert len(both) == 1258
        assert sorted(set(both)) == sorted(set(whole))  # one image is repeated to make the shares equal
    assert shares[0][:629] != shares[0][629:]


def test_auto_workers_share_the_cores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(48)), raising=False)
    data = ImageFolder(str(folder), batch_size=4)
    assert data._workers() == 16
    data.trainer = trainer(devices=4, strategy="ddp_spawn")
    assert data._workers() == 12
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    assert data._workers() == 1
    assert Digits()._workers() == 0


# CIFAR


@pytest.mark.parametrize(("kind", "train", "test"), [(CIFAR10, 100, 30), (CIFAR100, 300, 100)])
def test_cifar_gives_all_splits_in_its_layout(cifar: Path, kind: type[CIFAR10], train: int, test: int) -> None:
    val = train // 3 if kind is CIFAR100 else 20
    data = kind(str(cifar), batch_size=7, download=False, val_size=val, num_workers=0)
    assert data.hparams["val_size"] == val
    assert len(set(data.classes)) == data.num_classes == (10 if kind is CIFAR10 else 100)
    data.prepare_data()
    data.setup()
    loaders: list[DataLoader[Any]] = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    labels = [torch.cat([labels for _, labels in loader]) for loader in loaders]
    assert [len(part) for part in labels] == [(train - val) // 7 * 7, val, test]
    assert np.bincount(labels[1]).tolist() == [val // data.num_classes] * data.num_classes
    images, _ = next(iter(loaders[0]))
    assert images.shape == (7, *data.input_size)
    assert images.dtype == torch.float32
    samples = data.source("test")
    expected = (np.asarray(samples[0][0]) / 255 - data._mean) / data._std
    np.testing.assert_allclose(loaders[2].dataset[0][0].numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert data.eval_transform(Image.new("L", (50, 80))).shape == (3, 32, 32)


def test_cifar_split_is_decided_by_its_seed_alone(cifar: Path) -> None:
    def indices(split: Any, **kwargs: Any) -> list[int]:
        source = CIFAR10(str(cifar), val_size=20, download=False, **kwargs).source(split)
        assert isinstance(source, MemorySource)
        return source.rows.tolist()

    torch.manual_seed(1)
    first = indices("val")
    torch.manual_seed(2)
    assert indices("val") == first != indices("val", split_seed=1)
    assert sorted(indices("train") + first) == list(range(100))


def test_cifar_without_validation_images_validates_on_the_test(cifar: Path) -> None:
    data = CIFAR10(str(cifar), batch_size=50, val_size=0, download=False)
    data.setup()
    assert [len(data.source(split)) for split in SPLITS] == [100, 30, 30]
    assert not data.has_test, "a report would show the same images twice"
    assert CIFAR10(str(cifar), val_size=10, download=False).has_test
    for val_size in (9, 91):
        with pytest.raises(ValueError, match=rf"val_size={val_size} .*10 to 90"):
            CIFAR10(str(cifar), val_size=val_size, download=False).setup("fit")


def test_cifar_tells_what_to_do_about_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py.*download=True"):
        CIFAR10(root, download=False).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"CIFAR100 .*prepare_data\(\)"):
        CIFAR100(root).setup("fit")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(OSError, match=r"CIFAR10 .*no route to host.*try again"):
        CIFAR10(root).prepare_data()


# ImageFolder


def test_image_folder_gives_all_splits_in_its_layout(folder: Path) -> None:
    data = ImageFolder(str(folder), image_size=16, batch_size=5, num_workers=0)
    assert (data.classes, data.num_classes, data.input_size) == (list(CLASSES), 3, (3, 16, 16))
    data.setup()
    train, val = final(data, data.train_dataloader()), final(data, data.val_dataloader())
    assert [len(labels) for _, labels in train] == [5, 5]
    assert [len(labels) for _, labels in val] == [5, 1]
    assert torch.cat([labels for _, labels in val]).tolist() == [0, 0, 1, 1, 2, 2]
    assert train[0][0].shape == (5, 3, 16, 16)
    assert (train[0][0].dtype, train[0][1].dtype) == (torch.float32, torch.int64)
    picture = read_image(str(folder / "val" / "ant" / "0.jpg"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(val[0][0][0], (data.eval_transform(picture) - mean) / std)
    with pytest.raises(FileNotFoundError, match="no test split"):
        data.test_dataloader()
    for name in CLASSES:
        write_images(folder / "test" / name, 1)
    assert [len(labels) for _, labels in ImageFolder(str(folder), 16, 5, num_workers=0).test_dataloader()] == [3]


def test_image_folder_sizes_and_augmentations(folder: Path) -> None:
    root = str(folder)
    sizes = [{}, {"image_size": 16}, {"image_size": 16, "resize_size": 20}]
    crops = [ImageFolder(root, **size).eval_transform for size in sizes]
    assert [str(crop) for crop in crops] == [
        f"CentreCrop({size}, resize_size={resize_size})" for size, resize_size in ((224, 256), (16, 18), (16, 20))
    ]
    words = {"paper": "Jitter", "basic": "None", "trivial": "TrivialAug", "rand": "RandAug", "augmix": "AugMix"}
    for name, word in words.items():
        assert word in str(ImageFolder(root, augmentation=name).train_transform)  # type: ignore[arg-type]
    plain = ImageFolder(root, augmentation="none")
    assert plain.train_transform is plain.eval_transform


@any_machine
def test_image_folder_batches_do_not_depend_on_the_workers(folder: Path) -> None:
    runs = []
    for workers in (0, 2):
        torch.manual_seed(2)
        runs.append(passes(ImageFolder(str(folder), 16, 4, num_workers=workers), (0, 1)))
    assert runs[0] == runs[1]
    assert len({batch for epoch in runs[0] for batch in epoch}) == 6


def test_hyper_parameters_are_plain(folder: Path) -> None:
    data = ImageFolder(folder, batch_size=4)  # type: ignore[arg-type]
    assert data.hparams["root"] == str(folder)
    assert data.hparams["mean"] == (123.68, 116.779, 103.939)
    assert dict(Digits(split_seed=3).hparams) == {
        "batch_size": 64,
        "num_workers": "auto",
        "split_seed": 3,
        "predict_dir": None,
        "eval_size": None,
        "image_size": 8,
        "images_on": "auto",
    }
    for module in (data, Digits()):
        assert pickle.loads(pickle.dumps(module)).classes == module.classes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls what jsonargparse has deprecated since
@any_machine
def test_command_line_builds_every_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*args: str) -> Any:
        monkeypatch.setattr("sys.argv", ["test", *args])
        return LightningCLI(Recorder, subclass_mode_data=True, run=False, save_config_callback=None).datamodule

    assert isinstance(parse("--data=Digits", "--data.batch_size=32"), Digits)
    assert parse("--data=CIFAR10", "--data.num_workers=auto").num_workers == "auto"
    assert parse("--data=CIFAR100", "--data.num_workers=3", "--data.val_size=0").num_workers == 3
    data = parse("--data=lit_tricks.data.ImageFolder", f"--data.root={folder}", "--data.mean=[0,0,0]")
    assert (tuple(data.hparams["mean"]), data.num_classes) == ((0, 0, 0), 3)


# Bad input: one message that names what is wrong and what to do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0.*at least 1"),
        ({"num_workers": -1}, 'num_workers=-1.*"auto"'),
        ({"num_workers": "all"}, "num_workers='all'"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 32, "resize_size": 31}, "resize_size=31 is less than image_size=32"),
        ({"augmentation": "papr"}, "augmentation='papr'.*'paper', 'basic'"),
        ({"std": (1.0, 0.0, 1.0)}, r"std=\(1\.0, 0\.0, 1\.0\)"),
    ],
)
def test_arguments_out_of_range(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(folder), **arguments)
    if arguments.keys() & {"batch_size", "num_workers"}:
        for kind in (Digits, CIFAR10, CIFAR100):
            with pytest.raises(ValueError, match=message):
                kind(**arguments)
    with pytest.raises(ValueError, match=r"val_size=-1"):
        CIFAR10(val_size=-1)


def test_batch_larger_than_the_training_set() -> None:
    message = r"batch_size=1258 is larger than the 1257 training images, .*: use a batch_size of at most 1257"
    with pytest.raises(ValueError, match=message):
        Digits(batch_size=1258).setup("fit")
    with pytest.raises(ValueError, match=message):
        Digits(batch_size=1258).train_dataloader()
    data = Digits(batch_size=630)
    data.trainer = trainer(devices=2, strategy="ddp_spawn")
    with pytest.raises(ValueError, match=r"629 training images .*2 processes"):
        data.setup("fit")
    assert len(Digits(batch_size=1257).train_dataloader()) == 1
    Digits(batch_size=5000).setup("test")


def test_folders_that_are_not_there(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*not a folder.*ROOT/train/CLASS"):
        ImageFolder(str(tmp_path / "nowhere"))
    for split in ("val", "train"):
        (folder / split).rename(folder / "away")
        with pytest.raises(FileNotFoundError, match=rf"no folder '{split}'.*ROOT/train/CLASS"):
            ImageFolder(str(folder))
        (folder / split).mkdir()
        with pytest.raises(FileNotFoundError, match=rf"no class folder .*{split}'.*ROOT/train/CLASS"):
            ImageFolder(str(folder))
        (folder / split).rmdir()
        (folder / "away").rename(folder / split)


def test_class_folders_without_images(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "dog").mkdir()
        (folder / split / "dog" / "readme.txt").write_text("nothing")
    data = ImageFolder(str(folder), batch_size=4)
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 class folders .*train': dog; .*\.jpg"):
        data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 class folders .*val': dog"):
        data.setup("validate")


def test_class_folders_that_differ(folder: Path) -> None:
    (folder / "val" / "ant").rename(folder / "val" / "Ant")
    with pytest.raises(ValueError, match="only in train: ant; only in val: Ant"):
        ImageFolder(str(folder))
    (folder / "val" / "Ant").rename(folder / "val" / "ant")
    for number in range(7):
        (folder / "test" / f"t{number}").mkdir(parents=True)
    with pytest.raises(ValueError, match="only in test: t0, t1, t2, t3, t4 and 2 more"):
        ImageFolder(str(folder))


@any_machine
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_named(folder: Path, workers: int) -> None:
    path = folder / "val" / "bee" / "0.jpg"
    content = path.read_bytes()
    data = ImageFolder(str(folder), 16, 4, num_workers=workers)
    for broken in (content[: len(content) // 2], b"not an image", b""):
        path.write_bytes(broken)
        with pytest.raises(RuntimeError, match=r"cannot read .*val/bee/0\.jpg.*remove it"):
            trainer().validate(Recorder(), data)


def test_folders_to_predict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="predict_dir is not set"):
        Digits().predict_dataloader()
    with pytest.raises(FileNotFoundError, match=r"predict_dir='.*nowhere'"):
        Digits(predict_dir=str(tmp_path / "nowhere"))
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"no image below predict_dir=.*\.jpg"):
        Digits(predict_dir=str(tmp_path)).setup("predict")


@pytest.mark.parametrize(("size", "ratio", "resize"), [(12, None, 13.7), (20, 0.5, 40), (16, 1.0, 16)])
def test_evaluation_at_another_size(folder: Path, size: int, ratio: float | None, resize: float) -> None:
    image = read_image(str(folder / "val" / "ant" / "0.jpg"))
    found = ImageFolder(str(folder), image_size=14, resize_size=16).eval_transform_at(size, ratio)(image)
    expected = ImageFolder(str(folder), image_size=size, resize_size=round(resize)).eval_transform(image)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("data", [Digits(), CIFAR10()])
def test_evaluation_at_other_sizes_of_small_images(data: ImageDataModule) -> None:
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (*data.input_size[1:], 3), dtype=np.uint8))
    for size in (6, 40):
        assert data.eval_transform_at(size)(image).shape == (data.input_size[0], size, size)
    with pytest.raises(ValueError, match=r"crop_ratio .*got 0"):
        data.eval_transform_at(8, 0)
