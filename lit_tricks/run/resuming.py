"""Carry over the best checkpoint to a resumed run, which Lightning does not restore."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info

from lit_tricks._compat import callbacks_of
from lit_tricks.utils.checkpoint_files import read_checkpoint

__all__ = ["BestSoFar"]

log: logging.Logger = logging.getLogger("lit_tricks")

# State of a ModelCheckpoint without files.
NOTHING_YET: dict[str, Any] = {
    "best_model_score": None,
    "best_model_path": "",
    "best_k_models": {},
    "kth_best_model_path": "",
    "kth_value": None,
    "last_model_path": "",
}


class BestSoFar(Callback):
    """Carry the best score and its file over into the folder of a resumed run.

    Lightning forgets both where the folder changes, so that the best checkpoint would be the best of the new epochs.
    Here the files are copied, and the callbacks that save checkpoints compare with their scores. A file that is gone,
    or that was written after the checkpoint that is resumed, is left out with a warning.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change what the callbacks that save checkpoints are about to restore."""
        states: dict[str, Any] = checkpoint["callbacks"]
        if trainer.state.fn != "fit":  # the test after the fit: what is known of the files stays
            for callback in trainer.checkpoint_callbacks:
                states.pop(callback.state_key, None)
            return
        _tell_what_is_left_out(trainer, states)
        for callback in trainer.checkpoint_callbacks:
            state = states.get(callback.state_key)
            if (
                isinstance(callback, ModelCheckpoint)
                and state
                and _is_state(state)
                and not _is_in_place(callback, state)
            ):
                states[callback.state_key] = _carried_over(trainer, callback, state, checkpoint["global_step"])
        trainer.strategy.barrier()


def _is_state(state: Any) -> bool:
    """Return whether a checkpoint has the parts of the state of a ModelCheckpoint that are used here."""
    return (
        isinstance(state, dict)
        and isinstance(state.get("best_model_path"), str)
        and isinstance(state.get("best_k_models"), dict)
        and all(isinstance(path, str) for path in state["best_k_models"])
    )


def _is_in_place(callback: ModelCheckpoint, state: dict[str, Any]) -> bool:
    """Return whether the files are where the callback saves. A relative path may be of another working folder."""
    best = state.get("best_model_path")
    return state.get("dirpath") == callback.dirpath and (not best or Path(best).exists())


def _carried_over(trainer: Trainer, callback: ModelCheckpoint, state: dict[str, Any], step: int) -> dict[str, Any]:
    """Copy the files of a callback, and return its state with their new places."""
    changed = state | NOTHING_YET | {"dirpath": callback.dirpath}
    if not callback.monitor or not state.get("best_model_path"):
        return changed  # a later checkpoint replaces the last one, so that there is nothing to compare with
    wanted = [state["best_model_path"], *(state["best_k_models"] if callback.save_top_k > 0 else ())]
    places = _copied(dict.fromkeys(wanted), trainer, Path(str(callback.dirpath)), step)
    best = places.get(state["best_model_path"])
    if best is None:
        log.warning(
            "the best checkpoint so far, %s, is gone or of a later step than the resumed one: %s is the best of the "
            "new epochs",
            state["best_model_path"],
            callback.filename or "the best checkpoint",
        )
        return changed
    scores = {places[path]: score for path, score in state["best_k_models"].items() if path in places}
    worst = (min if callback.mode == "max" else max)(scores, key=lambda path: scores[path]) if scores else ""
    rank_zero_info(f"the best so far, {callback.monitor} = {float(state['best_model_score']):.4f}, is now {best}")
    return changed | {
        "best_model_score": state["best_model_score"],
        "best_model_path": best,
        "best_k_models": scores,
        "kth_best_model_path": worst,
        "kth_value": scores.get(worst, state["kth_value"]),
    }


def _copied(paths: Iterable[str], trainer: Trainer, folder: Path, step: int) -> dict[str, str]:
    """Copy files that are not of a later step into a folder. Return their old and new places."""
    source = Path(str(trainer.ckpt_path)).parent
    found: dict[str, str] = {}
    for path in paths:
        # in the folder of the resumed checkpoint, since a run folder may have been moved
        file = next((each for each in (source / Path(path).name, Path(path)) if _is_checkpoint(each)), None)
        try:
            if file is None or _step_of(file) > step:
                continue
        except (OSError, ValueError) as error:
            log.warning("%s: the file is left out", error)
            continue
        target = folder / file.name
        found[path] = str(target)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if file.is_dir() else shutil.copy2)(file, target)
    return found


def _is_checkpoint(path: Path) -> bool:
    """Return whether a path that a checkpoint names can be copied: a file, or a distributed checkpoint."""
    return path.is_file() or (path / ".metadata").is_file()


def _step_of(file: Path) -> int:
    """Return the step of a checkpoint; -1 for a distributed one, which is a folder."""
    if file.is_dir():
        return -1
    return int(read_checkpoint(file).get("global_step", 0))


def _tell_what_is_left_out(trainer: Trainer, states: dict[str, Any]) -> None:
    """Log the callbacks of the checkpoint that the run does not have. Lightning's warning names their settings too."""
    kept = {_class_of(callback.state_key) for callback in callbacks_of(trainer)}
    if left_out := sorted({_class_of(key) for key in states} - kept):
        rank_zero_info(f"resumed without {', '.join(left_out)}: the checkpoint has a state of it that is not used")


def _class_of(state_key: Any) -> str:
    return re.split(r"[^\w.]", str(state_key))[0].rpartition(".")[2]
