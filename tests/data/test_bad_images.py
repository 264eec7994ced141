"""Files that are hard to read, or not to be read at all: decoded as PIL does, or named, or skipped and listed."""

from __future__ import annotations

import csv
import io
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from helpers.cli import cli, done, metrics, workplace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image, PngImagePlugin
from torch import Tensor

from lit_tricks.data import ImageFolder
from lit_tricks.data.io.jpeg import read_image

any_machine = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:.*num_workers.* is greater than:UserWarning",
    "ignore:This DataLoader will create:UserWarning",
)

SIZE = 32


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def saved(image: Image.Image, **kwargs: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **kwargs)
    return stream.getvalue()


def jpeg(seed: int = 0, size: int = SIZE, **kwargs: Any) -> bytes:
    return saved(picture(seed, size), format="JPEG", **kwargs)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to see it as it was taken
    return jpeg(exif=exif)


def palette_with_alpha() -> bytes:
    image = picture().quantize(16)
    return saved(image, format="PNG", transparency=bytes(range(0, 256, 16)))


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 64), format="PNG")


GOOD: dict[str, Callable[[], bytes]] = {
    "plain.jpg": jpeg,
    "progressive.jpg": lambda: jpeg(progressive=True),
    "no chroma subsampling.jpg": lambda: jpeg(subsampling=0),
    "gray.jpg": lambda: saved(picture().convert("L"), format="JPEG"),
    "CMYK.jpg": lambda: saved(picture().convert("CMYK"), format="JPEG"),
    "rotated by EXIF.jpg": rotated,
    "PNG inside.jpg": lambda: saved(picture(), format="PNG"),
    "bytes behind the end.jpg": lambda: jpeg() + b"\0" * 100,
    "gray with alpha.png": lambda: saved(picture().convert("LA"), format="PNG"),
    "alpha.png": lambda: saved(picture().convert("RGBA"), format="PNG"),
    "palette.png": lambda: saved(picture().quantize(16), format="PNG"),
    "palette with alpha.png": palette_with_alpha,
    "16 bits.png": sixteen_bits,
    "one bit.png": lambda: saved(picture().convert("1"), format="PNG"),
    "animated.png": lambda: saved(picture(), format="PNG", save_all=True, append_images=[picture(1)]),
    "animated.webp": lambda: saved(picture(), format="WEBP", save_all=True, append_images=[picture(1)], lossless=True),
    "1x1.jpg": lambda: jpeg(size=1),
    "1x1.png": lambda: saved(picture(size=1), format="PNG"),
    "фото 画像 ñ.jpg": jpeg,
}


def huge_png() -> bytes:
    """20,000 x 20,000 pixels, says the header, as in a file that would unpack into 1.2 GB."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    stream = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    stream.seek(0, io.SEEK_END)
    PngImagePlugin.putchunk(stream, b"IHDR", head)
    PngImagePlugin.putchunk(stream, b"IDAT", b"")
    return stream.getvalue()


def huge_jpeg() -> bytes:
    data = jpeg()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 20_000, 20_000) + data[at + 4 :]


# Where each file is cut: the last has all that a crop of the upper half needs.
BAD: dict[str, Callable[[], bytes]] = {
    "empty.jpg": lambda: b"",
    "truncated.jpg": lambda: jpeg(size=256)[:-1500],
    "truncated below the crop.jpg": lambda: jpeg(size=256)[:-40],
    "head only.jpg": lambda: jpeg()[:100],
    "truncated.png": lambda: saved(picture(), format="PNG")[:-200],
    "text.jpg": lambda: b"<html>404 Not Found</html>",
    "zeros.jpg": lambda: bytes(5000),
    "zeros in the middle.jpg": lambda: (data := jpeg(size=256))[:700] + bytes(1000) + data[1700:],
    "32 bits.tif": lambda: saved(Image.fromarray(np.zeros((4, 4), np.int32)), format="TIFF"),
    "bomb.png": huge_png,
    "bomb.jpg": huge_jpeg,
}


def reference(data: bytes, name: str) -> np.ndarray[Any, Any]:
    image: Image.Image = Image.open(io.BytesIO(data))
    if name.startswith("16 bits"):
        return np.repeat((np.asarray(image) // 256).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("P", "PA", "LA", "RGBA"):
        return np.asarray(image.convert("RGBA"))[..., :3]
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", GOOD)
def test_decodable_file_is_as_in_pil(tmp_path: Path, name: str) -> None:
    data = GOOD[name]()
    (tmp_path / name).write_bytes(data)
    found = np.asarray(read_image(str(tmp_path / name)).convert("RGB"))
    np.testing.assert_array_equal(found, reference(data, name))


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    """Two classes with 6 images each, and the files among those of the first."""
    for split, classes in (("train", "ab"), ("val", "ab")):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                (root / split / name / f"good {i}.jpg").write_bytes(jpeg(10 * label + i))
    for name, data in files.items():
        for split in ("train", "val"):
            (root / split / "a" / name).write_bytes(data)
    return root


def module(root: Path, **kwargs: Any) -> ImageFolder:
    settings = {"image_size": 16, "resize_size": 16, "batch_size": 4, "num_workers": 0, **kwargs}
    return ImageFolder(str(root), **settings)


@any_machine
def test_all_that_can_be_decoded_goes_into_batches(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {name: make() for name, make in GOOD.items()})
    data = module(root, image_size=SIZE, resize_size=SIZE, batch_size=31)
    [[images, labels]] = list(data.val_dataloader())
    assert images.shape == (31, 3, SIZE, SIZE)
    assert labels.tolist() == [0] * 25 + [1] * 6
    for image, path in zip(images, data.source("val").paths, strict=True):  # type: ignore[attr-defined]
        expected = reference(Path(path).read_bytes(), Path(path).name)
        if not Path(path).name.startswith("1x1"):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
        else:
            assert (image.permute(1, 2, 0).numpy() == expected[0, 0]).all()
    assert len(next(iter(data.train_dataloader()))[0]) == 31


@any_machine
@pytest.mark.parametrize("decode", ["auto", "exact"])
@pytest.mark.parametrize("name", BAD)
def test_undecodable_file_is_named(tmp_path: Path, name: str, decode: Any) -> None:
    root = write_folder(tmp_path, {name: BAD[name]()})
    with pytest.raises(RuntimeError, match=rf"cannot read .*/val/a/{name}' \(.+\)"):
        list(module(root, decode=decode).val_dataloader())


def test_a_file_cut_off_below_the_crop_is_found(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(BAD["truncated below the crop.jpg"]())
    image: Any = read_image(str(tmp_path / "1.jpg"))
    with pytest.raises(RuntimeError, match=r"1\.jpg"):
        image.pixels((0, 0, 8, 8))


@any_machine
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path, {})
    (root / "val" / "b" / "broken link.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(RuntimeError, match=r"broken link\.jpg' .*No such file"):
        list(module(root).val_dataloader())
    forbid(monkeypatch, "good 3")
    with pytest.raises(RuntimeError, match=r"a/good 3\.jpg' \(.*Permission denied"):
        list(module(root).val_dataloader())


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Root, who may run the tests, may read everything."""

    def denied(path: Any) -> bytes:
        if name in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return Path(path).read_bytes()

    monkeypatch.setattr("lit_tricks.data.io.jpeg.read_regular", denied)


@any_machine
def test_a_bad_file_is_named_through_a_worker(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"text.jpg": b"text"})
    with pytest.raises(RuntimeError, match=r"cannot read .*/val/a/text\.jpg'"):
        list(module(root, num_workers=1).val_dataloader())


# Skipped


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "root", {name: make() for name, make in BAD.items()})


def batches(data: ImageFolder, epoch: int = 0) -> list[list[Tensor]]:
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(left, right) for a, b in zip(ours, theirs, strict=True) for left, right in zip(a, b, strict=True)
    )


@pytest.mark.slow
@any_machine
def test_others_take_the_place_of_bad_images_whoever_loads(root: Path) -> None:
    lightning.seed_everything(1, verbose=False)
    first = batches(module(root, on_bad_image="skip"))
    assert [len(images) for images, *_ in first] == [4] * 5  # 12 good of 23
    for settings in ({"num_workers": 1}, {"num_workers": 3}, {"num_workers": 2, "workers": "thread"}):
        assert same(first, batches(module(root, on_bad_image="skip", **settings))), settings
    assert not same(first, batches(module(root, on_bad_image="skip"), epoch=1))


@any_machine
def test_good_images_stay_where_they_are(root: Path) -> None:
    lightning.seed_everything(1, verbose=False)
    data = module(root, on_bad_image="skip", augmentation="none")
    images = torch.cat([images for images, *_ in batches(data)])
    samples: Any = data.train_dataloader().dataset
    order = [i % len(samples) for i in data.train_dataloader().sampler]  # type: ignore[union-attr]
    good: dict[int, Tensor] = {}
    for index in order:
        if Path(samples.source.paths[index]).name.startswith("good"):
            good[index] = samples[index][0]
    at = [place for place, index in enumerate(order[: len(images)]) if index in good]
    assert 5 < len(at) < len(images)
    assert torch.equal(images[at], torch.stack([good[order[place]] for place in at]))
    known = {image.numpy().tobytes() for image in good.values()}
    assert {image.numpy().tobytes() for image in images} <= known


@any_machine
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_without_bad_images(root: Path, workers: int) -> None:
    data = module(root, on_bad_image="skip", num_workers=workers, batch_size=12)
    labels = [label for _, labels in data.val_dataloader() for label in labels.tolist()]
    assert labels == [0] * 6 + [1] * 6
    data = module(root, on_bad_image="skip", num_workers=workers, batch_size=1)
    assert [len(labels) for _, labels in data.val_dataloader()] == [1] * 23  # an empty batch has no mean


@any_machine
def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {})
    for path in (tmp_path / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    data = module(root, on_bad_image="skip", batch_size=6)
    with pytest.raises(RuntimeError, match=r"20 images in a row.*cannot read"):
        batches(data)


def test_unknown_value_of_on_bad_image_is_rejected(root: Path) -> None:
    with pytest.raises(ValueError, match=r"on_bad_image='ignore'.*'raise', 'skip'"):
        module(root, on_bad_image="ignore")


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.seen: list[tuple[int, bytes]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append((self.current_epoch, images.numpy().tobytes()))
        return torch.nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("count", float(len(batch[1])), reduce_fx="sum")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Recorder, data: ImageFolder, folder: Path, checkpoint: Path | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=1)],
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


@pytest.mark.slow
@any_machine
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning", "ignore:The dirpath has changed from")
def test_a_run_counts_and_lists_bad_images_and_goes_on_the_same(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lit_tricks"), "propagate", True)
    lightning.seed_everything(1, verbose=False)
    whole = Recorder()
    trainer = fit(whole, module(root, on_bad_image="skip", num_workers=2), tmp_path / "whole")
    assert trainer.callback_metrics["count"] in (12, 13, 14)  # a batch of nothing but bad images gets another
    folder = Path(str(trainer.log_dir))
    head, *rows = table(folder / "bad_images.csv")
    assert head == ["split", "file", "reason"]
    assert sorted(row[:2] for row in rows) == sorted(
        [split, str(root / split / "a" / name)] for split in ("train", "val") for name in BAD
    )
    assert all(reason for *_, reason in rows)
    counts = [row["data/bad_images"] for row in metrics(folder) if "data/bad_images" in row]
    assert counts == sorted(counts)
    assert counts[-1] == 22
    [warning] = [record.message for record in caplog.records if "could not be read" in record.message]
    assert warning == f"22 image files could not be read and were skipped: see {folder / 'bad_images.csv'}"

    for step in (2, 5, 7):
        torch.manual_seed(2)
        resumed = Recorder()
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        fit(resumed, module(root, on_bad_image="skip", num_workers=2), tmp_path / f"resumed from {step}", checkpoint)
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.slow
def test_from_the_command_line(root: Path, tmp_path: Path) -> None:
    words = ("--config=tiny.yaml", "--data=ImageFolder", f"--data.root={root}", "--data.image_size=32")
    words += ("--data.batch_size=8", "--data.num_workers=0")
    with workplace(tmp_path):
        rejected = cli("fit", *words)
        assert rejected.code == 1
        assert rejected.err.startswith("lit-tricks: error: cannot read the image '")
        assert "/a/" in rejected.err
        outcome = done("fit", *words, "--data.on_bad_image=skip")
        assert "image files could not be read and were skipped: see runs/tiny/v" in outcome.log
        [path] = tmp_path.glob("runs/tiny/v*/bad_images.csv")
        assert {row[0] for row in table(path)[1:]} == {"train", "val"}
        assert any("data/bad_images" in row for row in metrics(path.parent))
