"""Load a module with its weights, and the data module that prepares its images, for predictions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lit_tricks.commands.checkpoints import checkpoint_at, data_of, module_of
from lit_tricks.commands.predicting.onnx_network import load_onnx
from lit_tricks.data.datamodule import ImageDataModule

__all__ = ["accelerator_of", "load"]

DEVICES = "auto, cpu, cuda, cuda:0, mps"


def load(ckpt: str | Path) -> tuple[LightningModule, ImageDataModule]:
    """Load a module, and the data module that prepares images for it. The training images need not be there.

    Args:
        ckpt: checkpoint, run folder, or exported ONNX file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint, or does not name its module or its data.
    """
    path = checkpoint_at(ckpt, "--ckpt")
    if path.suffix == ".onnx":
        return load_onnx(path)
    module = module_of(path).eval()
    data = data_of(path, predict_dir=tempfile.gettempdir())
    if not isinstance(data, ImageDataModule):
        raise ValueError(
            f"{path} does not define how its images are prepared: set --data, such as --data ImageFolder --data.root "
            "FOLDER --data.image_size 224."
        )
    return module, data


def accelerator_of(device: str) -> dict[str, Any]:
    """Return the Trainer's arguments for a device.

    Raises:
        ValueError: for an unknown device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda", "gpu", "mps") or (index and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(f"device={device!r} is unknown. Choose one of {DEVICES}.")
    accelerator = "gpu" if kind == "cuda" else kind
    return {"accelerator": accelerator, "devices": [int(index)] if index else 1}
