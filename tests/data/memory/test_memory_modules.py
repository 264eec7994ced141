"""Data modules whose images are in memory: where the images are, who shares them, and that batches are the same."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from lit_tricks.data import CIFAR10, CIFAR100, Digits
from lit_tricks.data.cifar import CIFARFiles
from lit_tricks.data.memory import stored as stored_module
from lit_tricks.data.memory.loader import MemorySamples, MemoryTrainLoader
from lit_tricks.data.memory.stored import MemorySource, Stored, stored
from lit_tricks.data.transforms import to_pixels, to_rgb

META = torch.device("meta")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"flip": "alternating", "padding": "reflect", "cutout": 8},
    {"crop_scale": (0.3, 1)},
]
any_machine = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
)


class Recorder(LightningModule):
    """One layer that keeps the batches it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LazyLinear(10)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append((images.clone(), labels.clone()))
        return torch.nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.layer(batch[0].flatten(1)).sum())

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return batch[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.layer(torch.zeros(2, 3072, dtype=self.dtype))
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(**kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, **{"enable_checkpointing": False, **quiet, **kwargs})


@pytest.fixture
def make(cifar: Path) -> Callable[..., CIFAR10]:
    """CIFAR-10 with 80 training, 20 validation and 30 test images."""
    return lambda **kwargs: CIFAR10(str(cifar), download=False, **{"batch_size": 16, "val_size": 20, **kwargs})


def epoch_of(data: Any, epoch: int = 0) -> list[list[Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def equal(left: Any, right: Any) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def samples_of(loader: DataLoader[Any]) -> MemorySamples:
    assert isinstance(loader.dataset, MemorySamples)
    return loader.dataset


# The batches


@any_machine
@pytest.mark.parametrize(
    "options", [{}, {"flip": "alternating", "padding": "reflect", "cutout": 8}, {"crop_scale": (0.3, 1)}]
)
def test_batches_do_not_depend_on_workers_or_processes(make: Callable[..., CIFAR10], options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = [epoch_of(make(**options), epoch) for epoch in (0, 1)]
    assert [len(epoch) for epoch in expected] == [5, 5]
    assert not equal(*expected)
    if not options:
        with_workers = make(num_workers=2)
        assert [equal(epoch_of(with_workers, epoch), expected[epoch]) for epoch in (0, 1)] == [True, True]
    halves = []
    for rank in (0, 1):
        data = make(batch_size=8, **options)
        data._replicas = lambda rank=rank: (2, rank)  # type: ignore[method-assign, misc]
        halves.append(epoch_of(data))
    for (images, labels), *parts in zip(expected[0], *halves, strict=True):
        assert torch.equal(images, torch.stack([part[0] for part in parts], 1).flatten(0, 1))
        assert torch.equal(labels, torch.stack([part[1] for part in parts], 1).flatten())


def test_batches_of_other_transforms_are_made_image_by_image(make: Callable[..., CIFAR10]) -> None:
    torch.manual_seed(1)
    data = make()
    assert isinstance(data.train_dataloader(), MemoryTrainLoader)
    data.train_transform = v2.Compose([to_rgb, v2.RandomCrop(32, padding=4), to_pixels])
    data.num_workers = 0
    first = epoch_of(data)
    assert equal(first, epoch_of(data))
    source = samples_of(data.train_dataloader()).source
    centers = {to_pixels(source[i][0])[:, 8:24, 8:24].numpy().tobytes() for i in range(len(source))}
    for image in first[0][0]:
        crops = {image[:, y : y + 16, x : x + 16].numpy().tobytes() for y in range(4, 13) for x in range(4, 13)}
        assert len(crops & centers) == 1
    data.train_transform = make().train_transform
    assert equal(epoch_of(data), epoch_of(make()))


def test_options_are_checked(make: Callable[..., CIFAR10]) -> None:
    for arguments, message in (
        ({"image_size": 0}, "image_size=0"),
        ({"translate": 32}, "translate=32"),
        ({"translate": -1}, "translate=-1"),
        ({"image_size": 8, "cutout": 9}, "cutout=9"),
        ({"padding": "edge"}, "padding='edge'"),
        ({"flip": "always"}, "flip='always'"),
        ({"crop_scale": (0.5, 0.25)}, r"crop_scale=.* Swap"),
        ({"crop_scale": (0, 1)}, "crop_scale="),
        ({"images_on": "gpu"}, "images_on.*gpu"),
        ({"images_on": "device", "num_workers": 2}, "images_on.*num_workers=2"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**arguments)
    assert make(images_on="device", num_workers=0).train_transform.translate == 4
    assert make(image_size=24).train_transform.translate == 3
    assert make(crop_scale=(0.25, 1)).train_transform.translate == 0


def test_sizes_of_training_and_evaluation(make: Callable[..., CIFAR10]) -> None:
    data = make(image_size=24, crop_scale=[0.25, 1.0], eval_size=32)
    assert data.input_size == (3, 24, 24)
    assert epoch_of(data)[0][0].shape == (16, 3, 24, 24)
    assert next(iter(data.val_dataloader()))[0].shape == (16, 3, 32, 32)
    assert next(iter(make(image_size=24).test_dataloader()))[0].shape == (16, 3, 24, 24)


# With a Trainer


@any_machine
@pytest.mark.parametrize("saved", [{"every_n_train_steps": 1}, {"every_n_epochs": 1}], ids=str)
def test_a_resumed_run_sees_what_the_whole_run_saw(
    make: Callable[..., CIFAR10], tmp_path: Path, saved: dict[str, Any]
) -> None:
    def fit(path: Path | None = None) -> Recorder:
        keep = ModelCheckpoint(tmp_path / "run", "{step}", save_top_k=-1, **saved)
        model = Recorder()
        run = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep])
        run.fit(model, make(batch_size=40, flip="alternating"), ckpt_path=path, weights_only=True)
        return model

    torch.manual_seed(5)
    whole = fit()
    assert len(whole.seen) == 6
    for path in sorted((tmp_path / "run").glob("*.ckpt")):
        torch.manual_seed(6)  # the seed comes from the checkpoint
        resumed = fit(path)
        assert equal(resumed.seen, whole.seen[int(path.stem.split("=")[1]) :])
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_resume_with_other_batches_is_an_error(make: Callable[..., CIFAR10]) -> None:
    loader = make().train_dataloader()
    assert loader.state_dict() == {}
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    other = make(batch_size=8).train_dataloader()
    other.load_state_dict(state)
    assert other.state_dict() == state
    with pytest.raises(ValueError, match="batches of 16"):
        next(iter(other))
    with pytest.raises(RuntimeError, match="num_workers=1"):
        make(num_workers=1).train_dataloader().load_state_dict(state)
    same = make().train_dataloader()
    same.load_state_dict(state)
    assert len(list(same)) == 4
    same.sampler.set_epoch(1)
    assert len(list(same)) == 5


@any_machine
def test_limits_of_trainer_are_respected(make: Callable[..., CIFAR10]) -> None:
    model = Recorder()
    trainer(max_epochs=2, limit_train_batches=3).fit(model, make())
    assert len(model.seen) == 6
    assert not equal(model.seen[:3], model.seen[3:])
    model = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the training data is not shuffled
        trainer(max_epochs=2, overfit_batches=2).fit(model, make())
    assert [labels.tolist() for _, labels in model.seen[:2]] == [labels.tolist() for _, labels in model.seen[2:]]
    assert len(model.seen) == 4
    data = make(val_size=0, batch_size=50)
    trainer(max_epochs=1).fit(Recorder(), data)
    assert len(data.source("val")) == 30
    labels = trainer().predict(Recorder(), make().test_dataloader())
    assert torch.cat(labels).tolist() == make().source("test").stored.labels.tolist()  # type: ignore[arg-type, attr-defined]
    with pytest.raises(ValueError, match="batch_size=81"):
        make(batch_size=81).setup("fit")


@any_machine
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("16-true", torch.float16), ("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)],
)
def test_images_have_the_precision_of_the_trainer(make: Callable[..., CIFAR10], precision: Any, dtype: Any) -> None:
    torch.manual_seed(0)
    model, data = Recorder(), make(crop_scale=(0.3, 1))
    trainer(max_epochs=1, precision=precision).fit(model, data)
    torch.manual_seed(0)
    expected = [[images.to(dtype), labels] for images, labels in epoch_of(make(crop_scale=(0.3, 1)))]
    assert {images.dtype for images, _ in model.seen} == {dtype}
    assert equal(model.seen, expected)


# Where the images are


def on(data: Any, device: torch.device = META) -> Any:
    """Let a data module take a device for the Trainer's."""
    data.trainer = trainer()
    data.trainer.strategy._root_device = device
    data.trainer.strategy.__class__ = type("Strategy", (type(data.trainer.strategy),), {"root_device": device})
    return data


@pytest.mark.parametrize("where", ["auto", "device", "host"])
def test_batches_are_made_on_the_device(make: Callable[..., CIFAR10], where: str) -> None:
    data = on(make(images_on=where))
    loader = data.train_dataloader()
    place = samples_of(loader).place()
    assert {part.device for part in place} == {torch.device("cpu") if where == "host" else META}
    for batches in (loader, data.val_dataloader(), data.test_dataloader()):
        assert batches.num_workers == 0
        assert not batches.pin_memory
        assert {part.device for batch in batches for part in batch} == {META}
    assert {part.device for part in samples_of(loader)[3]} == {META}
    data.teardown()
    assert not samples_of(loader).source.stored._on


def test_workers_keep_the_images_in_the_memory_of_the_host(make: Callable[..., CIFAR10]) -> None:
    samples = samples_of(on(make(num_workers=2)).train_dataloader())
    assert samples.place()[0].device.type == "cpu"
    assert samples[0][0].device.type == "cpu"


@pytest.mark.parametrize("reason", ["free", "raised"])
def test_a_device_without_room(make: Callable[..., CIFAR10], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "free":
        monkeypatch.setattr(stored_module, "_free_bytes", lambda device: 2 * 100 * 3072 - 1)
    else:

        def full(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        class Full(Tensor):
            to = full

        load = CIFARFiles.load
        monkeypatch.setattr(CIFARFiles, "load", lambda self: tuple(part.as_subclass(Full) for part in load(self)))
    data = on(make())
    loaders = [data.train_dataloader(), data.val_dataloader()] * 2
    with pytest.warns(UserWarning, match="images stay in the host's memory") as warned:
        places = [samples_of(loader).place() for loader in loaders]
    assert {place[0].device.type for place in places} == {"cpu"}
    assert len(warned) == 1
    if reason == "free":
        assert {part.device for batch in loaders[0] for part in batch} == {META}
        monkeypatch.setattr(stored_module, "_free_bytes", lambda device: 2 * 100 * 3072)
        assert samples_of(on(make()).train_dataloader()).place()[0].device.type == "cpu"  # the same images, no room
        data.teardown()
        assert samples_of(on(make()).train_dataloader()).place()[0].device == META


@pytest.mark.filterwarnings("ignore:images stay in the host's memory")
def test_processes_that_share_a_device_take_it_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    free = iter([2.5 * images.nbytes, 1.5 * images.nbytes, 0.5 * images.nbytes])
    monkeypatch.setattr(stored_module, "_free_bytes", lambda device: next(free))
    processes = [Stored(images, labels) for _ in range(3)]
    assert [each.on(META, 0.95) is not None for each in processes] == [True, True, False]
    assert [each.on(META, 0.95) is not None for each in processes] == [True, True, False]  # decided once


def test_free_memory_is_measured_for_each_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4)
    free = {kind: stored_module._free_bytes(torch.device(kind)) for kind in ("cuda", "mps", "xpu")}
    assert free == {"cuda": 7, "mps": 8, "xpu": None}


# Who shares the images


@pytest.mark.slow
def test_one_copy_per_process(make: Callable[..., CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: Any = type(stored_module._loaded)()
    monkeypatch.setattr(stored_module, "_loaded", loaded)
    data = make()
    data.setup()
    one = data.source("train").stored  # type: ignore[attr-defined]
    assert len(loaded) == 2  # training files and test files
    others = [make(split_seed=1), copy.deepcopy(data), pickle.loads(pickle.dumps(data))]
    for other in others:
        other.setup()
        for split in ("train", "val"):
            assert other.source(split).stored is one
    loader = data.train_dataloader()
    assert samples_of(copy.deepcopy(loader)).source.stored is one
    assert samples_of(pickle.loads(pickle.dumps(loader))).source.stored is one
    assert len(loaded) == 2
    assert len(pickle.dumps(data)) < one.images.nbytes / 20
    del data, others, other, loader, one
    gc.collect()
    assert not loaded


def test_other_processes_load_the_images_anew(make: Callable[..., CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    expected = epoch_of(data)
    pickles = [pickle.dumps(thing) for thing in (data, samples_of(data.train_dataloader()))]
    monkeypatch.setattr(stored_module, "_loaded", type(stored_module._loaded)())
    twin, samples = map(pickle.loads, pickles)
    assert not stored_module._loaded  # until they are needed
    assert equal(epoch_of(twin), expected)
    whole = samples.__getitems__(
        samples_of(data.train_dataloader()).__class__ and data.train_dataloader().sampler.order(0)[:16]
    )
    assert equal([whole.whole], expected[:1])
    assert len(stored_module._loaded) == 1


def test_changed_files_are_loaded_anew(make: Callable[..., CIFAR10], cifar: Path) -> None:
    data = make()
    data.setup("test")
    path = cifar / "cifar-10-batches-py" / "test_batch"
    content = pickle.loads(path.read_bytes())
    content["data"][:] = 7
    path.write_bytes(pickle.dumps(content))
    other = make()
    other.setup("test")
    assert (other.source("test").stored.images == 7).all()  # type: ignore[attr-defined]
    assert not (data.source("test").stored.images == 7).all()  # type: ignore[attr-defined]


def test_images_of_a_source(cifar: Path) -> None:
    for kind in (CIFAR10, CIFAR100):
        source = kind(str(cifar), download=False).source("test")
        assert isinstance(source, MemorySource)
        reader = kind._reader(str(cifar), train=False)
        for index in (0, len(source) - 1):
            image, label = reader[index]
            assert source[index][0].tobytes() == image.tobytes()
            assert source[index][1] == label
    digits = Digits().source("val")
    assert digits[0][0].mode == "F"
    assert isinstance(digits[0][0], Image.Image)
    assert isinstance(stored(digits.image_set), Stored)  # type: ignore[attr-defined]
