"""An exported ONNX file as a module that predicts, with the data module that prepares its images."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.data.exported import ExportedData, ExportedDetectionData
from lit_tricks.utils.blame import is_about_input

__all__ = ["ONNXNetwork", "load_onnx"]


class ONNXNetwork(LightningModule):
    """A network that ONNX Runtime runs.

    Args:
        path: file that ``lit-tricks export --format onnx`` wrote.

    Raises:
        ModuleNotFoundError: without ONNX Runtime.
        ValueError: if the file is not ONNX, or does not hold the metadata of lit_tricks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if find_spec("onnxruntime") is None:
            raise ModuleNotFoundError(
                f'{path}: an ONNX file needs onnxruntime. Install it with pip install "lit-tricks[export]".',
                name="onnxruntime",
            )
        import onnxruntime

        try:
            self.session: Any = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        except Exception as error:  # ONNX Runtime's errors have no common class
            if not is_about_input(error):
                raise
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} is not a file that ONNX Runtime reads ({reason}). Export it again.") from error
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        missing = [name for name in ("input_size", "mean", "std", "label_names") if name not in self.metadata]
        if missing:
            raise ValueError(
                f"{path} has no {', '.join(missing)} in its metadata. Write it with `lit-tricks export --format onnx`."
            )
        self.class_names: list[str] = json.loads(self.metadata["label_names"])
        task = self.metadata.get("task")
        self.is_dense: bool = task == "image-segmentation"
        self.finds_objects: bool = task == "object-detection"

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images (N, C, H, W)."""
        [logits] = self.session.run(["logits"], {"images": images.float().cpu().numpy()})
        return torch.from_numpy(logits)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor | list[dict[str, Tensor]]:
        """Return probabilities (N, classes), for segmentation labels (N, H, W), or for detection objects."""
        if self.finds_objects:
            return [self._objects(image) for image in batch[0]]
        logits: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        if self.is_dense:
            return logits.argmax(1).to(torch.uint8 if len(self.class_names) <= 256 else torch.int32)
        return logits.softmax(dim=-1)

    def _objects(self, image: Tensor) -> dict[str, Tensor]:
        names = ["boxes", "scores", "labels"]
        found = self.session.run(names, {"image": image.float().cpu().numpy()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))


def load_onnx(path: Path) -> tuple[ONNXNetwork, ImageDataModule]:
    """Load an exported file, and make the data module that prepares images for it."""
    network = ONNXNetwork(path)
    known = network.metadata
    channels, height, width = json.loads(known["input_size"])
    mean, std = ([255 * value for value in json.loads(known[name])] for name in ("mean", "std"))
    exif = json.loads(known.get("exif", "false"))
    if network.finds_objects:
        return network, ExportedDetectionData(mean, std, network.class_names, exif)
    # a mask is for all of an image, which has one size in the file
    ratio = 1.0 if network.is_dense else float(json.loads(known.get("crop_pct", "1")))
    mode: Any = "squash" if network.is_dense else known.get("crop_mode", "center")
    data = ExportedData((channels, height, width), int(width / ratio), mode, mean, std, network.class_names, exif)
    return network, data
