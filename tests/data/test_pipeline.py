"""The pipeline of ImageFolder: crops against torchvision, and what the loaders and the hook make of a batch."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photos import jpeg, photo
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate
from torchvision.transforms import v2

from lit_tricks.callbacks import ChannelsLast, CutMix
from lit_tricks.data import ImageFolder
from lit_tricks.data.crops import CentreCrop, RandomCrop, generator_at
from lit_tricks.data.io.jpeg import decode_image
from lit_tricks.data.loader import BalancedSampler, EvalSampler, ShuffleSampler, eval_batch_size
from lit_tricks.data.samples import Samples

CLASSES = ("ant", "bee", "cow")
SIZES = ((500, 375), (333, 500), (640, 200), (120, 90))

# Lightning and Python warn according to the machine: its cores, its GPU, its way to start processes.
any_machine = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:Checkpoint directory .* exists and is not empty",
)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder of 21 training and 7 validation images."""
    for label, name in enumerate(CLASSES):
        for split, count in (("train", 7), ("val", 3 if label == 0 else 2)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                image = photo(40 + 3 * index, 30 + label, seed=20 * label + index + 10 * (split == "val"))
                (tmp_path / split / name / f"{index}.jpg").write_bytes(jpeg(image))
    return str(tmp_path)


class Net(LightningModule):
    """A convolution with batch normalization that notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 3)
        self.batches: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.batches.append(images)
        return nn.functional.cross_entropy(self.head(self.net(images)), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.evaluated.append(images)
        self.log("loss", nn.functional.cross_entropy(self.head(self.net(images)), labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", **{"devices": 1, "enable_checkpointing": False, **quiet, **kwargs})


def fingerprint(*tensors: Tensor) -> str:
    return hashlib.sha1(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def psnr(found: Tensor, expected: Tensor) -> float:
    return float(20 * np.log10(255 / max((found.double() - expected.double()).square().mean().sqrt().item(), 1e-9)))


# Crops


@pytest.mark.parametrize("exact", [False, True], ids=["auto", "exact"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(("size", "resize_size"), [(224, 256), (160, 160), (64, 72)])
def test_validation_is_that_of_torchvision(exact: bool, subsampling: int, size: int, resize_size: int) -> None:
    """Equal to the result for a tensor bit for bit, and for a PIL image except for rounding."""
    reference = v2.Compose([v2.Resize(resize_size, antialias=True), v2.CenterCrop(size)])
    for width, height in SIZES:
        data = jpeg(photo(width, height), subsampling=subsampling)
        found = CentreCrop(size, resize_size)(decode_image(data, "a.jpg", exact))
        whole = Image.open(io.BytesIO(data))
        assert (found.dtype, found.shape) == (torch.uint8, (3, size, size))
        assert torch.equal(found, reference(v2.functional.pil_to_tensor(whole)))
        expected = v2.functional.pil_to_tensor(reference(whole))
        assert (found.int() - expected.int()).abs().max() <= 2
        assert size != 224 or psnr(found, expected) >= 70  # others may have many halves, which are rounded either way


@pytest.mark.parametrize("exact", [False, True], ids=["auto", "exact"])
def test_random_crops_are_parts_of_the_image(exact: bool) -> None:
    found, expected = [], []
    for seed in range(24):
        width, height = SIZES[seed % len(SIZES)]
        data = jpeg(photo(width, height), subsampling=2 * (seed % 2))
        image = decode_image(data, "a.jpg", exact)
        found.append(RandomCrop(96)(image, generator_at(5, 0, seed)))
        generator = generator_at(5, 0, seed)
        top, left, h, w = RandomCrop.box(width, height, generator)
        whole = Image.fromarray(np.asarray(decode_image(data, "a.jpg", exact=True)))
        crop = v2.functional.resized_crop(whole, top, left, h, w, [96, 96], antialias=True)
        crop = v2.functional.pil_to_tensor(crop)
        expected.append(crop.flip(2) if generator.random() < 0.5 else crop)
    assert psnr(torch.stack(found), torch.stack(expected)) >= 70


@pytest.mark.parametrize("size", [(500, 375), (640, 100), (90, 700)])
def test_boxes_are_distributed_as_those_of_torchvision(size: tuple[int, int]) -> None:
    width, height = size
    ours = np.array([RandomCrop.box(width, height, generator_at(1, 0, index)) for index in range(3000)])
    crop, image = v2.RandomResizedCrop(8, scale=(0.08, 1), ratio=(3 / 4, 4 / 3)), torch.empty(3, height, width)
    torch.manual_seed(0)
    given = [crop.make_params([image]) for _ in range(3000)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in given])
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    for mine, other in zip(ours.T, theirs.T, strict=True):  # Kolmogorov and Smirnov, at a level of one in a million
        values = np.concatenate([mine, other])
        shares = [np.searchsorted(np.sort(part), values, side="right") / 3000 for part in (mine, other)]
        assert np.abs(shares[0] - shares[1]).max() < 2.69 * np.sqrt(2 / 3000)


def test_a_crop_takes_any_image_and_draws_from_torch_too() -> None:
    image = photo(50, 40)
    torch.manual_seed(1)
    first, second = RandomCrop(16)(image), RandomCrop(16)(image)
    torch.manual_seed(1)
    assert torch.equal(RandomCrop(16)(image), first)
    assert not torch.equal(first, second)
    for other in (image.convert("L"), image.convert("RGBA"), image.convert("CMYK")):
        assert CentreCrop(16, 20)(other).shape == (3, 16, 16)


# Batches


@pytest.mark.slow
@any_machine
def test_batches_depend_on_the_seed_alone(folder: str) -> None:
    kinds: list[dict[str, Any]] = [
        {"augmentation": name, "random_erasing": erasing, "repeats": repeats}
        for name, erasing, repeats in (("paper", 0.0, 1), ("basic", 0.5, 3), ("trivial", 0.0, 1), ("rand", 0.5, 1))
    ]
    kinds.append({"augmentation": "augmix"})
    seen = set()
    for kind in kinds:
        runs = []
        for workers, how in ((0, "process"), (2, "process"), (3, "thread")):
            torch.manual_seed(3)
            data = ImageFolder(folder, 16, 5, workers, workers=how, **kind)  # type: ignore[arg-type]
            loader, run = data.train_dataloader(), []
            for epoch in (0, 2):
                loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
                run += [fingerprint(*batch) for batch in loader]
            runs.append(run)
        assert runs[0] == runs[1] == runs[2]
        seen.update(runs[0])
    assert len(seen) == len(kinds) * 2 * 4


@any_machine
@pytest.mark.parametrize("how", ["process", "thread"])
def test_workers_that_are_born_in_inference_mode(folder: str, how: Any) -> None:
    data = ImageFolder(folder, 16, 4, 2, workers=how)
    expected = [fingerprint(*batch) for batch in ImageFolder(folder, 16, 4, 0).val_dataloader()]
    with torch.inference_mode():
        assert [fingerprint(*batch) for batch in data.val_dataloader()] == expected


def test_decoding_less_changes_nothing(folder: str) -> None:
    batches = []
    for decode in ("auto", "exact"):
        torch.manual_seed(3)
        data = ImageFolder(folder, 16, 7, 0, decode=decode)  # type: ignore[arg-type]
        batches.append(
            [fingerprint(*batch) for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
        )
    assert batches[0] == batches[1]


def test_loader_gives_small_batches(folder: str) -> None:
    data = ImageFolder(folder, 16, 7, 0)
    images, labels, matrices = next(iter(data.train_dataloader()))
    assert (images.dtype, labels.dtype, matrices.dtype) == (torch.uint8, torch.int64, torch.int32)
    assert (images.shape, labels.shape, matrices.shape) == ((7, 3, 16, 16), (7,), (7, 3, 4))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert len(next(iter(ImageFolder(folder, 16, 7, 0, augmentation="basic").train_dataloader()))) == 2
    assert len(next(iter(data.val_dataloader()))) == 2


def test_samples_alone_or_in_a_subset(folder: str) -> None:
    data = ImageFolder(folder, 16, 7, 0)
    samples = data.train_dataloader().dataset
    assert isinstance(samples, Samples)
    images, labels, matrices = default_collate(Subset(samples, [4, 2, 9]).__getitems__([0, 1, 2]))
    for row, index in enumerate((4, 2, 9)):
        image, label, matrix = samples[index]
        assert torch.equal(images[row], image)
        assert (label, True) == (labels[row], torch.equal(matrices[row], matrix))


def test_the_hook_gives_normalised_images(folder: str) -> None:
    data = ImageFolder(folder, 16, 7, 0)
    images, labels = next(iter(data.val_dataloader()))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    expected = (images - mean) / std
    found = data.on_after_batch_transfer([images, labels], 0)
    torch.testing.assert_close(found[0], expected)
    assert found[1] is labels
    assert data.on_after_batch_transfer(found, 0)[0] is found[0]  # floats are left as they are
    assert data.on_after_batch_transfer(images, 0) is images  # what is no batch of ours, too
    both = data.on_after_batch_transfer([(images, images[:, :, :9]), labels], 0)[0]
    torch.testing.assert_close(both, [expected, expected[:, :, :9]])
    each = data.on_after_batch_transfer([[image[:, : 4 + i] for i, image in enumerate(images)], labels], 0)[0]
    torch.testing.assert_close(each, [image[:, : 4 + i] for i, image in enumerate(expected)])


def test_a_transform_at_another_size_is_normalised_in_any_loader(folder: str) -> None:
    data = ImageFolder(folder, 16, 7, 0)
    small, large = data.eval_transform_at(8), data.eval_transform_at(20)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        samples = loader.dataset
        assert isinstance(samples, Samples)
        samples.transform = small
        [images, _] = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert images.shape == (7, 3, 8, 8)
        samples.transform = lambda image: (small(image), large(image))  # one image, decoded once
        [images, _] = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert [tuple(part.shape) for part in images] == [(7, 3, 8, 8), (7, 3, 20, 20)]
        index = next(iter(loader.sampler))
        torch.testing.assert_close(images[1][0], (large(samples.source[index][0]) - mean) / std)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true"])
@any_machine
def test_precision_and_memory_format_of_the_run(folder: str, precision: Any) -> None:
    for callbacks in ([], [ChannelsLast()]):
        model = Net()
        run = trainer(max_epochs=1, precision=precision, callbacks=callbacks, num_sanity_val_steps=1)
        run.fit(model, ImageFolder(folder, 16, 7, 0))
        dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
        assert len(model.evaluated) == 2
        data = ImageFolder(folder, 16, 7, 0)
        expected = [data.on_after_batch_transfer(batch, 0)[0] for batch in data.train_dataloader()]
        for images, exact in zip(model.batches, expected, strict=True):
            torch.testing.assert_close(images, exact.to(dtype))
        for images in model.batches + model.evaluated:
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last) == bool(callbacks)
            assert abs(float(images.float().mean())) < 2


@any_machine
def test_tricks_see_the_final_images(folder: str) -> None:
    torch.manual_seed(0)
    plain, mixed = Net(), Net()
    for model, callbacks in ((plain, []), (mixed, [CutMix(alpha=1.0)])):
        trainer(max_epochs=1, callbacks=callbacks).fit(model, ImageFolder(folder, 16, 7, 0))
    for before, after in zip(plain.batches, mixed.batches, strict=True):
        assert not torch.equal(before, after)
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())  # pasted, when normalized


def test_erased_parts_have_the_mean_colour(folder: str) -> None:
    torch.manual_seed(0)
    data = ImageFolder(folder, 32, 21, 0, augmentation="basic", random_erasing=1.0)
    [images, _] = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    erased = (images.abs() < 0.51 / 57).all(1).flatten(1).float().mean(1)
    assert erased.min() > 0.01  # v2.RandomErasing: 2 to 33 % of the area
    assert erased.max() < 0.4


# The order


@pytest.mark.parametrize(("size", "replicas", "repeats"), [(12, 1, 3), (13, 2, 3), (10, 4, 2)])
def test_repeated_augmentation_shows_images_to_several_processes(size: int, replicas: int, repeats: int) -> None:
    samples = Samples([(Image.new("L", (1, 1)), 0)] * size, CentreCrop(1, 1), seed=0)
    shares = [list(ShuffleSampler(samples, replicas, rank, 1, repeats)) for rank in range(replicas)]
    assert {len(share) for share in shares} == {-(-size // replicas)}
    everything = [shares[i % replicas][i // replicas] for i in range(size)]
    assert len(set(everything)) == size  # each time in another pass, so augmented in another way
    counts = Counter(index % size for index in everything)
    assert sorted(counts.values())[1:] == [repeats] * (len(counts) - 1)
    assert {index // size for index in everything} == set(range(repeats))
    sampler = ShuffleSampler(samples, 1, 0, 1, repeats)
    sampler.set_epoch(1)
    assert not set(sampler) & set(everything)


TAIL = [0] * 100 + [1] * 30 + [2] * 6  # labels of a long tail


class LabeledSamples(list[int]):
    """Samples of which only the labels matter."""

    @property
    def targets(self) -> Tensor:
        return torch.tensor(self)


def draws_of(
    balance: float, epochs: int = 1, replicas: int = 1, repeats: int = 1, labels: list[int] = TAIL
) -> list[list[int]]:
    """Return the indices of each epoch, from all processes in the order of the draws."""
    samples: Any = LabeledSamples(labels)
    samplers = [BalancedSampler(samples, replicas, rank, 7, repeats, balance) for rank in range(replicas)]
    orders = [[sampler.order(epoch) for sampler in samplers] for epoch in range(epochs)]
    return [[index for group in zip(*order, strict=True) for index in group] for order in orders]


@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_classes_are_drawn_by_the_power_of_their_frequency(balance: float) -> None:
    counts = np.bincount(TAIL)
    expected = counts ** (1 - balance) / (counts ** (1 - balance)).sum() * len(TAIL)
    for draws in draws_of(balance, epochs=5):
        found = np.bincount([TAIL[index % len(TAIL)] for index in draws])
        assert len(draws) == len(TAIL)
        assert np.abs(found - expected).max() < 1
    sampler = BalancedSampler(LabeledSamples(TAIL), 1, 0, 7, balance=balance)  # type: ignore[arg-type]
    total = np.bincount(TAIL, sampler.weights.numpy())  # as the weights of torch's WeightedRandomSampler
    np.testing.assert_allclose(total / total.sum(), expected / len(TAIL))


@pytest.mark.parametrize("balance", [0.5, 1.0])
@pytest.mark.parametrize("repeats", [1, 3])
def test_images_of_a_class_are_drawn_equally_often_and_never_twice_alike(balance: float, repeats: int) -> None:
    everything = [index for draws in draws_of(balance, epochs=12, repeats=repeats) for index in draws]
    assert len(set(everything)) == len(everything)  # the index decides the augmentation
    counts = Counter(index % len(TAIL) for index in everything)
    for label in range(3):
        of_class = [counts[index] for index, own in enumerate(TAIL) if own == label]
        # the last group of repeats in an epoch may be cut off
        assert max(of_class) - min(of_class) <= (1 if repeats == 1 else 12 * (repeats - 1))


def test_balanced_draws_depend_on_seed_and_epoch_alone() -> None:
    whole = draws_of(1.0, epochs=3)
    assert [sorted(draws) for draws in draws_of(1.0, epochs=3, replicas=2)] == [sorted(draws) for draws in whole]
    sampler = BalancedSampler(LabeledSamples(TAIL), 1, 0, 7)  # type: ignore[arg-type]
    assert [sampler.order(epoch) for epoch in (2, 0, 1)] == [whole[epoch] for epoch in (2, 0, 1)]
    assert whole[0] != whole[1]
    assert whole[0] != BalancedSampler(LabeledSamples(TAIL), 1, 0, 8).order(0)  # type: ignore[arg-type]


def test_each_process_has_as_many_balanced_draws() -> None:
    shares = [BalancedSampler(LabeledSamples(TAIL), 5, rank, 7).order(1) for rank in range(5)]  # type: ignore[arg-type]
    assert {len(share) for share in shares} == {-(-len(TAIL) // 5)}
    found = np.bincount([TAIL[index % len(TAIL)] for share in shares for index in share])
    assert found.max() - found.min() <= 5  # 4 draws are repeated, so that all have as many


def test_fewer_draws_than_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"repeats=4 leaves 2 draws .* 3 classes"):
        draws_of(1.0, repeats=4, labels=[0] * 5 + [1, 2])


def test_a_folder_is_balanced(folder: str) -> None:
    for name in "123456":
        Path(folder, "train", "cow", f"{name}.jpg").unlink()
    plain, balanced = ImageFolder(folder, 16, 5, 0), ImageFolder(folder, 16, 5, 0, balance=1.0)
    assert [len(data.train_dataloader()) for data in (plain, balanced)] == [3, 3]
    labels = torch.cat([labels for _, labels, _ in balanced.train_dataloader()])
    assert labels.bincount().tolist() == [5, 5, 5]


def test_every_process_has_as_many_batches_and_each_image_once() -> None:
    for size in range(1, 40):
        for replicas in (2, 3, 4):
            for batch_size in range(1, 9):
                if size < replicas:
                    with pytest.raises(ValueError, match=rf"{size} images .*{replicas} processes"):
                        eval_batch_size(batch_size, size, replicas)
                    continue
                chosen = eval_batch_size(batch_size, size, replicas)
                shares = [list(EvalSampler(range(size), replicas, rank)) for rank in range(replicas)]  # type: ignore[arg-type]
                assert sorted(index for share in shares for index in share) == list(range(size))
                assert len({-(-len(share) // chosen) for share in shares}) == 1
                assert chosen <= max(batch_size, 2) or batch_size <= 2 or size // replicas % batch_size == 0


class Shares(Net):
    """Writes what its process was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_fit_end(self) -> None:
        parts = [[fingerprint(image) for batch in kind for image in batch] for kind in (self.batches, self.evaluated)]
        torch.save(parts, self.folder / f"{self.global_rank}.pt")


@any_machine
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_two_processes_evaluate_each_image_once(folder: str, tmp_path: Path) -> None:
    data = ImageFolder(folder, 16, 3, 0, augmentation="none")
    whole = [data.on_after_batch_transfer(batch, 0)[0] for batch in ImageFolder(folder, 16, 3, 0).val_dataloader()]
    run = trainer(max_epochs=1, devices=2, strategy="ddp_fork", num_sanity_val_steps=0)
    run.fit(Shares(tmp_path), data)
    (train, val), (other_train, other_val) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert sorted(val + other_val) == sorted(fingerprint(image) for batch in whole for image in batch)
    assert (len(val), len(other_val)) == (4, 3)
    assert not set(train) & set(other_train)
    assert (len(train), len(other_train)) == (9, 9)


# In the middle of an epoch


class Written(Net):
    """Writes what it is trained on, and kills itself in a step."""

    def __init__(self, file: Path, last: int | None) -> None:
        super().__init__()
        self.file, self.last = file, last

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.file.open("a") as file:
            file.write(f"{self.global_step} {fingerprint(*batch)}\n")
        return super().training_step(batch, batch_idx)


def train(folder: str, file: Path, workers: int, how: Any, last: int | None, balance: float) -> None:
    torch.manual_seed(9)
    kept = file.parent / "kept"
    keep = ModelCheckpoint(kept, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(max_epochs=3, callbacks=[keep], enable_checkpointing=True)
    paths = sorted(kept.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    torch.manual_seed(len(paths))  # the seed of a resumed run comes from its checkpoint
    data = ImageFolder(folder, 16, 4, workers, workers=how, balance=balance, repeats=2 if balance else 1)
    run.fit(Written(file, last), data, ckpt_path=paths[-1] if paths else None, weights_only=True)


@pytest.mark.slow
@any_machine
@pytest.mark.parametrize(
    ("workers", "how", "balance"),
    [(0, "process", 0), (2, "process", 0), (2, "thread", 0), (0, "process", 1), (2, "process", 0.5)],
)
def test_killed_and_resumed_it_goes_on_with_the_same_images(
    folder: str, tmp_path: Path, workers: int, how: str, balance: float
) -> None:
    files = [tmp_path / name / "seen.txt" for name in ("whole", "killed")]
    for file in files:
        file.parent.mkdir()
    if balance:  # classes of 7, 7 and 2 images
        for name in "12345":
            Path(folder, "train", "cow", f"{name}.jpg").unlink()
    train(folder, files[0], workers, how, None, balance)
    count = 12 if balance else 15
    steps = sorted(random.Random(workers).sample(range(1, count), 2))
    context = multiprocessing.get_context("fork")
    for last in [*steps, None]:
        child = context.Process(target=train, args=(folder, files[1], workers, how, last, balance))
        child.start()
        child.join()
        assert child.exitcode == (0 if last is None else -signal.SIGKILL)
    whole, killed = (file.read_text().splitlines() for file in files)
    assert len(set(whole)) == count
    assert killed == whole


def test_another_kind_of_loader_does_not_go_on_in_the_middle(folder: str) -> None:
    data = ImageFolder(folder, 16, 4, 0)
    loader = data.train_dataloader()
    next(iter(loader))
    state = loader.state_dict()  # type: ignore[attr-defined]
    other = ImageFolder(folder, 16, 4, 1).train_dataloader()
    with pytest.raises(RuntimeError, match=r"num_workers=1 .*num_workers of 0"):
        other.load_state_dict(state)  # type: ignore[attr-defined]
