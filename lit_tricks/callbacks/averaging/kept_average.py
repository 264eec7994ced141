"""Base of averages of a run's weights: count the steps, update the average, save and restore it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_tricks._compat import callbacks_of, lightning_classes, was_skipped_by_scaler
from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.arguments import choice, text
from lit_tricks.utils.dtensor import read, write
from lit_tricks.utils.log import log, show_lines

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["KeptAverage"]


class KeptAverage(Trick):
    """Averages the weights of a run, and saves and restores the average.

    A step is a batch in which an optimizer steps. Steps that a gradient scaler skips are not counted. A subclass may
    count differently, in ``_steps_done``.

    Args:
        buffers: the floating-point buffers that are averaged: "statistics", "average" for all, "copy" for none.
        validate: whether checkpoints have the average as ``state_dict``, or only in the state of the callback.
        name: name of the average, if a run has several.
    """

    _weights: AveragedWeights | None
    _run: tuple[weakref.ref[Any], weakref.ref[Any]] | None  # Trainer and module that the weights belong to
    _restored: dict[str, Any] | None
    _saved_names: set[str]
    _steps: int
    _updates: int

    def __init__(self, buffers: str, validate: bool | str, name: str | None) -> None:
        self.buffers: str = choice(self, "buffers", buffers, ("statistics", "average", "copy"))
        self.validate = validate
        self.name: str | None = text(
            self, "name", name, "Leave it out for the only average of a run.", or_none="no name"
        )
        self._forget()

    @abstractmethod
    def share(self, step: int, updates: int) -> float | None:
        """Return the share of the weights in the average after a step, or None for no update.

        Args:
            step: number of steps, including this step.
            updates: number of earlier updates of the average. At 0 the share is 1.
        """

    @property
    def state_key(self) -> str:
        """Return the key of the state in a checkpoint: class and name."""
        return type(self).__name__ + (f"({self.name})" if self.name else "")

    # Counting

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        # a gradient scaler does not call the optimizer for a step that it skips, except if that is fused: it then
        # the optimizer then skips the step
        if not was_skipped_by_scaler(optimizer):
            self._stepped = True

    def _steps_done(self) -> int:
        """Return the number of finished steps, including the last step even if it is not yet counted."""
        return self._steps + self._stepped

    def _catch_up(self) -> None:
        """Count the last step, and update the average if it is due."""
        steps = self._steps_done()
        if steps <= self._steps or self._weights is None:
            return
        self._stepped = False
        self._steps = steps
        share = self.share(self._steps, self._updates)
        if share is not None:
            with self._weights.showing(False):
                self._weights.update(share)
                self._averaged()
            self._updates += 1

    def _averaged(self) -> None:
        """Do what follows an update, while the module has its trained weights."""

    # Saving and restoring

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the weights that the checkpoint's ``state_dict`` lacks.

        With ``validate=False`` these are the averaged weights: ``state_dict()["average"]``, by name.
        """
        if self._weights is None or not (self._wrappers or self._weights.is_as_left()):
            return {}
        self._catch_up()
        counts = {"steps": self._steps, "updates": self._updates}
        if not self._updates:
            return counts | {"raw": {}, "average": {}}
        self._weights.sync()
        if self._in_shards:  # they cannot go through the file of one process
            return counts | {"shards": True}
        return counts | self._weights.state(bool(self.validate), self._saved_names)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average of the resumed run, or start a new average if the run had none."""
        if trainer.state.fn is None or trainer.state.fn.value != "fit":
            return
        state = dict(checkpoint.get("callbacks", {}).get(self.state_key, {}))
        if not {"steps", "updates"} <= state.keys():  # from a run without it, or another callback of this name
            state = {"steps": 0, "updates": 0} | self._of_lightning(checkpoint, pl_module)
        if state.get("shards"):
            state["shards"] = str(trainer.ckpt_path)
        if self._wrappers:  # the weights were restored in the middle of the fit
            self._restore(state)
        else:
            self._restored = state

    def _of_lightning(self, checkpoint: dict[str, Any], pl_module: LightningModule) -> dict[str, Any]:
        """Return the state of an average that Lightning's ``WeightAveraging`` has saved, or nothing.

        The ``state_dict`` of such a checkpoint is the average, so the trained weights are restored from it in any case.

        https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/callbacks/weight_averaging.py#L249
        """
        if not {"current_model_state", "averaging_state"} <= checkpoint.keys():
            return {}
        # A shared tensor has several names in a state_dict, and one here.
        known = {name for name, _ in (*pl_module.named_parameters(), *pl_module.named_buffers())}
        trained = {name: value for name, value in checkpoint["current_model_state"].items() if name in known}
        updates = int(checkpoint["averaging_state"]["n_averaged"])
        weights = f"{len(trained)} tensors of the trained weights"
        taken = f"the average of Lightning's WeightAveraging after {updates} updates, and {weights}"
        if not self._continues_other_averages():
            updates = 0
            taken = f"{weights} of Lightning's WeightAveraging, and not its average, which is of another kind"
        show_lines()
        rank_zero_only(log.info)(f"{self.state_key}: took over {taken}. Arguments of this run decide the next updates.")
        return {"steps": checkpoint["global_step"], "updates": updates, "raw": trained, "average": {}}

    def _continues_other_averages(self) -> bool:
        """Return whether the average can start from an average that Lightning has made."""
        return True

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._weights is not None
        self._restored, self._stepped = None, False
        self._steps, self._updates = state["steps"], state["updates"]
        if not self._updates and not state.get("raw"):
            return
        if "shards" in state:
            state = read(Path(state["shards"]) / self.state_key, self._weights.like_state)
        self._weights.restore(state)

    def _put_average(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        self._catch_up()
        if not self._updates or self._weights is None:
            return
        self._weights.sync()
        with self._weights.showing(True):
            checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            if self._in_shards:  # its tensors are views of those that are swapped now, by copying
                checkpoint["state_dict"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
            if "callbacks" in checkpoint:  # with weights only, Lightning leaves out the hooks of callbacks
                for pruning in callbacks_of(trainer):
                    # It writes pruned weights by the names of a new module. They were replaced with all other weights.
                    if isinstance(pruning, lightning_classes("callbacks.ModelPruning")):
                        pruning.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)

    def _around_writing(self, save_checkpoint: Callable[..., Any], checkpoint: Any, filepath: Any, **how: Any) -> Any:
        resumable = self.state_key in checkpoint.get("callbacks", {})
        result = save_checkpoint(checkpoint, filepath, **how)
        if resumable and self._updates and self._weights and self._trainer:
            state = self._weights.state(bool(self.validate), self._saved_names, whole=False)
            write(state, Path(self._trainer.strategy.broadcast(filepath)) / self.state_key)
        return result

    # Coming and going

    @property
    def _trainer(self) -> Trainer | None:
        return self._run[0]() if self._run else None

    def _forget(self) -> None:
        self._weights = self._run = self._restored = None
        self._saved_names = set()
        self._in_shards = False
        self._stepped = False
        self._steps = 0  # batches in which an optimizer stepped
        self._updates = 0

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts anew: the weights belong to the module of the original
        copy = object.__new__(type(self))
        vars(copy).update(super().__getstate__())
        copy._forget()
        return vars(copy)
