"""``lit-tricks export``: a checkpoint as others use it: timm and the Hugging Face Hub, ONNX, torch.export, safetensors.

One caveat: what is exported maps normalised images to logits. The normalisation is told beside it, not done in it.
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
    """Write the network of a checkpoint for use without lit_tricks, and check that it gives the same logits there.

    The weights are those that the checkpoint evaluates: the averaged ones of a run with EMA or SWA. Beside them stand
    the size of the images, their normalisation and crop, the names of the classes and the metrics, in timm's words.
    "timm" is a folder for timm.create_model("local-dir:FOLDER", pretrained=True) and for the Hugging Face Hub, with a
    model card; "onnx" a file for ONNX Runtime and others; "torch-export" a file for torch.export.load; "safetensors"
    the weights alone. The first three take any number of images, all of one size. A Detector takes one image, with
    "onnx" of any size, and gives boxes in pixels, scores, and labels from 1; they are compared with the checkpoint's to
    0.01 pixels and a score of 1e-4.

    Args:
        checkpoint: of a Classifier, a Segmenter or a Detector, or the folder of its run, runs/NAME/vN, of which the
            best one is taken. timm can hold classifiers only.
        format: what to write.
        output: file, or for timm the folder, to write; by default it is named after the checkpoint, and lies beside it.
        license: identifier of the licence that the model is given away under, such as apache-2.0.
        input_size: side of the images in pixels, at least 1; by default that of the test, of a Detector its min_size.
        mean: of each channel, on the scale from 0 to 1; by default that of the data.
        std: standard deviation of each channel, on the scale from 0 to 1, above 0; by default that of the data.
        crop_ratio: size over the short side before the centre crop, in (0, 1]; by default that of the data.
        module: what the weights are of, and are filled into; by default the checkpoint says what it is.
        overwrite: replace what exists.

    Returns:
        The path of the file or folder.

    Raises:
        FileNotFoundError: if the checkpoint, or the folder of ``output``, does not exist.
        FileExistsError: if ``output`` exists, unless it is to be replaced.
        PermissionError: if nothing can be written there.
        ModuleNotFoundError: for ONNX without the packages of the extra ``export``.
        ValueError: if the checkpoint is damaged, of another module, does not say what images it is for, or is of a
            network that the format can not hold.
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
        raise PermissionError(f"{target} can not be written ({error.strerror}): choose another --output.") from error
    if format == "onnx":
        import_onnx()
    return target
