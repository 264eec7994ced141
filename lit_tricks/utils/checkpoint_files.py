"""Checkpoints as files: read safely, checked for damage, written whole.

Checkpoints are data: nothing in a checkpoint is executed. A checkpoint may only name classes of this package, of
optimizers, or of modules that are already imported.
"""

from __future__ import annotations

import importlib
import mmap
import os
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from lit_tricks._compat import CLASS_PATH_KEY
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.files import open_regular, written_whole

__all__ = [
    "RUN",
    "check_archive",
    "check_classes",
    "checkpoint_without_weights",
    "class_of",
    "load_archive",
    "read_checkpoint",
    "require_resumable",
    "write_checkpoint",
]

# Packages that may be imported for a checkpoint. Other classes must already be imported.
OURS = ("lit_tricks", "timm.optim", "torch.optim")
RUN = (
    "callbacks",
    "optimizer_states",
    "optimizers",
    "lr_schedulers",
    "loops",
    "MixedPrecision",
    "current_model_state",
    "averaging_state",
)
"""Parts of a checkpoint that only a resumed run needs. Two are of Lightning's WeightAveraging."""
MAPPINGS = ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "callbacks", "loops")
LISTS = ("optimizer_states", "lr_schedulers")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint of Lightning; the weights are mapped into memory.

    Raises:
        ValueError: if the file is damaged, holds pickled objects, or is not a checkpoint; the message names it.
    """
    content = load_archive(path)
    fault = _fault(content)
    if fault:
        raise ValueError(f"{path} is not a checkpoint of Lightning, or damaged: {fault}.")
    return content  # type: ignore[no-any-return]


def checkpoint_without_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a checkpoint, with weights mapped into memory, or without them if they are in shards."""
    file = Path(path) / "meta.pt"
    source = file if file.exists() else path
    return torch.load(source, map_location="cpu", mmap=True, weights_only=True)  # type: ignore[no-any-return]


def load_archive(path: str | os.PathLike[str]) -> Any:
    """Return what ``torch.save`` wrote, after a check for damage; nothing in the file is executed.

    Raises:
        ValueError: if the file is damaged, or holds pickled objects; the message names it.
    """
    check_archive(path)
    try:
        is_zip = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch has no specific error for a damaged file
        if isinstance(error, FileNotFoundError | PermissionError) or not is_about_input(error):
            raise
        reason = "not a checkpoint of Lightning, or damaged"
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            reason = "not a checkpoint of Lightning with plain values: it holds pickled objects, which are not loaded"
        raise ValueError(f"{path} is {reason}.") from error


def check_archive(path: str | os.PathLike[str]) -> None:
    """Compare the parts of a file of ``torch.save`` with their checksums, which torch writes and does not check.

    Reading is as fast as the disk or memory allows. Files of an older format have no checksums, nor have those that
    were written with ``torch.serialization.set_crc32_options(False)``.

    Raises:
        OSError: if the path is not a regular file.
        ValueError: if a part is damaged; the message names the file and the part.
    """
    with open_regular(path) as stream:
        if not zipfile.is_zipfile(stream):
            return
        try:
            stream.seek(0)
            with zipfile.ZipFile(stream) as archive:
                parts = archive.infolist()
            if any(part.CRC for part in parts):
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    damaged = next((part.filename for part in parts if not _is_whole(content, part)), None)
            else:
                damaged = None
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy the file again.") from error
    if damaged is not None:
        raise ValueError(
            f"{path} is damaged: its part {damaged!r} does not have the checksum that was stored with it. Copy the "
            "file again, or take another checkpoint."
        )


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically: a file at the path stays until the new file is complete and on the disk.

    Raises:
        OSError: if the file cannot be written; the message names it.
    """
    with written_whole(path) as part, part.open("wb") as stream:
        torch.save(content, stream)


def require_resumable(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise unless a run can continue from a checkpoint.

    Raises:
        ValueError: if the state of the loops, optimizers or schedulers is missing; the message names the remedy.
    """
    loops = content.get("loops")
    lacks = [name for name in ("epoch", "global_step", *LISTS) if name not in content]
    if not isinstance(loops, Mapping) or not isinstance(loops.get("fit_loop"), Mapping):
        lacks.append("loops['fit_loop']")
    if lacks:
        raise ValueError(
            f"{path} holds weights, and no state of a run to continue ({lacks[0]} is missing): start from the weights "
            "with --model.weights."
        )


def class_of(name: Any, base: type, path: str | os.PathLike[str]) -> Any:
    """Return a class that a checkpoint names: one of ours, or of a module that is imported already.

    Args:
        name: dotted name.
        base: required base class.
        path: path of the checkpoint, for messages.

    Raises:
        ValueError: if there is no such class, or its module is not imported.
    """
    found = _resolve(name, path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{path} names {name!r}, which is not a {base.__name__}: the file is not to be trusted.")
    return found


def check_classes(
    settings: Mapping[str, Any],
    path: str | os.PathLike[str],
    trusted: Collection[str] = (),
    bases: tuple[type, ...] | None = None,
) -> None:
    """Raise if settings in a checkpoint name a class that is neither ours nor already imported.

    Args:
        settings: hyper-parameters; a class is named by ``_class_path``, ``class_path``, or as the optimizer.
        path: of the checkpoint, for messages.
        trusted: names that the user has also given.
        bases: allowed base classes. None allows networks, optimizers, schedulers and data modules.

    Raises:
        ValueError: if the module of a class is not imported, or the class is neither a part of a model nor data.
    """
    from lightning.pytorch import LightningDataModule

    allowed = bases or (
        torch.nn.Module,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
        LightningDataModule,
    )
    for name in _class_names(settings):
        if isinstance(name, str) and (name in trusted or "." not in name):  # a short name is of an imported class
            continue
        found = _resolve(name, path)
        if not (isinstance(found, type) and issubclass(found, allowed)):
            raise ValueError(
                f"{path} names {name!r}, which is not a class of models, optimizers or data: the file is not to be "
                "trusted."
            )


def _class_names(value: Any, key: Any = None) -> Iterable[Any]:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if inner in ("class_path", CLASS_PATH_KEY):
                yield item
            else:
                yield from _class_names(item, inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _class_names(item)
    elif key == "optimizer" and isinstance(value, str):
        yield value


def _resolve(name: Any, path: str | os.PathLike[str]) -> Any:
    """Return the object of a dotted name, without importing the module of a stranger."""
    if not isinstance(name, str):
        raise ValueError(f"{path} names a class by {name!r}, which is not a name: the file is not to be trusted.")
    module, _, last = name.rpartition(".")
    if any(module == ours or module.startswith(f"{ours}.") for ours in OURS):
        try:
            importlib.import_module(module)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{path} names {name!r}, which cannot be imported ({error}).") from error
    if module not in sys.modules:
        raise ValueError(
            f"{path} names {name!r}, and code is imported for a checkpoint only if you request it: pass --import "
            f"{module or name}, or import it in Python, if you trust that module."
        )
    try:
        return getattr(sys.modules[module], last)
    except AttributeError:
        raise ValueError(f"{path} names {name!r}, and {module} has no {last}.") from None


def _is_whole(content: mmap.mmap, part: zipfile.ZipInfo) -> bool:
    """Return whether a part has its checksum."""
    at = part.header_offset
    start = (
        at
        + 30
        + int.from_bytes(content[at + 26 : at + 28], "little")
        + int.from_bytes(content[at + 28 : at + 30], "little")
    )  # behind the header, the name and the extra field
    if part.compress_type != zipfile.ZIP_STORED or start + part.file_size > len(content):
        return False  # torch compresses nothing
    with memoryview(content) as whole, whole[start : start + part.file_size] as data:
        return zlib.crc32(data) == part.CRC


def _fault(content: Any) -> str:
    """Return why the content is no checkpoint, or an empty string."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, and not the parts of a checkpoint"
    for key in ("pytorch-lightning_version", "state_dict"):
        if key not in content:
            return f"{key!r} is missing"
    try:
        Version(content["pytorch-lightning_version"])
    except (InvalidVersion, TypeError):
        return f"'pytorch-lightning_version' is {content['pytorch-lightning_version']!r}"
    for key in MAPPINGS:
        value = content.get(key, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            return f"{key!r} is not a dict of names, but of type {type(value).__name__}"
    for key in LISTS:
        if not isinstance(content.get(key, []), list):
            return f"{key!r} is not a list, but of type {type(content[key]).__name__}"
    for key in ("epoch", "global_step"):
        if not isinstance(content.get(key, 0), int):
            return f"{key!r} is not a number, but of type {type(content[key]).__name__}"
    return ""
