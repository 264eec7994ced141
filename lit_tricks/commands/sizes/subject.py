"""Load a trained network and its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_tricks.commands.batch_transfer import transfer
from lit_tricks.commands.checkpoints import checkpoint_at, data_of, fill, module_of, read_checkpoint
from lit_tricks.models import load_weights
from lit_tricks.models.weights import nearest
from lit_tricks.tasks.classification import Classifier
from lit_tricks.utils.class_names import require_same_classes
from lit_tricks.utils.dataset_transforms import at_size, changed
from lit_tricks.utils.log import log
from lit_tricks.utils.modules import find_classifier

__all__ = ["Subject", "Views", "subject_of"]


class Views:
    """A transform that gives the result of several, in a list.

    Args:
        transforms: of an image, which is not changed by them.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms: list[Any] = list(transforms)

    def __call__(self, image: Any) -> list[Tensor]:
        """Transform an image in each way."""
        if hasattr(image, "pixels"):  # lazily decoded: decode the whole image once
            image.pixels()
        return [transform(image) for transform in self.transforms]


class Subject:
    """A network in evaluation mode on its device, with its data.

    Args:
        module: maps images (N, C, H, W) to logits (N, classes).
        data: data module of the images.
        train_size: side of the training images in pixels, if known.
        crop_ratio: crop ratio of evaluation; None is the data's.
        checkpoint: file of the weights; None for a timm model.

    Raises:
        ValueError: if the module has no ``forward``.
    """

    def __init__(
        self,
        module: LightningModule,
        data: LightningDataModule,
        train_size: int | None,
        crop_ratio: float | None,
        checkpoint: Path | None = None,
    ) -> None:
        if not is_overridden("forward", module, parent=LightningModule):
            raise ValueError(f"{type(module).__name__} has no `forward`: give it one, from images to logits.")
        on_gpu = torch.cuda.is_available()
        self.trainer: Trainer = Trainer(
            devices=1, precision="bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true",
            logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        self.device: torch.device = self.trainer.strategy.root_device
        self.module: LightningModule = module.to(self.device).eval()
        self.data = data
        self.train_size = train_size
        self.crop_ratio = crop_ratio
        self.checkpoint = checkpoint
        module.trainer = data.trainer = self.trainer  # hooks read the stage
        self.trainer.validating = True
        data.prepare_data()

    def dataset(self, split: Literal["train", "val", "test"], transform: Any) -> tuple[Any, Any]:
        """Return a data set with another transform, and its loader.

        Raises:
            ValueError: for data that does not support this.
        """
        self.data.setup({"train": "fit", "val": "validate", "test": "test"}[split])
        loader: Any = getattr(self.data, f"{split}_dataloader")()
        name = type(self.data).__name__
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            found = type(getattr(loader, "dataset", loader)).__name__
            raise ValueError(f"{name} gives a {found}: {split} images must come from one DataLoader, with an index.")
        try:
            return changed(loader.dataset, lambda part: setattr(part, "transform", transform)), loader
        except LookupError as error:
            raise ValueError(f"the data set of {name}, {error}, has no attribute `transform`: give it one.") from None

    def transform_at(self, size: int, crop_ratio: float | None = None) -> Any:
        """Return the transform of evaluation for a size and a crop ratio."""
        ratio = crop_ratio or self.crop_ratio
        if make := getattr(self.data, "eval_transform_at", None):
            return make(size, ratio)
        if ratio:
            raise ValueError(
                f"{type(self.data).__name__} does not define its crop: give it a method `eval_transform_at(image_size, "
                "crop_ratio)`, or leave the crop ratio out."
            )
        self.data.setup("validate")
        dataset: Any = self.data.val_dataloader().dataset
        return at_size(dataset.transform, size)

    def loader(self, dataset: Any, like: Any, batch_size: int, indices: Sequence[int]) -> Any:
        """Batches of a data set in the given order, loaded as another loader does it."""
        workers = {"multiprocessing_context": like.multiprocessing_context} if like.num_workers else {}
        return DataLoader(
            dataset, batch_size, sampler=indices, num_workers=like.num_workers, collate_fn=like.collate_fn,
            pin_memory=like.pin_memory, worker_init_fn=like.worker_init_fn, generator=torch.Generator(), **workers,
        )  # fmt: skip

    def on_device(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Transfer a batch as in validation.

        Raises:
            ValueError: if the result is no pair of images and labels.
        """
        images, labels = transfer([images, labels], self.device, self.module, self.data)
        return images, labels

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes), in float32."""
        with self.trainer.precision_plugin.forward_context():
            logits: Tensor = self.module(images)
        return logits.float()


def subject_of(
    ckpt: str | None,
    data: LightningDataModule | None,
    module: LightningModule | None = None,
    weights: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> Subject:
    """Load a network and its data.

    Args:
        ckpt: a checkpoint, a run folder, or the name of a timm model.
        data: data module to use instead of the checkpoint's.
        module: module that the weights belong to.
        weights: weights of a timm model.
        model_args: arguments of the model.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the checkpoint lacks its model or data, or these do not fit together.
    """
    if not ckpt and module is None:
        raise ValueError("give --ckpt, a checkpoint, or the name of one of timm's models.")
    path = _checkpoint(ckpt) if ckpt else None
    data = data_of(path) if data is None and path else data
    name = ckpt or type(module).__name__
    if data is None:
        raise ValueError(
            f"{name} does not name its training data: set --data, such as --data "
            "ImageFolder --data.root FOLDER, or the --config of a run."
        )
    if module is None:
        if path is None:
            return _of_timm(name, data, weights, model_args)
        module = _of_checkpoint(path, name, model_args)
    elif path:
        fill(module, path)
    _check_classes(module, data, name)
    return Subject(module, data, _side(module, data), None, path)


def _checkpoint(ckpt: str) -> Path | None:
    """Return the file of a checkpoint; None for the name of a model."""
    path = Path(ckpt)
    if not path.is_file() and timm.is_model(ckpt.partition(".")[0]):
        return None
    is_path = path.exists() or path.suffix in (".ckpt", ".pt", ".pth") or len(path.parts) > 1
    return checkpoint_at(path, "--ckpt") if is_path else None


def _of_checkpoint(path: Path, name: str, model_args: dict[str, Any] | None) -> LightningModule:
    """Return the module of a checkpoint, with some arguments of its model replaced."""
    hparams = read_checkpoint(path).get("hyper_parameters", {})
    changes = {"model_args": (hparams.get("model_args") or {}) | model_args} if model_args else {}
    module = module_of(path, **changes)
    if getattr(module, "score", "top1") != "top1":
        raise ValueError(f"{name} is of a {type(module).__name__}, and this is for classifiers of whole images.")
    return module


def _of_timm(name: str, data: LightningDataModule, weights: str | None, model_args: dict[str, Any] | None) -> Subject:
    """Return a model of timm's, with its own normalization, size and crop ratio."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = nearest(name, timm.list_models()) or "."
        raise ValueError(f"--ckpt {name} is neither a file nor a model of timm's{near}")
    if not weights and not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no weights for {name}: give --weights, a file.")
    known: Any = timm.get_pretrained_cfg(name if timm.is_model_pretrained(name) else architecture)
    channels, *_, size = known.input_size
    num_classes = int(getattr(data, "num_classes", known.num_classes))
    names = getattr(data, "classes", None)
    module = Classifier(architecture, num_classes, model_args, None, names, (channels, size, size))
    heads: Any = find_classifier(module).values()
    before = [head.weight.clone() for head in heads]
    load_weights(module.model, weights or name, names)
    if any(torch.equal(head.weight, old) for head, old in zip(heads, before, strict=True)):  # kept initialization
        raise ValueError(
            f"{weights or name} is for other classes than the {num_classes} of the data: the log names the difference. "
            "Give data of the same classes."
        )
    if hasattr(data, "mean") and hasattr(data, "std"):
        statistics = {key: tuple(255 * value for value in getattr(known, key)) for key in ("mean", "std")}
        log.info("%s: images are normalized by its mean %s and std %s", name, *statistics.values())
        vars(data).update(statistics)
        data.hparams.update(statistics)
    return Subject(module, data, size, known.crop_pct)


def _side(module: LightningModule, data: LightningDataModule) -> int | None:
    """Side of the images in training."""
    size = getattr(module, "hparams", {}).get("input_size") or getattr(data, "input_size", None)
    return int(size[-1]) if size else None


def _check_classes(module: LightningModule, data: LightningDataModule, ckpt: str) -> None:
    remedy = f"Give --data with the classes of {ckpt}."
    require_same_classes(module, data, "the checkpoint", "the data", remedy)
    ours, theirs = (getattr(thing, "num_classes", None) for thing in (module, data))
    if ours and theirs and ours != theirs:
        raise ValueError(f"{ckpt} has {ours} classes, and the data has {theirs}: pass data with the same classes.")
