"""A network in one file: ONNX, torch.export, safetensors."""

from __future__ import annotations

import json
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch.export import Dim

from lit_tricks.commands.exporting.network import Exported
from lit_tricks.utils.blame import is_about_input

__all__ = [
    "OPSET",
    "import_onnx",
    "not_exportable",
    "require_onnx_size",
    "write_onnx",
    "write_safetensors",
    "write_torch_export",
]

OPSET = 18  # the one that torch writes without converting
MOST_ONNX = 2**31 - 2**20  # bytes of weights in one file of protobuf


def import_onnx() -> None:
    """Raise if the optional packages for ONNX are missing.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'--format onnx needs {", ".join(missing)}, which is not installed: pip install "lit-tricks[export]"',
            name=missing[0],
        )


def write_onnx(exported: Exported, path: Path) -> None:
    """Write an ONNX file from any number of ``images`` to ``logits``, and compare onnxruntime's output with torch's.

    Raises:
        ValueError: if the network cannot be written in this format.
    """
    import onnxruntime

    require_onnx_size(exported)
    try:
        program: Any = torch.onnx.export(
            exported.network, (exported.images(2),), input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: Dim("batch")},), opset_version=OPSET, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    except Exception as error:  # the steps of the exporter fail in many ways, with pages of text
        raise not_exportable(exported, "ONNX", error) from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it names the folders of this machine
    program.model.metadata_props.update(exported.metadata())
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exported.check(
        lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), "onnxruntime"
    )


def require_onnx_size(exported: Exported) -> None:
    """Raise ValueError if the weights are too large for one ONNX file."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in exported.network.state_dict().values())
    if size > MOST_ONNX:
        raise ValueError(
            f"the weights have {size / 2**30:.1f} GiB, and one ONNX file holds 2: choose --format torch-export."
        )


def write_torch_export(exported: Exported, path: Path) -> None:
    """Write a file for ``torch.export.load``, with ``metadata.json`` among its extra files.

    Raises:
        ValueError: if the network cannot be written in this format.
    """
    try:
        program = torch.export.export(exported.network, (exported.images(2),), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise not_exportable(exported, "torch.export", error) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the folders of this machine
    with path.open("w+b") as stream:  # by name it would have to end in .pt2
        torch.export.save(program, stream, extra_files={"metadata.json": json.dumps(exported.metadata(), indent=2)})
        stream.seek(0)
        exported.check(torch.export.load(stream).module(), "torch.export")


def write_safetensors(exported: Exported, path: Path) -> None:
    """Write only the weights, under timm's keys, with the metadata in the header of the file."""
    state = {key: tensor.contiguous().clone() for key, tensor in exported.network.state_dict().items()}
    path.write_bytes(save(state, exported.metadata() | {"format": "pt"}))  # save_file lets nobody else read the file
    found = load_file(path)
    if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
        raise ValueError(f"{path} does not hold the weights that were written. Check the disk, and export again.")


def not_exportable(exported: Exported, what: str, error: Exception) -> ValueError:
    """Return the error for a network that a format cannot hold.

    Raises:
        Exception: the error itself, if the code of this package made it.
    """
    if not is_about_input(error):
        raise error
    name = type(exported.network).__name__
    reason = textwrap.shorten(str(error.__cause__ or error), 160, placeholder=" ...")
    return ValueError(
        f"{name} cannot be written by {what} ({type(error).__name__}: {reason}): choose another --format."
    )
