"""Checkpoints as the commands take and leave them: read safely, filled into a module, written whole."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lit_tricks._compat import CLASS_PATH_KEY, INSTANTIATOR_KEY
from lit_tricks.utils.finite import first_not_finite, not_finite, weights_in

__all__ = [
    "RUN",
    "checkpoint_at",
    "class_of",
    "class_path_in",
    "data_of",
    "data_settings",
    "module_of",
    "plain",
    "read_checkpoint",
    "require_finite",
    "resumed_settings",
    "run_settings",
    "settings_in",
    "written_whole",
]  # fmt: skip

# What only a run that goes on needs.
RUN = ("callbacks", "optimizer_states", "optimizers", "lr_schedulers", "loops", "MixedPrecision")


def checkpoint_at(path: str | Path, flag: str = "", prefer: Literal["best", "last"] = "best") -> Path:
    """Return the checkpoint that a path stands for: the file itself, or a checkpoint of a run folder.

    Args:
        path: file of a checkpoint, run folder such as ``runs/NAME/v0``, or the folder ``checkpoints`` of a run.
        flag: option that the path was given with, for messages.
        prefer: checkpoint of a run folder to use. The other one is used if the run folder lacks this one.

    Raises:
        FileNotFoundError: if there is no such file, or the folder has no checkpoint.
        IsADirectoryError: for a distributed checkpoint, and for a folder of several runs.
    """
    path = Path(path)
    if path.is_file():
        return path
    name = f"{flag} {path}".lstrip()
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: there is no such file. Give a checkpoint or a run folder, runs/NAME/vN.")
    if (path / ".metadata").is_file():
        remedy = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        raise IsADirectoryError(f"{name} is a distributed checkpoint. Make it one file, with {remedy}.")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = {"best": _best_of(folder.parent), "last": "last.ckpt"}
    order = ("best", "last") if prefer == "best" else ("last", "best")
    for candidate in (folder / names[which] for which in order):
        if candidate.is_file():
            return candidate
    found = sorted(folder.glob("*.ckpt"))
    if len(found) == 1:
        return found[0]
    if found:
        raise IsADirectoryError(f"{name} has {len(found)} checkpoints. Give one of them, such as {found[-1]}.")
    runs = sorted(run for run in path.glob("v*") if (run / "checkpoints").is_dir())
    if runs:
        raise IsADirectoryError(f"{name} is a folder of {len(runs)} runs. Give one of them, such as {runs[-1]}.")
    raise FileNotFoundError(f"{name}: this folder has no checkpoint. Give a checkpoint or a run folder, runs/NAME/vN.")


def _best_of(run: Path) -> str:
    """Name of the best checkpoint, which the configuration of a run can change."""
    try:
        found = json.loads((run / "results.json").read_text(encoding="utf-8")).get("best_checkpoint")
    except (OSError, ValueError, AttributeError):  # an interrupted run has no results
        found = None
    return Path(str(found)).name if found else "best.ckpt"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint; the weights are mapped into memory.

    Raises:
        ValueError: if it is none.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content["pytorch-lightning_version"], content["state_dict"].items()
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(f"{path} is not a checkpoint of Lightning, or damaged.") from error
    return content


def require_finite(path: Path, state: dict[str, Tensor], module: nn.Module | None = None) -> None:
    """Raise if weights are not finite. The message is the same in all commands.

    Args:
        path: of the checkpoint.
        state: its weights.
        module: what they are of, if that is known. It tells weights from buffers.

    Raises:
        ValueError: if they are not.
    """
    names = {name for name, _ in weights_in(module)} if module else set()
    if name := first_not_finite(state, names):
        raise ValueError(not_finite(name, path))


def module_of(path: Path, **changes: Any) -> LightningModule:
    """The module that a checkpoint is of, with its weights.

    Args:
        path: of the checkpoint.
        changes: arguments that the module takes in the place of those that it was made with.

    Raises:
        ValueError: if the checkpoint does not say.
    """
    settings = read_checkpoint(path).get("hyper_parameters", {})
    name = class_path_in(settings)
    if not name:
        raise ValueError(f"{path} does not say what module its weights are of: give --module.")
    kind: type[LightningModule] = class_of(name)
    module: LightningModule = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **changes)
    require_finite(path, module.state_dict(), module)
    return module


def class_path_in(settings: dict[str, Any]) -> str:
    """Where the module is that saved these settings: the command line names it, ours are known by what they have."""
    ours = {"decoder": "Segmenter", "backbone": "Detector", "num_classes": "Classifier"}
    found = next((f"lit_tricks.{name}" for setting, name in ours.items() if setting in settings), "")
    return str(settings.get(CLASS_PATH_KEY, found))


def data_settings(path: Path) -> dict[str, Any]:
    """Class path and arguments of the data module that a checkpoint was trained on; nothing if it does not say."""
    return settings_in(read_checkpoint(path).get("datamodule_hyper_parameters", {}))


def run_settings(path: Path, without: Iterable[str] = ()) -> dict[str, Any]:
    """Configuration of the model and the data that a checkpoint was made with, as far as it says.

    Args:
        path: of the checkpoint.
        without: arguments of the model to leave out.

    Raises:
        ValueError: if the file is no checkpoint.
    """
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"--ckpt_path {error}") from error
    model = {key: value for key, value in content.get("hyper_parameters", {}).items() if key not in set(without)}
    data = content.get("datamodule_hyper_parameters", {})
    found = {"model": settings_in(model, class_path_in(model) or "lit_tricks.Classifier"), "data": settings_in(data)}
    return {key: settings for key, settings in found.items() if settings}


def resumed_settings(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that a checkpoint is of, for a run that resumes it.

    Args:
        path: of the checkpoint.
        settings: those that the checkpoint itself has, for a checkpoint that is not in a run folder.
    """
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        return settings
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key not in ("ckpt_path", "weights_only")}


def settings_in(hparams: dict[str, Any], default: str = "") -> dict[str, Any]:
    """Class path and arguments in saved hyper-parameters; nothing if no class is named, and none is given."""
    name = hparams.get(CLASS_PATH_KEY, default)
    init_args = {key: plain(value) for key, value in hparams.items() if key not in (CLASS_PATH_KEY, INSTANTIATOR_KEY)}
    return {"class_path": name, "init_args": init_args} if name else {}


def data_of(path: Path, **changes: Any) -> LightningDataModule | None:
    """The data module that a checkpoint was trained on, made anew; None if it does not say.

    Args:
        path: of the checkpoint.
        changes: arguments that the data module takes in the place of those that it was made with.
    """
    settings = data_settings(path)
    return class_of(settings["class_path"])(**settings["init_args"] | changes) if settings else None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside another one, that takes its place once it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def class_of(name: str) -> Any:
    """What a dotted name stands for."""
    package, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(package), cls)


def plain(value: Any) -> Any:
    """Tuples as lists: YAML's safe dialect has no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
