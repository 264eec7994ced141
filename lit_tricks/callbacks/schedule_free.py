"""ScheduleFree: switch optimizers with ``train()`` and ``eval()`` around validation, checkpoints and the end of a fit.

One caveat: each checkpoint in the middle of training needs a pass over training data, if the network has BatchNorm.
Checkpoints of an error, or from a signal handler, have the running statistics of training.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lit_tricks._compat import callbacks_of, lightning_classes, saves_in_shards
from lit_tricks.callbacks.averaging.kept_average import KeptAverage
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.batchnorm.buffers import BufferOverride
from lit_tricks.callbacks.batchnorm.callback import Estimating
from lit_tricks.callbacks.batchnorm.data_pass import StatisticsPass, Watch, check, norms
from lit_tricks.callbacks.optim.lr_override import is_schedule_free
from lit_tricks.utils.arguments import integer
from lit_tricks.utils.batch import inputs_of
from lit_tricks.utils.dtensor import full_tensor, part_for, read, reshard, shard_like, to_local, write
from lit_tricks.utils.modules import batchnorms_of, is_flattened

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["ScheduleFree"]


class ScheduleFree(Trick):
    """Validate and save the averaged weights of schedule-free optimizers ([Defazio et al., 2024](https://arxiv.org/abs/2405.15682)).

    A schedule-free optimizer has two sets of weights: the training weights, at which gradients are computed, and an
    average, which is meant for evaluation. Its ``eval()`` writes the average into the module, and its ``train()`` the
    training weights. Lightning calls neither. This trick calls ``eval()`` before validations, checkpoints and
    ``on_train_end``, and ``train()`` afterwards and after an error. The training weights are restored bit by bit, so
    validations and checkpoints do not change training. Tests and predictions after the fit, or from any checkpoint, use
    the average. The trick does not choose the optimizer: return one from ``configure_optimizers``, such as
    ``schedulefree.AdamWScheduleFree``.

    A checkpoint has the average as ``state_dict``, and optimizers in evaluation mode, as their authors recommend.
    Checkpoints also have the training weights in the state of the callback, from which a run resumes, unless they are
    written with ``save_weights_only``. The schedules of lit_tricks reject such optimizers, because the average assumes
    a constant learning rate.

    The running statistics of BatchNorm belong to the training weights. So the trick estimates new statistics for the
    average from a pass over training data, as PreciseBN does. Validations, checkpoints and the model after the fit have
    the new statistics. Training continues with its own. If PreciseBN is in the same run, it makes this estimate, with
    its arguments.

    Cost: a copy of the weights during validation and saving, and after the fit. Checkpoints have one more copy of the
    weights. With BatchNorm, a forward pass of ``num_samples`` samples before a validation, and before a checkpoint
    some steps after it. Use it with every schedule-free optimizer. Other averages of weights are rejected.

    Args:
        num_samples: number of training samples for the statistics of BatchNorm, over all processes, 0 or more; 1,000
            to 10,000 are enough. 0 keeps the running statistics of training. If the data has fewer samples, all of them
            are used, in one pass.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if no optimizer has the two methods, another callback averages weights, or
            the strategy flattens parameters; when training starts, if there is BatchNorm, and the loaders cannot be
            copied, or the module has no ``forward``.

    Example:
        ``- {class_path: ScheduleFree}``
    """

    transient: ClassVar[tuple[str, ...]] = (
        "_trainer", "_module", "_trained", "_restored", "_states", "_left", "_eval", "_override", "_norms", "_watch",
        "_watched", "_estimates",
    )  # fmt: skip

    _trainer: Callable[[], Any] = staticmethod(lambda: None)  # of the current or last fit, as weak references
    _module: Callable[[], Any] = staticmethod(lambda: None)
    _trained: dict[Tensor, Tensor] | None = None  # by parameter, the weights of training while the average is shown
    _restored: dict[str, Any] | None = None  # the state of a checkpoint, until training starts
    _states: list[dict[str, Any]] | None = None  # of the optimizers of an earlier fit with this Trainer
    _left: list[float] | None = None  # norms of the weights at the end of a fit
    _eval = False  # whether the average is in the module
    _override: BufferOverride | None = None  # the statistics of BatchNorm for the average
    _norms: list[float] | None = None  # of the weights of these statistics
    _estimates = False  # whether there are layers to estimate
    _watch: Watch | None = None  # on the first training step
    _watched = False

    def __init__(self, num_samples: int = 8192) -> None:
        fix = "8192 are usual, and 0 keeps the running statistics of training."
        self.num_samples: int = integer(self, "num_samples", num_samples, 0, fix)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the state of the optimizers of an earlier fit, which Lightning drops, if the weights are the same."""
        if stage != "fit":
            return
        same = self._trainer() is trainer and self._module() is pl_module and self._is_as_left()
        self._restored = self._states = None
        if same:
            self._restored = {"raw": self._named(), "replaced": self._override.covered() if self._override else {}}
            self._states = [optimizer.state_dict() for optimizer in self._optimizers()]
        self._trainer, self._module = weakref.ref(trainer), weakref.ref(pl_module)
        self._trained, self._left, self._eval = None, None, False
        self._override, self._norms, self._estimates = BufferOverride(), None, False
        self._watch, self._watched = None, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers, and wrap validation, saving and the end of the fit.

        Raises:
            RuntimeError: if there is no such optimizer, or another callback averages weights.
        """
        name = type(pl_module).__name__
        if not self._optimizers():
            raise RuntimeError(
                f"ScheduleFree found no optimizer with `train()` and `eval()` in {name}: return one from "
                "configure_optimizers, such as schedulefree.SGDScheduleFree, or remove ScheduleFree."
            )
        if is_flattened(trainer.strategy.model or pl_module):
            strategy = type(trainer.strategy).__name__
            raise RuntimeError(f"ScheduleFree cannot copy weights under {strategy}: use ModelParallelStrategy.")
        foreign = [lightning_classes(f"callbacks.{kind}") for kind in ("WeightAveraging", "StochasticWeightAveraging")]
        for callback in callbacks_of(trainer):
            if isinstance(callback, KeptAverage) or any(isinstance(callback, kinds) for kinds in foreign):
                raise RuntimeError(
                    f"ScheduleFree and {type(callback).__name__} both average weights: remove one of the two callbacks."
                )
        for optimizer, state in zip(self._optimizers(), self._states or [], strict=False):
            optimizer.load_state_dict(state)
        self._states = None
        if trainer.strategy.restore_checkpoint_after_setup:
            # FSDP2 restores optimizers by a step without gradients, which they reject in evaluation mode.
            for optimizer in self._optimizers():
                optimizer.train()
                # Their methods leave empty states, which would count as initialized.
                for parameter in [parameter for parameter, state in optimizer.state.items() if not state]:
                    del optimizer.state[parameter]
        # It precedes on_validation_start of all callbacks, in any order of the list, and follows on_validation_end.
        self.wrap(trainer.fit_loop.epoch_loop.val_loop, "run", self._around_validation)
        # Weights-only checkpoints skip the hooks of callbacks. The optimizers have to be in evaluation mode too.
        self.wrap(trainer, "save_checkpoint", self._around_saving)
        # It precedes on_train_end of all callbacks, in any order of the list.
        self.wrap(trainer.fit_loop, "on_run_end", self._around_run_end)
        # Other callbacks' on_exception may still save a checkpoint; the strategy's comes last.
        self.wrap(trainer.strategy, "on_exception", self._around_exception)
        if saves_in_shards(trainer):
            # on_save_checkpoint does not get the path, to which every process writes its shards.
            self.wrap(trainer.strategy, "save_checkpoint", self._around_writing)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch to training, from the weights and statistics of a checkpoint if there are any.

        Raises:
            RuntimeError: if there is BatchNorm, and its statistics cannot be estimated.
        """
        statistics = (self._restored or {}).get("replaced", {})
        self._trained, self._eval = self._read(), True
        self._train()
        with torch.no_grad():
            for path, value in statistics.items():
                pl_module.get_buffer(path).copy_(value)
        kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in self._optimizers()))
        others = any(isinstance(callback, Estimating) for callback in callbacks_of(trainer))
        number = len(set(batchnorms_of(pl_module).values()))
        how = ""
        if number and self.num_samples and not others:
            try:
                check(self, trainer, pl_module, "train")
            except RuntimeError as error:
                remedy = "ScheduleFree(num_samples=0) keeps the running statistics of training."
                raise RuntimeError(f"{str(error).rstrip('.')}. {remedy}") from error
            self._estimates = True
            how = f", with the statistics of {number} BatchNorm layers from {self.num_samples} samples"
        self.announce(f"the average of {kinds} is validated and saved{how}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the arguments of ``forward`` in the first training step.

        Raises:
            RuntimeError: if there is BatchNorm, and no input in the batch.
        """
        if self._estimates and not self._watched and batch is not None:
            self._watched, self._watch = True, Watch(pl_module, inputs_of(batch, "ScheduleFree"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn if ``forward`` got other inputs than the batch, since the statistics would then differ from training."""
        watch, self._watch = self._watch, None
        if watch:
            watch.finish("ScheduleFree", pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the distance of the weights of training from the average, as a share of the norm of the average."""
        if not self._trained or trainer.sanity_checking:
            return
        pairs = [(to_local(parameter.detach()), trained) for parameter, trained in self._trained.items()]
        moved = torch.stack([torch.linalg.vector_norm(trained - own) for own, trained in pairs]).norm()
        size = torch.stack([torch.linalg.vector_norm(own) for own, _ in pairs]).norm()
        pl_module.log(
            "schedule_free/distance", moved / size, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and BatchNorm statistics of training by name, while the module has the average."""
        if not self._trained or not (self._wrappers or self._is_as_left()):
            return {}
        covered = self._override.covered() if self._override else {}
        statistics = {"replaced": covered} if covered else {}
        if saves_in_shards(self._trainer()):
            return {"shards": True} | statistics
        return {"raw": self._named()} | statistics

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the weights of training of a resumed run until its optimizers are restored."""
        if trainer.state.fn is None or trainer.state.fn.value != "fit":
            return
        self._restored = dict(checkpoint.get("callbacks", {}).get(self.state_key, {}))
        if self._restored.get("shards"):
            self._restored["shards"] = str(trainer.ckpt_path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Switch back to training. The wrappers stay for checkpoints that other callbacks now write."""
        self._train()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the average in the module, and remove the wrappers."""
        if stage == "fit" and self._wrappers:
            if self._restored:  # a resumed run that was already complete
                statistics = self._restored.get("replaced", {})
                self._trained, self._eval = self._read(), True
                self._cover(statistics)
            self._end_fit()

    # The wrappers: each is called instead of a method

    def _around_validation(self, run: Callable[[], Any]) -> Any:
        self._evaluate()
        try:
            return run()
        finally:
            self._train()

    def _around_saving(self, save_checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        was_shown = self._eval
        progress = self._trainer().fit_loop.epoch_loop.batch_progress.current
        # Lightning writes hpc_ckpt_*.ckpt from a signal handler, maybe within a step, and not in all processes at once
        path = str(args[0] if args else kwargs.get("filepath", ""))
        is_signal = Path(path).name.startswith("hpc_ckpt")
        self._evaluate(progress.ready == progress.processed and not is_signal)
        try:
            return save_checkpoint(*args, **kwargs)
        finally:
            if not was_shown:
                self._train()

    def _around_writing(self, save_checkpoint: Callable[..., Any], checkpoint: Any, filepath: Any, **how: Any) -> Any:
        result = save_checkpoint(checkpoint, filepath, **how)
        if self.state_key in checkpoint.get("callbacks", {}) and self._trained:
            state = {"raw": {n: shard_like(p, self._trained[p]) for n, p in self._by_name().items()}}
            write(state, Path(self._trainer().strategy.broadcast(filepath)) / self.state_key)
        return result

    def _around_run_end(self, on_run_end: Callable[..., Any]) -> Any:
        self._evaluate()
        return on_run_end()

    def _around_exception(self, on_exception: Callable[..., Any], exception: BaseException) -> Any:
        self._train()
        self._end_fit()
        return on_exception(exception)

    # The switch

    def _evaluate(self, between_steps: bool = True) -> None:
        if self._eval:
            return
        trained = {name for name, layer in batchnorms_of(self._module()).items() if layer.training}
        reshard(self._module())
        with torch.inference_mode(False), torch.no_grad():
            parameters = [
                p for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]
            ]
            self._trained = {parameter: to_local(parameter).detach().clone() for parameter in parameters}
            for optimizer in self._optimizers():
                optimizer.eval()
        reshard(self._module())
        self._eval = True
        if between_steps and self._trainer().state.status.value != "interrupted":
            self._estimate(trained)

    def _estimate(self, trained: set[str]) -> None:
        """Show the BatchNorm statistics of the average, estimated once per average."""
        if not self._estimates or not trained or self._override is None:
            return
        trainer, module = self._trainer(), self._module()
        now = norms(module)
        if not trainer.strategy.reduce_boolean_decision(now == self._norms):  # of shards, which differ
            layers = {name: layer for name, layer in batchnorms_of(module).items() if name in trained}
            found = StatisticsPass("ScheduleFree", trainer, module, layers, self.num_samples).run()
            self._override.values, self._norms = found.values, now
        self._override.show(module)

    def _cover(self, statistics: dict[str, Tensor]) -> None:
        """Show the statistics that are in the module, over the statistics of training."""
        module, override = self._module(), self._override
        if override is not None and statistics:
            buffers = {path: module.get_buffer(path) for path in statistics}
            override.values = {path: buffer.clone() for path, buffer in buffers.items()}
            for path, buffer in buffers.items():
                buffer.copy_(statistics[path])
            override.show(module)

    def _train(self) -> None:
        if not self._eval:
            return
        reshard(self._module())
        with torch.inference_mode(False), torch.no_grad():
            for optimizer in self._optimizers():
                optimizer.train()
            # Methods that compute the weights from the average round them.
            for parameter, trained in (self._trained or {}).items():
                to_local(parameter).copy_(trained)
        reshard(self._module())
        if self._override:
            self._override.restore()
        self._trained, self._eval = None, False

    # Helpers

    def _read(self) -> dict[Tensor, Tensor]:
        """Return the weights of training of the checkpoint, or nothing."""
        restored, self._restored = self._restored or {}, None
        named = self._by_name()
        if restored.get("shards"):
            like = {name: torch.empty_like(parameter) for name, parameter in named.items()}
            restored = read(Path(restored["shards"]) / self.state_key, lambda names: {"raw": like, "average": {}})
        found = restored.get("raw", {})
        return {named[name]: part_for(named[name], value).to(named[name].device) for name, value in found.items()}

    def _optimizers(self) -> list[Any]:
        return [optimizer for optimizer in self._trainer().optimizers if is_schedule_free(optimizer)]

    def _by_name(self) -> dict[str, Tensor]:
        """Return the parameters of these optimizers by their names in the module."""
        chosen = {p for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self._module().named_parameters() if p in chosen}

    def _named(self) -> dict[str, Tensor]:
        """Return the weights of training by name, whole in the first process if they are sharded."""
        assert self._trained is not None
        parts = {name: shard_like(p, self._trained[p]) for name, p in self._by_name().items()}
        return {name: full_tensor(part) for name, part in parts.items()}

    def _is_as_left(self) -> bool:
        module = self._module()
        return self._trained is not None and module is not None and norms(module) == self._left

    def _end_fit(self) -> None:
        self._left = norms(self._module())
        if self._watch:
            self._watch.remove()
        self.unwrap()
