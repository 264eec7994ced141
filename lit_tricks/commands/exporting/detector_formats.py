"""A Detector in one file: ONNX for images of any size, torch.export for images of one size.

One caveat: both take one image at a time. Detectors resize, so that images of a batch would differ in size.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign, boxes, roi_align

from lit_tricks.commands.exporting.file_formats import OPSET, not_exportable, require_onnx_size, write_safetensors
from lit_tricks.commands.exporting.network import Exported
from lit_tricks.tasks.detection import Detector

__all__ = ["DETECTOR_WRITERS", "DetectorNetwork", "ExportedDetector"]

OUTPUTS = ["boxes", "scores", "labels"]
PIXELS, SCORE = 0.01, 1e-4  # largest difference of boxes and scores to the checkpoint's
SAME = 0.99  # part of the objects that must agree: equal scores may come in another order

Objects = tuple[Tensor, Tensor, Tensor]


class DetectorNetwork(nn.Module):
    """Boxes (n, 4) in pixels, scores (n,) and labels (n,) from 1 of one image (C, H, W), the best first.

    Args:
        module: in evaluation mode.
    """

    def __init__(self, module: Detector) -> None:
        super().__init__()
        self.model: nn.Module = module.model
        self.offset: int = module.label_offset

    def forward(self, image: Tensor) -> Objects:
        """Return boxes, scores and labels."""
        [found] = self.model([image])
        return found["boxes"], found["scores"], found["labels"] + self.offset


@dataclass(frozen=True)
class ExportedDetector(Exported):
    """A detector in evaluation mode on the CPU, and what belongs to it (see the base class)."""

    def metadata(self) -> dict[str, str]:
        """Return all of it as text."""
        return super().metadata() | {"outputs": json.dumps(OUTPUTS), "first_label": "1"}

    def images(self, count: int) -> Tensor:
        """Return one image of noise as it comes out of the normalization, (C, H, W); the count is the seed."""
        return super().images(count)[0]

    @torch.no_grad()
    def check(self, objects_of: Callable[[Tensor], Any], where: str, sizes: tuple[tuple[int, int], ...]) -> None:  # type: ignore[override]
        """Check that something else finds the same objects, in images of several sizes.

        Raises:
            ValueError: if it does not.
        """
        channels = self.preprocessing.input_size[0]
        for seed, size in enumerate(sizes):
            image = torch.randn(channels, *size, generator=torch.Generator().manual_seed(seed))
            expected, found = self.network(image), objects_of(image)
            same = agreement(expected, found)
            if same < SAME:
                raise ValueError(
                    f"{where} finds other objects than the checkpoint in an image of {size[1]} x {size[0]} pixels: "
                    f"{same:.0%} of them are the same."
                )


def agreement(expected: Objects, found: Objects) -> float:
    """Return the part of the objects that both found, with the same label, score and box."""
    total = max(len(expected[1]), len(found[1]))
    free = torch.ones(len(found[1]), dtype=torch.bool)
    for box, score, label in zip(*expected, strict=True):
        near = (found[0] - box).abs().amax(1) <= PIXELS
        matches = torch.where(near & ((found[1] - score).abs() <= SCORE) & (found[2] == label) & free)[0]
        free[matches[:1]] = False
    return int((~free).sum()) / total if total else 1.0


def write_onnx(exported: ExportedDetector, path: Path) -> None:
    """Write an ONNX file from an ``image`` of any size to boxes, scores and labels, and compare onnxruntime's output.

    Raises:
        ValueError: if the network cannot be written in this format.
    """
    import onnx
    import onnxruntime

    require_onnx_size(exported)
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in OUTPUTS}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: torchvision's detectors are made for it
            torch.onnx.export(
                exported.network, (exported.images(2),), path, input_names=["image"], output_names=OUTPUTS,
                dynamic_axes=axes, opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except Exception as error:
        raise not_exportable(exported, "ONNX", error) from error
    model = onnx.load(path)
    for node in model.graph.node:
        node.doc_string = ""  # it names the folders of this machine
    onnx.helper.set_model_props(model, exported.metadata())
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of shapes that depend on the image
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def objects_of(image: Tensor) -> Any:
        return tuple(map(torch.from_numpy, session.run(OUTPUTS, {"image": image.numpy()})))

    _, height, width = exported.preprocessing.input_size
    exported.check(objects_of, "onnxruntime", ((height, width), (height, 2 * width), (height + height // 3, width)))


def write_torch_export(exported: ExportedDetector, path: Path) -> None:
    """Write a file for ``torch.export.load``, for images of one size, with ``metadata.json`` among its extra files.

    Raises:
        ValueError: if the network cannot be written in this format.
    """
    network: Any = copy.deepcopy(exported.network)
    if hasattr(network.model, "roi_heads"):
        network.model.roi_heads.box_roi_pool = _PoolEveryLevel(network.model.roi_heads.box_roi_pool)
    try:
        with mock.patch.object(boxes, "batched_nms", _batched_nms), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what torchvision uses
            program = torch.export.export(network, (exported.images(2),), strict=False)
    except Exception as error:
        raise not_exportable(exported, "torch.export", error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the folders of this machine
    with path.open("w+b") as stream:
        torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(exported.metadata(), indent=2)})
        stream.seek(0)
        size = exported.preprocessing.input_size[1:]
        exported.check(torch.export.load(stream).module(), "torch.export", (size, size))


class _PoolEveryLevel(nn.Module):
    """torchvision's pooling of regions, without shapes that depend on the regions: each level pools all of them."""

    def __init__(self, pool: MultiScaleRoIAlign) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, maps: dict[str, Tensor], regions: list[Tensor], image_shapes: Any) -> Tensor:
        pool: Any = self.pool
        [region] = regions
        numbered = torch.cat([torch.zeros_like(region[:, :1]), region], 1)  # of the image in the batch
        levels = pool.map_levels(regions)
        pooled = [
            roi_align(maps[name], numbered, pool.output_size, scale, pool.sampling_ratio)
            for name, scale in zip(pool.featmap_names, pool.scales, strict=True)
        ]
        result: Tensor = pooled[0]
        for level, each in enumerate(pooled[1:], start=1):
            result = torch.where((levels == level)[:, None, None, None], each, result)
        return result


def _batched_nms(found: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Do as torchvision's function of this name, without a branch that depends on the number of boxes."""
    top = torch.cat([found.flatten(), found.new_zeros(1)]).max()
    apart = found + (groups.to(found) * (top + 1))[:, None]
    kept: Tensor = boxes.nms(apart, scores, iou_threshold)
    return kept


DETECTOR_WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "safetensors": write_safetensors,
}
