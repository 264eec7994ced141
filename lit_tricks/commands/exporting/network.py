"""The exported network: its weights, its preprocessing, and the meaning of its output.

All formats use the field names of timm's ``config.json``.
"""

from __future__ import annotations

import inspect
import math
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lit_tricks
from lit_tricks._compat import CLASS_PATH_KEY
from lit_tricks.commands.checkpoints import data_of, data_settings, fill, module_of, read_checkpoint
from lit_tricks.data.datamodule import ImageDataModule, resize_size_for
from lit_tricks.tasks.classification import Classifier
from lit_tricks.tasks.detection import Detector
from lit_tricks.tasks.segmentation import Segmenter
from lit_tricks.utils.checkpoint_files import class_of
from lit_tricks.utils.finite import to_json

__all__ = ["Exported", "Preprocessing", "crop_pct", "module_to_export", "network_of", "preprocessing_of"]

KINDS = (Classifier, Segmenter, Detector)
NAMES = "Classifier, Segmenter or Detector"
TOLERANCE = 1e-4  # between logits of the checkpoint and of what was made of it, relative where they are above 1
BATCH_SIZES = (1, 2, 5)


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of images. All fields except ``exif`` are fields of timm's ``pretrained_cfg``.

    Args:
        input_size: channels, height and width.
        mean: of the channels, on the scale from 0 to 1.
        std: standard deviation of the channels, on the scale from 0 to 1.
        crop_pct: side divided by the short side before the center crop, in (0, 1].
        crop_mode: "center" keeps the aspect ratio, "squash" makes the image a square.
        interpolation: of the resizing, antialiased.
        exif: whether images are rotated by their EXIF orientation.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    exif: bool = False


@dataclass(frozen=True)
class Exported:
    """A network in evaluation mode on the CPU, and its metadata.

    Args:
        task: "image-classification", "image-segmentation" or "object-detection".
        network: maps images (N, C, H, W) to logits (N, classes) or (N, classes, H, W), or to objects, see
            ``ExportedDetector``.
        model: name of the model, or the settings of its class; None if the checkpoint lacks it.
        model_args: arguments of a model given by name.
        preprocessing: preprocessing of its images.
        label_names: names of the classes.
        metrics: metrics of the checkpoint, by split, if known.
        license: identifier of the license.
    """

    task: str
    network: nn.Module
    model: Any
    model_args: dict[str, Any]
    preprocessing: Preprocessing
    label_names: list[str]
    metrics: dict[str, dict[str, float]]
    license: str

    def metadata(self) -> dict[str, str]:
        """Return all of it as text: what is no text by nature is JSON."""
        known: dict[str, Any] = asdict(self.preprocessing)
        known |= {"num_classes": len(self.label_names), "label_names": self.label_names, "metrics": self.metrics}
        known |= {"model": self.model, "model_args": self.model_args} if self.model else {}
        known |= {"task": self.task, "license": self.license}
        known |= {"producer": f"lit_tricks {lit_tricks.__version__}"}
        return {key: value if isinstance(value, str) else to_json(value) for key, value in known.items()}

    def images(self, count: int) -> Tensor:
        """Noise as it comes out of the normalization, (count, C, H, W)."""
        return torch.randn(count, *self.preprocessing.input_size, generator=torch.Generator().manual_seed(count))

    @torch.no_grad()
    def check_size(self) -> None:
        """Raise if the network fails on its images. Raises: ValueError: if it fails."""
        try:
            self.network(self.images(2))
        except Exception as error:
            size = " x ".join(map(str, self.preprocessing.input_size))
            reason = textwrap.shorten(str(error), 160, placeholder=" ...")
            raise ValueError(f"the network takes no images of {size} ({reason}): give its --input_size.") from error

    @torch.no_grad()
    def check(self, logits_of: Any, where: str, exact: bool = False) -> None:
        """Raise if another function returns different logits, for batches of several sizes.

        Raises:
            ValueError: if it does not.
        """
        for count in BATCH_SIZES:
            images = self.images(count)
            expected, found = self.network(images), logits_of(images)
            apart = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
            allowed = 0 if exact else TOLERANCE * max(1.0, float(expected.abs().max()))
            if not apart <= allowed:
                raise ValueError(
                    f"{where} gives other logits than the checkpoint, by {apart:.2g} in a batch of {count}."
                )


class _Logits(nn.Module):
    """A segmentation network that returns only the logits, since evaluation has no auxiliary head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)[0]


def network_of(module: Classifier | Segmenter) -> nn.Module:
    """Return the network from images to logits, without the LightningModule."""
    if isinstance(module, Segmenter):
        return _Logits(module.model).eval()
    if module.logit_scaling.factors is None:
        return module.model
    return nn.Sequential(module.model, module.logit_scaling).eval()


def module_to_export(path: Path, module: LightningModule | None) -> Classifier | Segmenter | Detector:
    """Return the module of a checkpoint, in evaluation mode on the CPU, with the saved weights.

    Raises:
        ValueError: if the checkpoint belongs to another module, or lacks its network.
    """
    content = read_checkpoint(path)
    settings = content.get("hyper_parameters", {})
    if module is not None:
        fill(module, path)
    elif CLASS_PATH_KEY in settings:
        name = settings[CLASS_PATH_KEY]
        if not issubclass(class_of(name, LightningModule, path), KINDS):
            raise ValueError(f"{path} is of {name}: export takes a {NAMES}.")
        module = module_of(path)
    else:  # saved without the command line, which would have named the class
        kind = Segmenter if "decoder" in settings else Detector if "backbone" in settings else Classifier
        foreign = sorted(settings.keys() - inspect.signature(kind).parameters.keys())
        if foreign or "num_classes" not in settings:
            what = f"it has the setting {foreign[0]!r}" if foreign else "it does not name its module"
            raise ValueError(f"{path} is not of a {kind.__name__}: {what}. Give --module, if it is one.")
        if "model" not in settings:
            raise ValueError(f"{path} does not name the network of its weights: set --module to a Classifier with it.")
        module = module_of(path)
    if not isinstance(module, KINDS) or type(module).forward not in [kind.forward for kind in KINDS]:
        raise ValueError(f"{type(module).__name__} is no {NAMES}, or has its own forward: export supports neither.")
    return module.cpu().eval()


def preprocessing_of(
    path: Path,
    module: Classifier | Segmenter | Detector,
    input_size: int | None,
    mean: list[float] | None,
    std: list[float] | None,
    crop_ratio: float | None,
) -> Preprocessing:
    """Return the preprocessing of a checkpoint's data. Given values override it.

    Raises:
        ValueError: if a value is neither given nor in the checkpoint, or out of range.
    """
    data = _data_of(path, needed=mean is None or std is None)
    channels, *_, trained = module.hparams.get("input_size") or (3, 224, 224)
    shortest = module.hparams["min_size"] if isinstance(module, Detector) else None
    mode, ratio, exif = "center", 0.875, False  # timm's
    if data is not None:
        channels, *_, trained = data.input_size
        trained = data.hparams.get("eval_size") or trained
        mode, ratio, exif = data.crop_mode, data.crop_ratio, data.exif
        mean = [value / 255 for value in data.mean] if mean is None else mean
        std = [value / 255 for value in data.std] if std is None else std
    if mean is None or std is None:
        raise ValueError(
            f"{path} has no normalization: set --mean and --std, on the scale from 0 to 1, and "
            f"--input_size, if that is not {trained}."
        )
    if shortest:  # it resizes images of any size to this one, or of several to the last
        trained = shortest[-1] if isinstance(shortest, list | tuple) else shortest
    size = trained if input_size is None else input_size
    if size < 1:
        raise ValueError(f"--input_size={size} is below 1: it is the side of the images in pixels.")
    if crop_ratio is not None and not 0 < crop_ratio <= 1:
        raise ValueError(f"--crop_ratio {crop_ratio:g} is not above 0 and at most 1: 0.875 is 224 of 256 pixels.")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                f"--{name} has {len(values)} values, and the images have {channels} channels: give as many."
            )
        if not all(0 <= value <= 1 for value in values) or (name == "std" and min(values) == 0):
            raise ValueError(
                f"--{name} {' '.join(map(str, values))}: on the scale from 0 to 1 it is 1/255 of that on 0-255."
            )
    resize_size = resize_size_for(size, crop_ratio, default=ratio)
    return Preprocessing((channels, size, size), tuple(mean), tuple(std), crop_pct(size, resize_size), mode, exif=exif)


def crop_pct(size: int, resize_size: int) -> float:
    """Return the ratio from which timm, which rounds down, comes to just this size before the crop."""
    ratio = size / resize_size
    while math.floor(size / ratio) < resize_size:
        ratio = math.nextafter(ratio, 0)
    return ratio


def _data_of(path: Path, needed: bool) -> ImageDataModule | None:
    """Return the data module, where it is one of ours; its images need not be there any more."""
    try:
        settings = data_settings(path, loads=False)
    except ValueError:
        if needed:
            raise
        return None
    if not settings or not issubclass(class_of(settings["class_path"], object, path), ImageDataModule):
        return None
    data: Any = data_of(path, predict_dir=tempfile.gettempdir())  # as it is made to predict
    return data  # type: ignore[no-any-return]
