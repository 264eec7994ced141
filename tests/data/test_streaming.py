"""``Streaming``: shards give what ``ImageFolder`` gives, each sample once, and continue where a run was stopped."""

from __future__ import annotations

import csv
import gc
import hashlib
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bucket import bucket
from helpers.cli import write_images
from helpers.fits import Saver
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lit_tricks.callbacks import PreciseBN
from lit_tricks.commands.data import shard
from lit_tricks.data import ImageFolder, Streaming

CLASSES = ("ant", "bee", "cow")
TRAIN, VAL = 27, 9
BATCH_SIZE, BATCHES = 4, 6

# Lightning and Python warn according to the machine (its cores, its way to start processes) and the callbacks of a run.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
    "ignore:This process .* is multi-threaded:DeprecationWarning",
    "ignore:This DataLoader will create",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for label, name in enumerate(CLASSES):
        write_images(folder / "train" / name, TRAIN // 3, seed=label)
        write_images(folder / "val" / name, VAL // 3, seed=100 + label)
    return folder


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "of images"
    shard(str(images), str(folder), shard_mb=0.004)
    assert len(list((folder / "train").glob("chunk*"))) > BATCHES
    return folder


@pytest.fixture(scope="module")
def served(shards: Path) -> Iterator[dict[str, str]]:
    with bucket(shards, "shards") as environment:
        yield environment


@pytest.fixture
def s3(served: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the shards in a bucket, for a user without a home."""
    for name, value in {**served, "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    return "s3://shards/of/images"


class Recorder(LightningModule):
    """Notes the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten())
        self.head = torch.nn.Linear(2 * 14 * 14, 3)
        self.seen: list[tuple[int, str]] = []
        self.images: list[str] = []
        self.validated: list[str] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.net(images))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.images += [fingerprint([image]) for image in batch[0]]
        self.seen.append((self.current_epoch, fingerprint(batch)))
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated += [fingerprint([image]) for image in batch[0]]

    def predict_step(self, batch: list[Any], batch_idx: int) -> tuple[str, ...]:
        return tuple(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fingerprint(batch: list[Tensor]) -> str:
    return hashlib.sha1(b"".join(part.contiguous().numpy().tobytes() for part in batch)).hexdigest()


def trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**plain, **quiet, **kwargs})


def fit(data: Streaming, *callbacks: Any, ckpt_path: Path | None = None, seed: int = 1, **kwargs: Any) -> Recorder:
    torch.manual_seed(seed)
    module = Recorder()
    trainer(*callbacks, **{"max_epochs": 3, **kwargs}).fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def passes(data: Streaming, count: int = 2) -> list[list[str]]:
    """The images of each pass over the training data, as they are after their crop."""
    loader = data.train_dataloader()
    return [[fingerprint([image]) for images, *_ in loader for image in images] for _ in range(count)]


# What it gives


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_those_of_the_folder(images: Path, shards: Path, workers: int) -> None:
    settings = {"image_size": 16, "batch_size": BATCH_SIZE, "num_workers": workers, "augmentation": "none"}
    plain, data = ImageFolder(str(images), **settings), Streaming(str(shards), **settings)
    assert (data.classes, data.num_classes, data.input_size) == (list(CLASSES), 3, (3, 16, 16))
    data.setup()
    expected, loader = list(plain.val_dataloader()), data.val_dataloader()
    found = list(loader)
    assert len(found) == len(loader) == len(expected) == 3
    images_of = [[fingerprint(pair) for batch in run for pair in zip(*batch, strict=True)] for run in (found, expected)]
    assert sorted(images_of[0]) == sorted(images_of[1])
    assert workers or images_of[0] == images_of[1]
    with pytest.raises(FileNotFoundError, match="no test split"):
        data.test_dataloader()
    known = {fingerprint([image]) for pictures, *_ in plain.train_dataloader() for image in pictures}
    known |= {fingerprint([image]) for image, _ in (plain.train_dataloader().dataset[i] for i in range(TRAIN))}
    for seen in passes(data):
        assert len({*seen}) == len(seen) == BATCHES * BATCH_SIZE
        assert {*seen} <= known
    labels = [label for _, labels, *_ in data.train_dataloader() for label in labels.tolist()]
    assert {*labels} == {0, 1, 2}


@pytest.mark.slow
def test_seed_and_epoch_decide(shards: Path) -> None:
    runs = []
    for workers in (0, 1, 2):
        torch.manual_seed(3)
        runs.append(passes(Streaming(str(shards), 16, BATCH_SIZE, workers)))
    torch.manual_seed(3)
    assert passes(Streaming(str(shards), 16, BATCH_SIZE, 2, workers="thread")) == runs[0]
    assert runs[0] == runs[1]
    assert [sorted(seen) for seen in runs[2]] == [sorted(seen) for seen in runs[0]]  # in another order
    first, second = runs[0]
    assert len({*first, *second}) == 2 * BATCHES * BATCH_SIZE
    torch.manual_seed(4)
    assert not {*first} & {*passes(Streaming(str(shards), 16, BATCH_SIZE, 0))[0]}


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_samples_without_repeats(
    shards: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, workers: int
) -> None:
    trained, validated, lengths = [], [], set()
    for rank in range(replicas):
        monkeypatch.setattr(Streaming, "_replicas", lambda self, rank=rank: (replicas, rank))
        torch.manual_seed(5)
        data = Streaming(str(shards), 16, BATCH_SIZE, workers, augmentation="none")
        trained.append(passes(data, 1)[0])
        loader = data.val_dataloader()
        batches = [images for images, _ in loader]
        lengths.add((len(batches), len(loader)))
        validated.append([fingerprint([image]) for images in batches for image in images])
    assert {len(seen) for seen in trained} == {BATCHES // replicas * BATCH_SIZE}
    assert len({name for seen in trained for name in seen}) == BATCHES * BATCH_SIZE
    assert len(lengths) == 1  # or some would wait for others in vain
    (batches, length), *_ = lengths
    assert batches == length
    assert {len(seen) for seen in validated} <= {VAL // replicas, VAL // replicas + 1}
    assert sorted(name for seen in validated for name in seen) == sorted({name for seen in validated for name in seen})
    assert sum(map(len, validated)) == VAL


def test_evaluation_at_another_size(shards: Path, images: Path) -> None:
    data, plain = Streaming(str(shards), 16, VAL, 0), ImageFolder(str(images), 12, VAL, 0)
    loader = data.val_dataloader()
    loader.dataset.transform = data.eval_transform_at(12)
    assert torch.equal(next(iter(loader))[0], next(iter(plain.val_dataloader()))[0])


# Where it was stopped


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Recorder, Path]]:
    """By number of workers: a run of three epochs, and its checkpoints of every step."""
    found = {}
    for workers in (0, 2):
        folder = tmp_path_factory.mktemp("run")
        found[workers] = fit(Streaming(str(shards), 16, BATCH_SIZE, workers), Saver(folder)), folder
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "moment"),
    [(0, moment) for moment in ("1-batch", "6-batch", "6-epoch", "9-batch", "12-validation")]
    + [(2, moment) for moment in ("7-batch", "12-epoch", "15-batch", "16-batch")],
)
def test_resumed_run_continues_in_the_middle_of_an_epoch(
    runs: dict[int, tuple[Recorder, Path]], shards: Path, workers: int, moment: str
) -> None:
    full, folder = runs[workers]
    assert len({*full.seen}) == 3 * BATCHES
    data = Streaming(str(shards), 16, BATCH_SIZE, workers)
    resumed = fit(data, ckpt_path=folder / f"{moment}.ckpt", seed=2)  # the seed of the checkpoint counts
    assert resumed.seen == full.seen[int(moment.partition("-")[0]) :]
    assert all(
        torch.equal(a, b) for a, b in zip(full.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_resume_from_a_copy_elsewhere(runs: dict[int, tuple[Recorder, Path]], shards: Path, tmp_path: Path) -> None:
    full, folder = runs[0]
    shutil.copytree(shards, tmp_path / "moved")
    resumed = fit(Streaming(str(tmp_path / "moved"), 16, BATCH_SIZE, 0), ckpt_path=folder / "8-batch.ckpt")
    assert resumed.seen == full.seen[8:]
    index = tmp_path / "moved" / "train" / "index.json"
    content = json.loads(index.read_text())
    content["chunks"].reverse()
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"shards in .*moved/train"):
        fit(Streaming(str(tmp_path / "moved"), 16, BATCH_SIZE, 0), ckpt_path=folder / "8-batch.ckpt")
    next_epoch = fit(Streaming(str(tmp_path / "moved"), 16, BATCH_SIZE, 0), ckpt_path=folder / "12-epoch.ckpt")
    assert len(next_epoch.seen) == BATCHES


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [(0, 2), (2, 0)])
def test_resume_with_other_workers(runs: dict[int, tuple[Recorder, Path]], shards: Path, before: int, now: int) -> None:
    _, folder = runs[before]
    first = fit(Streaming(str(shards), 16, BATCH_SIZE, before, augmentation="none"), max_steps=8).images[BATCHES * 4 :]
    data = Streaming(str(shards), 16, BATCH_SIZE, now, augmentation="none")
    rest = fit(data, ckpt_path=folder / "8-batch.ckpt", max_epochs=2).images
    assert len({*first, *rest}) == len(first + rest) == BATCHES * BATCH_SIZE


@pytest.mark.parametrize("kind", [Streaming, ImageFolder])
@pytest.mark.parametrize(("processes", "batch_size"), [(2, 4), (1, 3)])
def test_an_epoch_does_not_go_on_with_other_batches(
    kind: Any, processes: int, batch_size: int, shards: Path, images: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    root = str(shards if kind is Streaming else images)
    steps = len(fit(kind(root, 16, 4, 0), Saver(tmp_path), max_epochs=2).seen) // 2
    monkeypatch.setattr(kind, "_replicas", lambda self: (processes, 0))
    message = (
        f"started in 1 processes with batches of 4 cannot resume in {processes} with batches of {batch_size}: resume"
    )
    with pytest.raises(ValueError, match=message):
        fit(kind(root, 16, batch_size, 0), ckpt_path=tmp_path / f"{steps + 2}-batch.ckpt")
    data = kind(root, 16, batch_size, 0)
    next_epoch = fit(data, ckpt_path=tmp_path / f"{2 * steps}-epoch.ckpt").seen
    assert len(next_epoch) == len(data.train_dataloader())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_that_end_early(shards: Path, tmp_path: Path, workers: int) -> None:
    def run(*callbacks: Any, **kwargs: Any) -> list[tuple[int, str]]:
        data = Streaming(str(shards), 16, BATCH_SIZE, workers)
        return fit(data, *callbacks, limit_train_batches=4, **kwargs).seen

    seen = run(Saver(tmp_path))
    assert len({name for _, name in seen}) == 12
    for moment in ("4-epoch",) if workers else ("4-epoch", "5-batch", "8-epoch"):
        assert run(ckpt_path=tmp_path / f"{moment}.ckpt") == seen[int(moment[0]) :]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_another_pass_disturbs_nothing(runs: dict[int, tuple[Recorder, Path]], shards: Path, workers: int) -> None:
    found = fit(Streaming(str(shards), 16, BATCH_SIZE, workers), PreciseBN(12, transform="eval"))
    assert found.seen == runs[0][0].seen


# From a bucket


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_shards_in_a_bucket_give_the_same_batches(
    runs: dict[int, tuple[Recorder, Path]], s3: str, tmp_path: Path, workers: int
) -> None:
    full, folder = runs[workers]
    cache = tmp_path / "cache"
    data = Streaming(s3, 16, BATCH_SIZE, workers, cache_dir=str(cache))
    streamed = fit(data, Saver(tmp_path / "new", steps=(8,)), max_epochs=2)
    assert streamed.seen == full.seen[: 2 * BATCHES]
    assert sorted(streamed.validated) == sorted(full.validated[: 2 * VAL])
    assert list(cache.rglob("chunk*.bin"))
    assert not (tmp_path / "home").exists()
    of = tmp_path / "new" if workers else folder  # begun from the bucket, or from the folder
    data = Streaming(s3, 16, BATCH_SIZE, workers, cache_dir=str(cache))
    resumed = fit(data, ckpt_path=of / "8-batch.ckpt", max_epochs=2)
    assert resumed.seen == full.seen[8 : 2 * BATCHES]


@pytest.mark.parametrize(
    ("root", "environment", "error", "message"),
    [
        (
            "s3://nowhere/x",
            {},
            FileNotFoundError,
            "no index of shards .* in 's3://nowhere/x/train'; `lit-tricks data sh",
        ),
        ("s3://shards/x", {}, FileNotFoundError, "no index of shards .* in 's3://shards/x/train'"),
        ("s3://shards/of/images", {"AWS_ACCESS_KEY_ID": ""}, PermissionError, "may not be read .*AWS_PROFILE"),
        ("s3://shards/of/images", {"AWS_PROFILE": "me"}, PermissionError, "may not be read .*profile .*me"),
        ("s3://shards/of/images", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, ConnectionError, "not be reached"),
        ("ftp://shards", {}, ValueError, "must be a folder, or a URL that starts with s3:// or gs://"),
        ("gs://shards/x", {}, ModuleNotFoundError, "pip install google-cloud-storage"),
    ],
)
def test_buckets_that_do_not_answer(
    s3: str, monkeypatch: pytest.MonkeyPatch, root: str, environment: dict[str, str], error: type, message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    with pytest.raises(error, match=message):
        Streaming(root)


def test_a_bucket_that_rejects(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reject(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        do_HEAD = do_GET  # noqa: N815
        log_message = print_nothing

    server = HTTPServer(("127.0.0.1", 0), Reject)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(PermissionError, match=r"images/train .*403"):
            Streaming(s3)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def print_nothing(*args: Any) -> None:
    pass


# Bad input


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def change_index(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_litdata_is_missing(shards: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(ModuleNotFoundError, match=r"lit-tricks\[streaming\]"):
        Streaming(str(shards))
    with pytest.raises(ModuleNotFoundError, match=r"lit-tricks\[streaming\]"):
        shard(str(images), str(tmp_path / "out"))


def test_folders_without_shards(images: Path, copied: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no index of shards .*/train'.*use Imag"):
        Streaming(str(images))
    with pytest.raises(FileNotFoundError, match=r"no index of shards .*nowhere/train'.*data shard"):
        Streaming("nowhere")
    shutil.rmtree(copied / "val")
    with pytest.raises(FileNotFoundError, match=r"no index of shards .*/val'"):
        Streaming(str(copied))


def test_classes_that_differ(copied: Path) -> None:
    change_index(copied / "val" / "index.json", classes=["ant", "bee", "cat"])
    with pytest.raises(ValueError, match="only in train: cow; only in val: cat"):
        Streaming(str(copied))
    change_index(copied / "val" / "index.json", classes=["bee", "ant", "cow"])
    with pytest.raises(ValueError, match="in another order"):
        Streaming(str(copied))


def test_an_index_that_is_not_ours(copied: Path) -> None:
    index = copied / "train" / "index.json"
    for content in ("{", "{}", "[]", json.dumps({"chunks": [{"chunk_size": 3}]})):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"train/index\.json .*data shard"):
            Streaming(str(copied))


def test_a_shard_that_is_cut_off_or_gone(copied: Path) -> None:
    path = copied / "val" / "chunk-0-0.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match=r"val/chunk-0-0\.bin' .*bytes"):
        Streaming(str(copied))
    path.unlink()
    with pytest.raises(RuntimeError, match=r"val/chunk-0-0\.bin' is missing"):
        Streaming(str(copied))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_named(copied: Path, images: Path, workers: int) -> None:
    [path] = [path for path in (copied / "val").glob("chunk*") if b"bee/1.jpg" in path.read_bytes()]
    image = (images / "val" / "bee" / "1.jpg").read_bytes()
    path.write_bytes(path.read_bytes().replace(image, image[:100] + bytes(len(image) - 100)))
    data = Streaming(str(copied), 16, BATCH_SIZE, workers)
    with pytest.raises(RuntimeError, match=rf"bee/1\.jpg: .*{path.name} .*copy/val'"):
        trainer().validate(Recorder(), data)
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(RuntimeError, match=rf"copy/val/{path.name}"):
        trainer().validate(Recorder(), Streaming(str(copied), 16, BATCH_SIZE, workers))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_skipped(copied: Path, tmp_path: Path, workers: int) -> None:
    names = []
    for split in ("train", "val"):
        for path in sorted((copied / split).glob("chunk*"))[:1]:
            content = path.read_bytes()
            start, end = content.index(b"\xff\xd8") + 100, content.index(b"\xff\xd9") + 2
            path.write_bytes(content[:start] + bytes(end - start) + content[end:])
            names.append(f"sample 0 in {path.name} of {path.parent}")
    data = Streaming(str(copied), 16, BATCH_SIZE, workers, on_bad_image="skip")
    log = CSVLogger(str(tmp_path), "run", "v0")
    found = fit(data, default_root_dir=str(tmp_path), logger=log, max_epochs=2)
    assert len(found.images) == 2 * BATCHES * BATCH_SIZE  # another sample takes its place
    assert len(found.validated) == 2 * (VAL - 1)  # and none, where it would count twice
    data = Streaming(str(copied), 16, BATCH_SIZE, workers, on_bad_image="skip")
    again = fit(data, default_root_dir=str(tmp_path / "again"), max_epochs=2)
    assert again.images == found.images
    with (tmp_path / "run" / "v0" / "bad_images.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["split"] for row in rows) == ["train", "val"]
    assert all(any(row["file"].endswith(name) for name in names) for row in rows)


def test_a_killed_worker(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(self: Recorder, *args: Any) -> None:
        pid = multiprocessing.active_children()[0].pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)

    monkeypatch.setattr(Recorder, "on_train_batch_end", kill)
    with pytest.raises(RuntimeError, match=r"\(pid \d+\) was killed.*num_workers"):
        fit(Streaming(str(shards), 16, 2, 1), max_epochs=50)
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        gc.collect()  # the error's frames hold the loader
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def test_batches_that_are_too_large(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"batch_size=28 .*at most 27"):
        Streaming(str(shards), batch_size=28).setup("fit")
    monkeypatch.setattr(Streaming, "_replicas", lambda self: (2, 0))
    with pytest.raises(ValueError, match=r"13 training images .*2 processes.*at most 13"):
        Streaming(str(shards), batch_size=14).setup("fit")
    assert len(Streaming(str(shards), batch_size=13).train_dataloader()) == 1


# As a data module


def test_hparams_build_the_same_data(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Streaming(shards, batch_size=4, cache_dir=tmp_path)  # type: ignore[arg-type]
    assert (data.hparams["root"], data.hparams["cache_dir"]) == (str(shards), str(tmp_path))
    assert {*data.hparams} == {*inspect.signature(Streaming).parameters}
    assert {*inspect.signature(ImageFolder).parameters} - {*data.hparams} == {
        "balance",
        "cache",
        "repeats",
        "split_seed",
        "val_fraction",
    }
    assert pickle.loads(pickle.dumps(data)).classes == data.classes
    monkeypatch.setattr("sys.argv", ["test", "--data=Streaming", f"--data.root={shards}", "--data.workers=thread"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    cli = LightningCLI(
        Recorder, subclass_mode_data=True, run=False, save_config_callback=None, seed_everything_default=False
    )
    assert cli.datamodule.classes == data.classes


def test_predict_dir_needs_no_shards(shards: Path, images: Path) -> None:
    folder = str(images / "val")
    data = Streaming("s3://gone", 16, BATCH_SIZE, 0, predict_dir=folder)
    paths = [path for batch in trainer().predict(Recorder(), data) for path in batch]
    assert paths == sorted(str(path) for path in Path(folder).rglob("*.jpg"))


@pytest.mark.slow
def test_shards_in_a_folder_are_read_where_they_are(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("requests.sessions.Session.request", lambda *args, **kwargs: pytest.fail("asked the network"))
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    fit(Streaming(str(shards), 16, BATCH_SIZE, 2), max_epochs=1)
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before
    assert not list(tmp_path.iterdir())
