"""Temperature scaling: probabilities that equal the share of right predictions (Guo et al., 2017).

One caveat: the temperature is fitted to the validation images. If these images also chose the checkpoint, its
calibration on new images is worse than measured here.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lit_tricks._compat import callbacks_of, is_overridden
from lit_tricks.callbacks.averaging.raw_validation import validate_trained
from lit_tricks.callbacks.base import Trick, unwrapped
from lit_tricks.callbacks.calibration.calibrate import Calibration, calibrate_network, find_head, same_outputs
from lit_tricks.callbacks.calibration.checkpoint import KEY, write_calibrated
from lit_tricks.callbacks.calibration.head import Scaling, Written, head_at
from lit_tricks.callbacks.calibration.recorder import Recorder, record
from lit_tricks.utils.arguments import choice, text
from lit_tricks.utils.dtensor import full_tensor, part_for, reshard, shard_like, to_local
from lit_tricks.utils.log import log
from lit_tricks.utils.modes import eval_mode, modes_kept
from lit_tricks.utils.modules import is_flattened
from lit_tricks.utils.training_length import is_fast_dev_run

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["TemperatureScaling"]


class TemperatureScaling(Trick):
    """Calibrate the probabilities at the end of the fit, by a temperature ([Guo et al., 2017](https://arxiv.org/abs/1706.04599)).

    The logits are divided by the temperature ``T`` that maximizes the likelihood of the labels of the validation
    images. At the end of the fit, weight and bias of the last linear layer are divided by ``T``. So exports and plain
    torch code also give calibrated probabilities. The most probable class stays the same. If the network has no such
    layer, a buffer scales the logits. The module ``Classifier`` of lit_tricks has this buffer for any network. In your
    own module, end ``forward`` with ``lit_tricks.models.LogitScaling()``.

    Each validation records its logits, and fits a temperature to the weights that are validated and saved, such as the
    average of EMA. If the last weights were not validated, the fit ends with one more validation. After the fit the
    module has scaled weights. The best checkpoint stays as it is, and a calibrated copy without the state of the run is
    written next to it, as ``best-calibrated.ckpt``. ``lit-tricks fit`` tests and reports this copy. Checkpoints that
    are written during the fit keep unscaled weights, so a run can resume from them. The temperature is logged as
    ``temperature_scaling/temperature``, and the calibration error with it as ``temperature_scaling/ece``. Only the
    first validation loader is used. For segmentation, 256 pixels of each image are recorded.

    With TestTimeAugment in the same run, the prediction is a mean over views. The temperature then maximizes the
    probability of the labels in ``mean(softmax(logits / T))``. So a test with the same views is calibrated, and a test
    with a single view is not. The most probable class of each view stays the same, but the mean's may change.

    Cost: memory for the logits of a validation on the CPU, and a fit that takes about a second for 50,000 images of
    1000 classes. Use it where probabilities matter: thresholds, expected costs, ensembles. Leave it out if only the
    most probable class matters. If you choose between many runs by the validation images, calibrate the chosen model on
    other images, with ``lit-tricks calibrate``.

    Args:
        kind: "temperature": one temperature. "vector": a temperature and an offset per class (vector scaling of the
            paper, 2 K numbers for K classes). It may change the most probable class, and needs tens of images per
            class. Without a bias in the layer there are no offsets.
        classifier: name of the layer that gives the logits, such as ``"model.fc"``. None searches for it.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if there is no validation, or the list has another TemperatureScaling; in the
            first validation, if it has no logits for one label per image, or they are not
            scaled by the weights of one layer.

    Example:
        ``- {class_path: TemperatureScaling}``
    """

    transient: ClassVar[tuple[str, ...]] = ("_fit",)
    _fit: _Fit | None = None

    checkpoint = ""
    """Path of the calibrated checkpoint of the last fit."""

    def __init__(self, kind: Literal["temperature", "vector"] = "temperature", classifier: str | None = None) -> None:
        self.kind: str = choice(self, "kind", kind, ("temperature", "vector"))
        fix = "Name a module, such as 'model.fc'."
        self.classifier: str | None = text(self, "classifier", classifier, fix, or_none="a search")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap saving and loading.

        Raises:
            RuntimeError: for a conflicting callback.
        """
        if stage != "fit":
            return
        for other in callbacks_of(trainer):
            if isinstance(other, TemperatureScaling) and other is not self:
                raise RuntimeError("TemperatureScaling was passed twice. Keep only one.")
        last, self._fit = self._fit, _Fit(weakref.ref(trainer), weakref.ref(pl_module))
        if last and last.trainer() is trainer and last.module() is pl_module:
            self._fit.written = last.written
        self.checkpoint = ""
        # The module's hook precedes the hooks of all callbacks.
        self.wrap(pl_module, "on_load_checkpoint", self._around_loading)
        # Weights-only checkpoints skip the hooks of callbacks.
        self.wrap(pl_module, "on_save_checkpoint", self._around_saving)
        # The module's hook follows the hooks of all callbacks.
        self.wrap(pl_module, "teardown", self._around_teardown)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the weights of an earlier fit, and wrap the end of the fit.

        Raises:
            RuntimeError: if there is no validation, or the strategy hides the weights.
        """
        # later than setup, in which averages compare the weights with the weights that they left
        self._now.undo()
        if is_flattened(trainer.strategy.model or pl_module):
            raise RuntimeError(
                f"TemperatureScaling cannot scale the weights under {type(trainer.strategy).__name__}: use FSDP2 "
                "(ModelParallelStrategy)."
            )
        if not trainer.enable_validation or not is_overridden("validation_step", pl_module):
            raise RuntimeError(
                "TemperatureScaling needs logits of images that are not trained on, and the run has no validation. "
                "Give the Trainer validation data, or leave TemperatureScaling out."
            )
        # It follows on_train_end of all callbacks: averages and statistics of BatchNorm are in the module.
        self.wrap(trainer.fit_loop, "on_run_end", partial(self._around_run_end, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce what is fitted."""
        if not self._now.begun:  # a tuner trains within the fit
            self._now.begun = True
            what = "a temperature" if self.kind == "temperature" else "a temperature and an offset per class"
            self.announce(f"fits {what} to the logits of each validation, and ends with scaled weights")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record the logits."""
        if self._fit and _is_fit(trainer):
            self._fit.forget()
            self._fit.recorder = record(trainer, pl_module, self.classifier, "TemperatureScaling")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note what the losses of the first batch get."""
        if self._fit and self._fit.recorder and _is_fit(trainer) and dataloader_idx == 0:
            self._fit.recorder.begin()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the logits of a batch."""
        if self._fit and self._fit.recorder and _is_fit(trainer) and dataloader_idx == 0:
            self._fit.recorder.add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the temperature, while the validated weights are in the module, and log it."""
        fit = self._fit
        if not fit or not fit.recorder or not fit.recorder.logits or not _is_fit(trainer):
            return
        if trainer.sanity_checking:
            find_head(fit.recorder, trainer, self.classifier, self.kind)  # the earliest error
            return
        try:
            found = calibrate_network(fit.recorder, trainer, self.classifier, self.kind)
        except ValueError as error:
            fit.why = str(error)
            return
        fit.found, fit.step = found, trainer.global_step
        logged = {"temperature": found.mean_temperature, "ece": found.after.ece}
        names = {f"temperature_scaling/{name}": value for name, value in logged.items()}
        pl_module.log_dict(names, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop recording."""
        if self._fit and self._fit.recorder:
            self._fit.recorder.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing here. The module's own hook runs last, after other callbacks have set the weights."""

    def unwrap(self) -> None:
        """Also stop recording."""
        super().unwrap()
        if self._fit:
            self._fit.forget()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the weights before the scaling to a checkpoint that is written after the fit."""
        if self._fit and not self._wrappers and (replaced := self._fit.replaced()):
            checkpoint["callbacks"][self.state_key] = {"replaced": replaced}

    # The wrappers: each is called instead of a method

    def _around_saving(self, on_save_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        fit = self._fit
        if fit and fit.found and (trainer := fit.trainer()) and trainer.global_step == fit.step:
            checkpoint[KEY] = fit.found.plain()  # the temperature of the weights in the checkpoint
        return on_save_checkpoint(checkpoint)

    def _around_loading(self, on_load_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        """Load the weights before the scaling from a checkpoint that was written after a fit."""
        replaced = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("replaced", {})
        module = self._fit.module() if self._fit else None
        if self._fit:
            self._fit.restored = checkpoint.get(KEY)
        for name, value in replaced.items():
            if "state_dict" in checkpoint and value is None:  # a buffer that the scaling has made
                del checkpoint["state_dict"][name]
            elif "state_dict" in checkpoint:
                checkpoint["state_dict"][name] = value
            elif module is not None and value is not None:  # some strategies have loaded it into the module already
                tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                with torch.no_grad():
                    to_local(tensors[name].detach()).copy_(part_for(tensors[name], value))
        return on_load_checkpoint(checkpoint)

    def _around_run_end(self, trainer: Trainer, on_run_end: Callable[..., Any]) -> Any:
        result = on_run_end()
        if self in callbacks_of(trainer):  # not within a tuner
            self._now.ended = True
            self._scale(trainer, trainer.lightning_module)
            self._write_best(trainer)
        return result

    def _around_teardown(self, teardown: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = teardown(*args, **kwargs)
        fit = self._fit
        if fit and fit.restored and not fit.ended:  # a resumed run that was already complete skips the end of the fit
            scaling = Scaling.of(fit.restored["temperatures"], fit.restored["offsets"])
            fit.written = head_at(fit.module(), fit.restored["layers"]).write(scaling)
        self.unwrap()
        return result

    # Helpers

    @property
    def _now(self) -> _Fit:
        assert self._fit is not None
        return self._fit

    def _scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the weights that the fit ends with. Validate them, unless the last validation did."""
        fit = self._now
        with eval_mode(pl_module):
            is_same = fit.found and fit.recorder and same_outputs(fit.found, fit.recorder, trainer)
        if not is_same and not fit.why:
            self._validate(trainer, pl_module)
        if fit.found:
            fit.written = fit.found.head.write(fit.found.scaling)
        elif not is_fast_dev_run(trainer):
            why = fit.why.rstrip(".") or "the validation has no batch"
            rank_zero_only(warnings.warn)(
                f"TemperatureScaling leaves the weights as they are: {why}. `lit-tricks calibrate` takes other images.",
                stacklevel=2,
            )

    def _validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the weights in the module. Averages and PreciseBN have set them, and would swap them out."""
        loop: Any = trainer.fit_loop.epoch_loop.val_loop
        with unwrapped(loop, "run"), unwrapped(pl_module, "on_validation_model_eval", "on_validation_end"):
            trainer.validating = True
            try:
                with modes_kept(pl_module):
                    validate_trained(trainer, pl_module, partial(_run_from_start, loop), [self])
            finally:
                trainer.training = True

    def _write_best(self, trainer: Trainer) -> None:
        """Write the calibrated best checkpoint."""
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if trainer.is_global_zero and best and Path(best).is_file():
            path = Path(best).with_name(f"{Path(best).stem}-calibrated.ckpt")
            summary = write_calibrated(Path(best), path)
            if summary:
                log.info("TemperatureScaling: %s; %s", summary, path)
                monitor = getattr(trainer.checkpoint_callback, "monitor", None)
                if monitor:
                    log.warning(
                        "TemperatureScaling: %s of the same images chose this checkpoint, so new images are calibrated "
                        "less well. Calibrate on other images with `lit-tricks calibrate --data ...`", monitor,
                    )  # fmt: skip
                self.checkpoint = str(path)
        self.checkpoint = trainer.strategy.broadcast(self.checkpoint)


@dataclass
class _Fit:
    """The state of a fit."""

    trainer: Callable[[], Any]
    module: Callable[[], Any]
    recorder: Recorder | None = None
    found: Calibration | None = None  # for the weights of the last validation
    step: int = -1  # of these weights
    why: str = ""  # the last validation gave none
    written: list[Written] = field(default_factory=list)
    restored: Mapping[str, Any] | None = None  # the temperature in the checkpoint of the resumed run
    begun: bool = False
    ended: bool = False

    def forget(self) -> None:
        if self.recorder:
            self.recorder.close()
        self.recorder = self.found = None
        self.why = ""

    def undo(self) -> None:
        """Restore the weights before the scaling, in the module or in an average.

        Averaged weights are swapped by exchanging pointers, so the scaled memory may belong to an average by now.
        """
        module, written, self.written = self.module(), self.written, []
        if written:
            reshard(module)
        with torch.inference_mode(False), torch.no_grad():
            for each in written:
                each.undo(module)

    def replaced(self) -> dict[str, Tensor | None]:
        """Return the weights before the scaling, if the module still has the scaled weights.

        The value of a buffer that the scaling has made is None.
        """
        module, found = self.module(), {}
        if module is not None:
            reshard(module)
        for each in self.written if module is not None else ():
            current = each.current(module)
            if current is None or not each.is_in(to_local(current.detach())):
                return {}
            before = each.before
            found[each.name] = None if before is None else full_tensor(shard_like(current, before.to(current.device)))
        return found


def _run_from_start(loop: Any) -> Any:
    loop.restarting = False  # a resumed run has the place of an earlier validation
    return loop.run()


def _is_fit(trainer: Trainer) -> bool:
    return trainer.state.fn is not None and trainer.state.fn.value == "fit"
