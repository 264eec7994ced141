"""Base of the data modules: checks of the arguments, the loaders, and the seed."""

from __future__ import annotations

import inspect
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from types import FrameType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lit_tricks.data.io.bad_images import BadImages, OnBadImage, Report
from lit_tricks.data.io.file_index import Paths
from lit_tricks.data.io.formats import ENDINGS
from lit_tricks.data.io.jpeg import read_image
from lit_tricks.data.io.worker_errors import EvalLoader, explain_death
from lit_tricks.data.loader import BalancedSampler, EvalSampler, ShuffleSampler, TrainLoader, eval_batch_size
from lit_tricks.data.samples import Files, PredictSamples, Reader, Samples, Source, collate, find_images
from lit_tricks.data.transforms import InputTransform, Transform
from lit_tricks.utils.arguments import MAX_SIDE, integer, path

__all__ = ["ImageDataModule", "Split", "resize_size_for", "stratified_split"]

Split = Literal["train", "val", "test"]

MAX_AUTO_WORKERS = 16
FILES_PER_WORKER = 32  # fewer are loaded before a process has started
STAGES: dict[str | None, tuple[Split, ...]] = {
    None: ("train", "val", "test"),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
}


def stratified_split(labels: list[int], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Hold out ``size`` samples with the classes in proportion.

    Returns:
        The sorted indices of the rest, and of those held out.
    """
    from sklearn.model_selection import train_test_split  # here, because its import takes more than half a second

    rest, held_out = train_test_split(range(len(labels)), test_size=size, random_state=seed, stratify=labels)
    return sorted(rest), sorted(held_out)


class ImageDataModule(LightningDataModule, ABC):
    """Base of the data modules: a subclass sets the attributes below and gives the samples in ``_load``.

    Batches are (images, labels): float32 (N, C, H, W), normalized, and int64 (N,). The last partial batch is dropped
    in training, so that batch normalization never gets a tiny batch, and kept elsewhere.

    Batches depend only on the seed (``lightning.seed_everything``): they are bitwise the same for any number of workers
    and different in each epoch, and epoch N does not depend on earlier epochs. The seed is stored in checkpoints. A
    resumed run continues with it, also in the middle of an epoch. Loading does not change the random state of the
    process.

    Attributes:
        classes: names of the classes, in the order of the labels.
        input_size: (channels, height, width) of the model's input.
        mean: of the channels, on the scale from 0 to 255; images are normalized by it.
        std: standard deviation of the channels, on the scale from 0 to 255.
        crop_ratio: size over the short side before the center crop in evaluation, in (0, 1].
        crop_mode: timm's crop mode in evaluation: "center" keeps the aspect ratio of an image, "squash" does not.
        train_transform: random transform of the training images, PIL image to tensor.
        eval_transform: fixed transform of all other images, PIL image to tensor.

    Args:
        batch_size: images in a batch of one process, at least 1.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of
            the machine, 16 at most; 0 loads in the main process.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
    """

    sample_type: type[Samples] = Samples
    train_loader_type: type[TrainLoader] = TrainLoader
    eval_loader_type: type[EvalLoader] = EvalLoader
    collate = staticmethod(collate)
    repeats = 1  # of an image in an epoch
    balance = 0.0  # of the classes in training: 1 draws them equally often
    thread_workers = False  # threads of one process, or processes
    on_bad_image: OnBadImage = "raise"
    exif = False  # whether images are rotated by their EXIF orientation
    crop_ratio: float = 1.0
    crop_mode: Literal["center", "squash"] = "center"

    classes: list[str]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_transform: Transform
    eval_transform: Transform

    def __init__(self, batch_size: int, num_workers: int | Literal["auto"], predict_dir: str | None) -> None:
        super().__init__()
        batch_size = integer(self, "batch_size", batch_size, 1, "32 to 256 is usual.")
        if not isinstance(num_workers, str) or num_workers != "auto":
            num_workers = integer(self, "num_workers", num_workers, 0, 'Or write "auto".', 2**16)
        predict_dir = path(self, "predict_dir", predict_dir, "Give a folder of images.", "no prediction")
        if predict_dir is not None and not os.path.isdir(predict_dir):
            raise FileNotFoundError(f"predict_dir={predict_dir!r} is not a folder: give a folder of images")
        self.batch_size = self._given_batch_size = batch_size
        self.num_workers = num_workers
        self.predict_dir = predict_dir
        self._predict_files: Paths | None = None
        self._left_out: BadImages | None = None
        self._sources: dict[Split, Source] = {}
        self._bad: dict[str, BadImages] = {}
        self._report = Report(None)
        self._seed: int | None = None

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **kwargs: Any) -> None:
        """Save the arguments of ``__init__`` as plain values. A Path would keep a checkpoint from loading safely."""
        caller = inspect.currentframe()
        super().save_hyperparameters(*args, frame=frame or (caller and caller.f_back), **kwargs)
        for name, value in self.hparams.items():
            if isinstance(value, os.PathLike):
                self.hparams[name] = os.fspath(value)
            elif callable(getattr(value, "tolist", None)):  # a scalar of NumPy or torch
                self.hparams[name] = value.tolist()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def has_test(self) -> bool:
        """Return whether there are test images other than the validation images."""
        return True

    def setup(self, stage: str | None = None) -> None:
        """Find the samples of a stage ("fit", "validate", "test", "predict"; None for all but predict)."""
        self._seed = None  # each run uses the current seed, unless its checkpoint has one
        if self.on_bad_image == "skip":
            self._bad.clear()
            self._report = Report(None if self.trainer is None else self.trainer.log_dir)
        for split in STAGES.get(stage, ()):
            if stage is not None or split != "test" or self.has_test:
                self.source(split)
        if stage in (None, "fit"):
            self._check_enough()
        if stage == "predict":
            self._predict_paths()

    def train_dataloader(self) -> DataLoader[Any]:
        """Give shuffled and augmented training batches.

        For several processes give the module itself to the Trainer: without one, a loader gives all images.
        """
        self._check_enough()
        samples = self._samples("train", self.source("train"), self.train_transform)
        kind = partial(BalancedSampler, balance=self.balance) if self.balance else ShuffleSampler
        sampler = kind(samples, *self._replicas(), seed=samples.seed, repeats=self.repeats)
        with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.14 has deprecated
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")
            return self.train_loader_type(samples, sampler=sampler, drop_last=True, **self._loader_args(samples))

    def val_dataloader(self) -> DataLoader[Any]:
        """Give all validation images in fixed order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Give all test images in fixed order.

        Raises:
            FileNotFoundError: if there is no test split.
        """
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Give (images, paths) of the files below ``predict_dir``, sorted by path."""
        files = Files(self._predict_paths(), self._file_reader())
        samples = self._samples("predict", files, self.eval_transform)
        if self._predict_files is not None:
            samples.bad = self._left_out = BadImages(files, "predict", replace=False)
        return EvalLoader(samples, **self._loader_args(samples))  # Lightning shares it among processes, each image once

    def predict_on(self, paths: Iterable[str]) -> None:
        """Predict these files instead of those in ``predict_dir``; files that cannot be read are left out.

        Args:
            paths: image files, each once. For a few of them no loading process is started.
        """
        self._predict_files = Paths("", map(os.fsencode, paths))
        self.num_workers = min(self._workers(), len(self._predict_files) // FILES_PER_WORKER)

    def unread(self) -> dict[str, str]:
        """Return the files that prediction left out, with the reasons."""
        bad = self._left_out
        rows = [bad.row(index) for index in bad.new()] if bad else []
        return {path: reason for _, path, reason in rows}

    def teardown(self, stage: str | None = None) -> None:
        """Report bad images that were skipped."""
        self._report.update(self._bad.values(), self.trainer)
        self._report.warn()

    def on_exception(self, exception: BaseException) -> None:
        """Report bad images that were skipped, and replace the error of a killed worker by one with a remedy."""
        if message := explain_death(exception):
            exception.args = (message,)
        self.teardown()

    def state_dict(self) -> dict[str, Any]:
        """Give the seed of the running loaders, for the checkpoint."""
        return {} if self._seed is None else {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that is resumed."""
        self._seed = state_dict["seed"]
        if self._seed != torch.initial_seed():
            rank_zero_info(f"the data continues with the seed of the resumed run, {self._seed}")

    @abstractmethod
    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Return the evaluation transform for another size, for ``dataset.transform`` of a loader.

        Args:
            image_size: side of the model's input in pixels, at least 1.
            crop_ratio: ``image_size`` divided by the short side before the center crop, above 0 and at most 1; None
                keeps the ratio of ``eval_transform``.
        """

    def input_transform(self) -> InputTransform:
        """Return what makes an image, or its file, the input of a model, as in validation."""
        return InputTransform(self.eval_transform, self._file_reader(), self.exif)

    @abstractmethod
    def _load(self, split: Split) -> dict[Split, Source]:
        """Give the samples of a split, and of others that come with them at no cost."""

    def _no_test(self, root: str | os.PathLike[str], remedy: str = "") -> FileNotFoundError:
        """Make the error of a test without test images."""
        remedy = f"{remedy}, or evaluate" if remedy else "Evaluate"
        return FileNotFoundError(
            f"{type(self).__name__}(root={os.fspath(root)!r}): there is no test split. {remedy} the validation images "
            "with `lit-tricks validate`."
        )

    def auto_workers(self) -> int:
        """Return the number of loading processes for ``num_workers="auto"``."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_ranks = self.trainer.num_devices if self.trainer is not None else 1
        return min(max(cores // local_ranks, 1), MAX_AUTO_WORKERS)

    def source(self, split: Split) -> Source:
        """Return the untransformed samples of a split."""
        if split not in self._sources:
            self._sources.update(self._load(split))
        return self._sources[split]

    def _samples(self, name: str, source: Source, transform: Transform) -> Samples:
        if self._seed is None:
            seed = torch.initial_seed()
            self._seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        workers = self._workers() if self.thread_workers else 1
        if self.on_bad_image == "skip" and name not in self._bad:
            # In evaluation another image would count twice.
            self._bad[name] = BadImages(source, name, replace=name == "train")
        kind = PredictSamples if name == "predict" else self.sample_type
        return kind(source, transform, self._seed, max(workers, 1), self._bad.get(name))

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        samples = self._samples(split, self.source(split), self.eval_transform)
        args, (replicas, rank) = self._loader_args(samples), self._replicas()
        if replicas > 1:
            args["batch_size"] = eval_batch_size(self.batch_size, len(samples), replicas)
            args["sampler"] = EvalSampler(samples, replicas, rank)
        return self.eval_loader_type(samples, **args)

    def _file_reader(self) -> Reader:
        """Return a function that reads an image file. Loading processes get a copy of it."""
        return partial(read_image, exif=self.exif)

    def _workers(self) -> int:
        return self.auto_workers() if self.num_workers == "auto" else self.num_workers

    def _loader_args(self, samples: Samples) -> dict[str, Any]:
        workers = min(self._workers(), 1) if self.thread_workers else self._workers()
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "collate_fn": self.collate,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # With its own generator, since each pass would otherwise draw from the generator of the process to seed the
            # workers.
            "generator": torch.Generator().manual_seed(samples.seed),
        }

    def _replicas(self) -> tuple[int, int]:
        distributed = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (distributed["num_replicas"], distributed["rank"]) if distributed else (1, 0)

    def _images_of_process(self) -> int:
        """Return how many training images a process gets."""
        return -(-len(self.source("train")) // self._replicas()[0])

    def _check_enough(self) -> None:
        replicas, images = self._replicas()[0], self._images_of_process()
        if self.batch_size > images and self.batch_size != self._given_batch_size:
            # Lightning's BatchSizeFinder doubles it until the memory is full, or a batch has all images.
            rank_zero_info(f"batch_size={self.batch_size} is lowered to {images}, which is all training images")
            self.batch_size = images
        if "batch_size" in self.hparams:  # checkpoints have what was found
            self.hparams["batch_size"] = self.batch_size
        if self.batch_size > images:
            share = f" in each of {replicas} processes" if replicas > 1 else ""
            remedy = f"at most {images}, and --trainer.callbacks+=LinearScaling, as the usual rates are for 256"
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the {images} training images{share}, and training drops "
                f"the last partial batch, so that none is left: use a batch_size of {remedy}"
            )

    def _predict_paths(self) -> Paths:
        if self._predict_files is not None:
            return self._predict_files
        if self.predict_dir is None:
            raise ValueError("predict_dir is not set: give the folder of the images to predict")
        paths = find_images(self.predict_dir)
        if not paths:
            endings = " ".join(ENDINGS)
            raise FileNotFoundError(f"no image below predict_dir={self.predict_dir!r}: files must end in {endings}")
        return paths


def resize_size_for(image_size: int, crop_ratio: float | None, default: float = 1.0) -> int:
    """Return the short side before the center crop in pixels. ``default`` is the ratio for None.

    Raises:
        ValueError: for an argument out of its range.
    """
    image_size = integer("eval_transform_at", "image_size", image_size, 1, "Give a number of pixels.", MAX_SIDE)
    crop_ratio = default if crop_ratio is None else crop_ratio
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio!r}: 0.875 is 224 of 256 pixels")
    return round(image_size / crop_ratio)
