"""What the tricks that average weights share: when they count, what is validated and saved, what a run ends with."""

from __future__ import annotations

import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_tricks.callbacks._base import Trick, callbacks_of
from lit_tricks.callbacks._shards import read, write
from lit_tricks.callbacks._weights import AveragedWeights

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

__all__ = ["Averaging"]


class Averaging(Trick):
    """Averages the weights of a run; the average is what is validated, saved, and left in the module.

    From the first update on, the module shows the average from before the first hook of a validation to after its last
    one, and from before ``on_train_end``. Every checkpoint has it as its ``state_dict``; those to resume from also have
    the weights that are trained, in the state of the callback. After an error the module has its own weights.

    Steps are counted in batches that stepped an optimizer; one that a gradient scaler skips is none. A subclass may
    count otherwise, in ``_steps_done``.

    Args:
        buffers: "average", or "copy": the average goes with the buffers of the weights that are trained.
        validate: whether all this happens, or the average is only kept, in the state of the callback.
        name: of the average, where there are several.
    """

    _weights: AveragedWeights | None
    _run: tuple[weakref.ref[Any], weakref.ref[Any]] | None  # Trainer and module that the weights belong to
    _restored: dict[str, Any] | None
    _handles: list[Any]
    _saved_names: set[str]

    def __init__(self, buffers: str, validate: bool, name: str | None) -> None:
        if buffers not in ("average", "copy"):
            raise ValueError(f'buffers={buffers!r} must be "average" or "copy".')
        if name is not None and not name.strip():
            raise ValueError(f"name={name!r} is empty; leave it out for the only average of a run.")
        self.buffers = buffers
        self.validate = validate
        self.name = name
        self._forget()

    @abstractmethod
    def share(self, step: int, updates: int) -> float | None:
        """Share of the weights in the average after a step, None if it is to stay as it is.

        Args:
            step: steps done, this one included.
            updates: those of them after which the average was updated. At 0 the share is 1.
        """

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: class and name."""
        return type(self).__name__ + (f"({self.name})" if self.name else "")

    # The life of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before a fit that goes on with the last one's module, put the weights that are trained back into it."""
        if stage != "fit":
            return
        self._end_fit()
        weights = self._weights
        same = self._run is not None and self._run[0]() is trainer and self._run[1]() is pl_module
        if not same or weights is None or not weights.is_as_left():
            self._forget()
        else:
            weights.swap(False)
            weights.leave()
        self._run = weakref.ref(trainer), weakref.ref(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or take up the average, and put the brackets around validation, saving and the end.

        Raises:
            RuntimeError: if another average is validated and saved too, or the strategy hides the weights.
        """
        self._refuse(trainer, pl_module)
        if self._weights is None or not self._weights.belongs_to(pl_module):
            self._weights = AveragedWeights(pl_module, self.buffers == "average")
            self._steps = self._updates = 0
        self._weights.follow()
        self._saved_names = set(pl_module.state_dict())
        self._in_shards = getattr(trainer.strategy, "_save_distributed_checkpoint", False)
        if self._restored is not None:
            self._restore(self._restored)
        self._handles = [optimizer.register_step_post_hook(self._on_step) for optimizer in trainer.optimizers]
        self._wrap(trainer.strategy, "on_exception", self._around_exception)
        if self._in_shards:
            self._wrap(trainer.strategy, "save_checkpoint", self._around_writing)
        if self.validate:
            self._wrap(pl_module, "on_validation_model_eval", self._around_validation_start)
            self._wrap(pl_module, "on_validation_end", self._around_validation_end)
            self._wrap(pl_module, "on_save_checkpoint", self._around_saving)
            self._wrap(trainer.fit_loop, "on_run_end", self._around_run_end)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, if the batch stepped an optimizer."""
        self._catch_up()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there is no average."""
        if not self._updates and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_only(warnings.warn)(
                f"{self.state_key} averaged nothing in {self._steps} steps: the model keeps the weights it was "
                f"trained to. {self._why_nothing()}",
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own weights back. The brackets stay for checkpoints that other callbacks now write."""
        if self._weights and self._wrappers:
            self._catch_up()
            self._weights.swap(False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the average in the module, and nothing else."""
        if stage == "fit" and self._wrappers:
            if self._weights and self._updates and self.validate:
                self._weights.swap(True)  # a resumed run that was over already did not come by its end
            self._end_fit()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the weights that the ``state_dict`` beside it does not hold.

        With ``validate=False`` these are the averaged ones: ``state_dict()["average"]``, by name.
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
        return counts | self._weights.state(self.validate, self._saved_names)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average out of a fit too."""
        weights = self._weights
        if self.validate and not self._wrappers and weights and weights.belongs_to(pl_module) and weights.is_as_left():
            self._put_average(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the average of the run that is resumed, or start anew if it had none."""
        if trainer.state.fn is None or trainer.state.fn.value != "fit":
            return
        state = dict(checkpoint.get("callbacks", {}).get(self.state_key, {"steps": 0, "updates": 0}))
        if state.get("shards"):
            state["shards"] = str(trainer.ckpt_path)
        if self._wrappers:  # the weights were restored in the middle of the fit
            self._restore(state)
        else:
            self._restored = state

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._weights is not None
        self._restored, self._stepped = None, False
        self._steps, self._updates = state["steps"], state["updates"]
        if not self._updates:
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

    # The brackets: each is called in the place of a method

    def _around_validation_start(self, on_validation_model_eval: Callable[..., Any]) -> Any:
        self._catch_up()
        if self._weights and self._updates:
            # DDP spreads the buffers of the first process in its next forward pass, and then not before training: the
            # module's own are not there to be spread
            ddp = self._trainer.strategy.model if self._trainer else None
            own = getattr(ddp, "broadcast_buffers", False) and getattr(ddp, "require_forward_param_sync", False)
            self._weights.sync(own)
            self._weights.swap(True)
        return on_validation_model_eval()

    def _around_validation_end(self, on_validation_end: Callable[..., Any]) -> Any:
        result = on_validation_end()  # the module's hook; those of the callbacks came before
        if self._weights:
            self._weights.swap(False)
        return result

    def _around_saving(self, on_save_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        if self._trainer:
            self._put_average(self._trainer, checkpoint)
        return on_save_checkpoint(checkpoint)

    def _around_writing(self, save_checkpoint: Callable[..., Any], checkpoint: Any, filepath: Any, **how: Any) -> Any:
        resumable = self.state_key in checkpoint.get("callbacks", {})
        result = save_checkpoint(checkpoint, filepath, **how)
        if resumable and self._updates and self._weights and self._trainer:
            state = self._weights.state(self.validate, self._saved_names, whole=False)
            write(state, Path(self._trainer.strategy.broadcast(filepath)) / self.state_key)
        return result

    def _around_run_end(self, on_run_end: Callable[..., Any]) -> Any:
        self._catch_up()
        if self._weights and self._updates:
            self._weights.sync()
            self._weights.swap(True)
        return on_run_end()

    def _around_exception(self, on_exception: Callable[..., Any], exception: BaseException) -> Any:
        self._end_fit()
        return on_exception(exception)

    # Helpers

    @property
    def _trainer(self) -> Trainer | None:
        return self._run[0]() if self._run else None

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:
        # a gradient scaler does not call the optimizer for a step that it skips, except if that is fused: it then
        # tells the optimizer to skip it
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._stepped = True

    def _steps_done(self) -> int:
        """Steps that are over, the last one included, whether it is counted or not."""
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
            self._updates += 1

    def _end_fit(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._wrappers and self._weights:
            self._weights.follow()
            self._weights.leave()
        self._unwrap()

    def _forget(self) -> None:
        self._weights = self._run = self._restored = None
        self._handles = []
        self._saved_names = set()
        self._in_shards = False
        self._stepped = False
        self._steps = 0  # batches that stepped an optimizer
        self._updates = 0

    def _why_nothing(self) -> str:
        return ""

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = self.state_key
        for callback in callbacks_of(trainer):
            classes = {cls.__name__ for cls in type(callback).__mro__}
            ours = isinstance(callback, Averaging) and callback.validate
            if callback is self or not self.validate or not (ours or classes & _LIGHTNINGS):
                continue
            other = callback.state_key if ours else type(callback).__name__
            remedy = f"give one of them validate=False, to keep its average aside, or remove {other}."
            raise RuntimeError(f"{name} and {other} both decide which weights are validated and saved: {remedy}")
        strategy = type(trainer.strategy).__name__
        model = trainer.strategy.model or pl_module
        flat = any(type(part).__name__ == "FullyShardedDataParallel" for part in model.modules())
        if flat or any(hasattr(param, "ds_id") for param in pl_module.parameters()):
            raise RuntimeError(f"{name} cannot see the weights under {strategy}: use FSDP2 (ModelParallelStrategy).")

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts anew: the weights belong to the module of this one
        copy = object.__new__(type(self))
        vars(copy).update(super().__getstate__())
        copy._forget()
        return vars(copy)


_LIGHTNINGS = {"WeightAveraging", "StochasticWeightAveraging"}
