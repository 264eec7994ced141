"""``lit-tricks export``: write a checkpoint for timm and the Hugging Face Hub, ONNX, torch.export or safetensors.

One caveat: the exported network maps normalized images to logits. The normalization is stored as metadata, and is not
part of the network.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule

from lit_tricks.commands.checkpoints import checkpoint_at
from lit_tricks.commands.exporting.detector_formats import DETECTOR_WRITERS, DetectorNetwork, ExportedDetector
from lit_tricks.commands.exporting.file_formats import import_onnx, write_onnx, write_safetensors, write_torch_export
from lit_tricks.commands.exporting.network import Exported, module_to_export, network_of, preprocessing_of
from lit_tricks.commands.exporting.timm_folder import FILES, write_timm
from lit_tricks.commands.model_card import Facts, text_of
from lit_tricks.commands.progress import progress
from lit_tricks.tasks.classification import Classifier
from lit_tricks.tasks.detection import Detector
from lit_tricks.tasks.segmentation import Segmenter
from lit_tricks.utils.files import written_whole
from lit_tricks.utils.log import log

__all__ = ["export"]


Format = Literal["timm", "onnx", "torch-export", "safetensors"]
ENDINGS = {"timm": "_timm", "onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}
WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "safetensors": write_safetensors,
}


def export(
    checkpoint: str,
    *,
    format: Format,  # noqa: A002  # the usual name
    output: str | None = None,
    license: str = "unknown",  # noqa: A002  # the name of the field
    input_size: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    crop_ratio: float | None = None,
    module: LightningModule | None = None,
    overwrite: bool = False,
) -> Path:
    """Export the network of a checkpoint for use without lit_tricks, and check that its logits are the same.

    The weights are the evaluated weights of the checkpoint: averaged weights for a run with EMA or SWA. The export
    includes input size, normalization, crop ratio, class names and metrics, under timm's field names. "timm" is a
    folder for timm.create_model("local-dir:FOLDER", pretrained=True) and for the Hugging Face Hub, with a model card.
    "onnx" is a file for ONNX Runtime and other tools. "torch-export" is a file for torch.export.load. "safetensors" has
    only the weights. The first three take any number of images of one size. A Detector takes one image, of any size
    with "onnx", and returns boxes in pixels, scores, and labels from 1. These are compared with the checkpoint to 0.01
    pixels and a score of 1e-4.

    Args:
        checkpoint: checkpoint of a Classifier, a Segmenter or a Detector, or its run folder, runs/NAME/vN, with its
            best checkpoint. The format timm is only for classifiers.
        format: output format.
        output: file to write, or folder for timm; by default next to the checkpoint, and named after it.
        license: identifier of the model's license, such as apache-2.0.
        input_size: side of the images in pixels, at least 1; by default the test size, or min_size of a Detector.
        mean: mean per channel, on the scale from 0 to 1; by default the data's.
        std: standard deviation per channel, on the scale from 0 to 1, above 0; by default the data's.
        crop_ratio: size divided by the short side before the center crop, in (0, 1]; by default the data's.
        module: module that the weights belong to; by default from the checkpoint.
        overwrite: replace what exists.

    Returns:
        The path of the file or folder.

    Raises:
        FileNotFoundError: if the checkpoint, or the folder of ``output``, does not exist.
        FileExistsError: if ``output`` exists, without ``overwrite``.
        PermissionError: if the folder is not writable.
        ModuleNotFoundError: for ONNX without the packages of the extra ``export``.
        ValueError: if the checkpoint is damaged, belongs to another module, lacks the input of its network, or if the
            format does not support the network.
    """
    path = checkpoint_at(checkpoint)
    target = _check(path, format, output, overwrite)
    with progress(f"export to {format}", 3) as advance:
        trained = module_to_export(path, module)
        if format == "timm" and not isinstance(trained, Classifier):
            raise ValueError(
                f"{path} is of a {type(trained).__name__}, and timm has classifiers: choose --format onnx or "
                "torch-export."
            )
        is_scaled = isinstance(trained, Classifier) and trained.logit_scaling.factors is not None
        if is_scaled and format in ("timm", "safetensors"):
            raise ValueError(
                f"{path} is calibrated by a factor after its network, as no layer scales the logits, and the format "
                f"{format} has only the network: choose --format onnx or torch-export."
            )
        facts = Facts.of(path)
        known: dict[str, Any] = {
            "model": trained.hparams.get("model") or facts.settings.get("model"),
            "model_args": trained.hparams.get("model_args") or {},
            "preprocessing": preprocessing_of(path, trained, input_size, mean, std, crop_ratio),
            "label_names": trained.class_names,
            "metrics": facts.metrics,
            "license": license,
        }
        exported: Exported
        if isinstance(trained, Detector):
            exported = ExportedDetector("object-detection", DetectorNetwork(trained).eval(), **known)
        else:
            task = "image-segmentation" if isinstance(trained, Segmenter) else "image-classification"
            exported = Exported(task, network_of(trained), **known)
        exported.check_size()
        advance(1)
        if format == "timm":
            _write_folder(exported, facts, target)
        else:
            with written_whole(target) as part:
                writers = DETECTOR_WRITERS if isinstance(trained, Detector) else WRITERS
                writers[format](exported, part)
        advance(2)
    log.info("export: %s", target)
    return target


def _write_folder(exported: Exported, facts: Facts, target: Path) -> None:
    """Write a folder aside, and move what is in it where it belongs once it is complete; other files there stay."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.resolve().parent) as part:
        write_timm(exported, Path(part))
        channels = exported.preprocessing.input_size[0]
        text = text_of(
            facts,
            exported.license,
            timm_folder=target.name,
            mode="L" if channels == 1 else "RGB",
            exif=exported.preprocessing.exif,
        )
        Path(part, "README.md").write_text(text, encoding="utf-8")
        target.mkdir(exist_ok=True)
        for file in FILES:
            os.replace(Path(part, file), target / file)


def _check(path: Path, format: str, output: str | None, overwrite: bool) -> Path:  # noqa: A002
    if format not in ENDINGS:
        raise ValueError(f"format={format!r} is unknown: choose one of {', '.join(get_args(Format))}.")
    target = Path(output) if output else path.with_name(path.stem + ENDINGS[format])
    if target.exists() and target.is_dir() != (format == "timm"):
        kind, other = ("file", "folder") if format == "timm" else ("folder", "file")
        raise FileExistsError(
            f"--output {target} is a {kind}, and --format {format} writes a {other}: choose another name."
        )
    existing = [target / file for file in FILES] if format == "timm" else [target]
    if (found := next((file for file in existing if file.exists()), None)) and not overwrite:
        raise FileExistsError(f"{found} exists: choose another --output, or give --overwrite to replace it.")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"--output {target} lies in a folder that does not exist: make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(f"{target} cannot be written ({error.strerror}): choose another --output.") from error
    if format == "onnx":
        import_onnx()
    return target
