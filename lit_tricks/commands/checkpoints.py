"""Checkpoints as the commands take and leave them: read safely, filled into a module, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn

from lit_tricks._compat import CLASS_PATH_KEY, INSTANTIATOR_KEY
from lit_tricks.utils.bounded import read_yaml
from lit_tricks.utils.checkpoint_files import RUN, check_classes, class_of, read_checkpoint, require_resumable
from lit_tricks.utils.class_names import require_same_classes
from lit_tricks.utils.files import read_regular
from lit_tricks.utils.finite import first_not_finite, not_finite, weights_in

__all__ = [
    "RUN",
    "checkpoint_at",
    "class_path_in",
    "data_of",
    "data_settings",
    "fill",
    "module_of",
    "plain",
    "read_checkpoint",
    "require_finite",
    "resumed_settings",
    "run_settings",
    "settings_in",
]  # fmt: skip


def checkpoint_at(path: str | Path, flag: str = "", prefer: Literal["best", "last"] = "best") -> Path:
    """Return the checkpoint of a path: the file itself, or a checkpoint of a run folder.

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
        found = json.loads(read_regular(run / "results.json")).get("best_checkpoint")
    except (OSError, ValueError, AttributeError):  # an interrupted run has no results
        found = None
    return Path(str(found)).name if found else "best.ckpt"


def require_finite(path: Path, state: dict[str, Tensor], module: nn.Module | None = None) -> None:
    """Raise if weights are not finite. The message is the same in all commands.

    Args:
        path: path of the checkpoint.
        state: its weights.
        module: its module, if known, which distinguishes weights from buffers.

    Raises:
        ValueError: if weights are not finite.
    """
    names = {name for name, _ in weights_in(module)} if module else set()
    if name := first_not_finite(state, names):
        raise ValueError(not_finite(name, path))


def module_of(path: Path, **changes: Any) -> LightningModule:
    """Return the module of a checkpoint, with its weights.

    Args:
        path: path of the checkpoint.
        changes: arguments that replace arguments in the checkpoint.

    Raises:
        ValueError: if the checkpoint does not name its module, or names a class that is not imported.
    """
    settings = read_checkpoint(path).get("hyper_parameters", {})
    name = class_path_in(settings)
    if not name:
        raise ValueError(f"{path} does not name the module of its weights: set --module.")
    kind: type[LightningModule] = class_of(name, LightningModule, path)
    check_classes(settings, path)
    module: LightningModule = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **changes)
    require_finite(path, module.state_dict(), module)
    return module


def class_path_in(settings: dict[str, Any]) -> str:
    """Return the class that saved these settings: named by the command line, or recognized by the settings."""
    ours = {"decoder": "Segmenter", "backbone": "Detector", "num_classes": "Classifier"}
    found = next((f"lit_tricks.{name}" for setting, name in ours.items() if setting in settings), "")
    return str(settings.get(CLASS_PATH_KEY, found))


def data_settings(path: Path, loads: bool = True) -> dict[str, Any]:
    """Return class path and arguments of the data module that a checkpoint was trained on, or nothing.

    Args:
        path: of the checkpoint.
        loads: whether the data will be loaded.

    Raises:
        ValueError: if the class is not imported, or data to load is not on this machine.
    """
    settings = settings_in(read_checkpoint(path).get("datamodule_hyper_parameters", {}))
    if settings:
        class_of(settings["class_path"], LightningDataModule, path)
        check_classes(settings, path)
        if loads:
            _require_local(settings, path)
    return settings


def run_settings(
    path: Path, command: str, without: Iterable[str] = (), trusted: Collection[str] = ()
) -> dict[str, Any]:
    """Return the configuration of the model and the data in a checkpoint, if it has any.

    Args:
        path: of the checkpoint.
        command: "fit" continues the run, and needs its state; "predict" loads no data.
        without: arguments of the model to leave out.
        trusted: values that the user has given: names of classes that may be imported, and places of data.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a checkpoint, or names a class that is not imported, or data elsewhere.
    """
    try:
        content = read_checkpoint(path)
        if command == "fit":
            require_resumable(content, path)
    except ValueError as error:
        raise ValueError(f"--ckpt_path {error}") from error
    model = {key: value for key, value in content.get("hyper_parameters", {}).items() if key not in set(without)}
    data = content.get("datamodule_hyper_parameters", {})
    found = {"model": settings_in(model, class_path_in(model) or "lit_tricks.Classifier"), "data": settings_in(data)}
    found = {key: settings for key, settings in found.items() if settings}
    check_classes(found, path, trusted)
    if command != "predict":
        _require_local(found.get("data", {}), path, trusted)
    return found


def resumed_settings(path: Path, settings: dict[str, Any], trusted: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of the run that a checkpoint is of, for a run that resumes it.

    Args:
        path: of the checkpoint.
        settings: those that the checkpoint itself has, for a checkpoint that is not in a run folder.
        trusted: values that the user has given: names of classes that may be imported, and places of data.

    Raises:
        ValueError: if the configuration names a class that is not imported, or data elsewhere.
    """
    file = path.parent.parent / "config.yaml"
    if not file.is_file():
        return settings
    found: dict[str, Any] = read_yaml(file)
    parts = {key: value for key, value in found.items() if key in ("model", "data")}
    check_classes(parts, file, trusted)
    check_classes(found, file, trusted, bases=(object,))  # the parser has the types of callbacks and loggers
    _require_local(found.get("data") or {}, file, trusted)
    return {key: value for key, value in found.items() if key not in ("ckpt_path", "weights_only")}


def settings_in(hparams: dict[str, Any], default: str = "") -> dict[str, Any]:
    """Class path and arguments in saved hyper-parameters; nothing if no class is named, and none is given."""
    name = hparams.get(CLASS_PATH_KEY, default)
    init_args = {key: plain(value) for key, value in hparams.items() if key not in (CLASS_PATH_KEY, INSTANTIATOR_KEY)}
    return {"class_path": name, "init_args": init_args} if name else {}


def data_of(path: Path, **changes: Any) -> LightningDataModule | None:
    """Rebuild the data module of a checkpoint; None if the checkpoint has none.

    Args:
        path: of the checkpoint.
        changes: arguments that replace arguments in the checkpoint.
    """
    settings = data_settings(path, loads="predict_dir" not in changes)
    if not settings:
        return None
    kind = class_of(settings["class_path"], LightningDataModule, path)
    return kind(**settings["init_args"] | changes)  # type: ignore[no-any-return]


def fill(module: LightningModule, path: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint into a module of the same classes, and return the checkpoint's content.

    Raises:
        ValueError: if the checkpoint has other classes, or weights that are not finite.
    """
    content = read_checkpoint(path)
    require_same_classes(content, module, "the checkpoint", "the module")
    require_finite(path, content["state_dict"], module)
    module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    return content


def _require_local(settings: dict[str, Any], path: Path, trusted: Collection[str] = ()) -> None:
    """Raise if the data of a checkpoint is on another machine, unless the user has named that place."""
    for name, value in settings.get("init_args", {}).items():
        if isinstance(value, str) and value not in trusted and _is_remote(value):
            raise ValueError(
                f"{path} needs data at {value}, which is loaded only if you also name it: pass --data.{name} "
                f"{value}, if you trust that place."
            )


def _is_remote(path: str) -> bool:
    return "://" in path or (os.name == "nt" and path.startswith(("\\\\", "//")))


def plain(value: Any) -> Any:
    """Tuples as lists: YAML's safe dialect has no tuples."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
