"""PreciseBN: BatchNorm statistics of the weights that are validated and saved, and not an average over past ones.

One caveat: a checkpoint that is written in the middle of training, some steps after a validation, has the running
statistics of training.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_tricks._compat import logging_step
from lit_tricks.callbacks.batchnorm.callback import Estimating
from lit_tricks.callbacks.batchnorm.data_pass import StatisticsPass, Watch, check, norms
from lit_tricks.utils.arguments import choice, flag, integer
from lit_tricks.utils.batch import inputs_of
from lit_tricks.utils.modules import batchnorms_of

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["PreciseBN"]


class PreciseBN(Estimating):
    """Re-estimate the BatchNorm statistics of the weights that are validated and saved ([Wu & Johnson, 2021](https://arxiv.org/abs/2105.07576)).

    The running statistics of BatchNorm come from past steps, in which the network had other weights. This trick passes
    training data through the network again, with fixed weights. From the mean ``mu_B`` and variance ``sigma_B^2`` of
    each batch of all processes it computes ``mu = E[mu_B]`` and ``sigma^2 = E[mu_B^2 + sigma_B^2] - mu^2``. A new
    loader gives the data, so training is not affected. With EMA or SWA the statistics are estimated for the averaged
    weights. The model has the new statistics after the fit, and so do checkpoints that are written after a validation
    and before the next step. Such checkpoints also keep the running statistics, from which a run resumes, unless they
    are written with ``save_weights_only``.

    The batches pass the same hooks as training batches, but are not mixed. The module's ``forward`` gets their inputs,
    and stops after the last BatchNorm. Frozen layers, which are in evaluation mode during training, keep their
    statistics.

    Cost: a forward pass per sample. The estimation takes 1.03 times as long as these passes on a CPU
    (``benchmarks/precise_bn.py``), and 1.5 times on a GPU (``benchmarks/gpu.py``). Use it with averaged weights, large
    learning rates, or batches of a few samples. Leave it out if the learning rate ends near 0 and batches are large:
    the gain in the paper is then about 0.2 points of top-1.

    Args:
        num_samples: number of training samples over all processes, 1 or more; 1,000 to 10,000 are enough. If the data
            has fewer samples, all of them are used, in one pass.
        when: "validation": before each validation and at the end of the fit. "end": at the end only. A number n of 1 or
            more: before the validation of every n-th epoch, and at the end.
        transform: "train" loads samples as for training; "eval" with the ``transform`` of the validation data set.
        restore: whether training continues with its own running statistics. False continues with the new ones.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when training starts, if the loaders cannot be copied, the module has no ``forward``, or the
            strategy hides the layers; later, if a batch has no inputs, or ``forward`` does not accept them.

    Example:
        ``- {class_path: PreciseBN, init_args: {num_samples: 8192}}``
    """

    def __init__(
        self,
        num_samples: int = 8192,
        when: Literal["validation", "end"] | int = "validation",
        transform: Literal["train", "eval"] = "train",
        restore: bool = True,
    ) -> None:
        self.num_samples: int = integer(self, "num_samples", num_samples, 1, "8192 are usual.")
        self.when: str | int
        if isinstance(when, str):
            self.when = choice(self, "when", when, ("validation", "end"), "A number of epochs is legal too.")
        else:
            self.when = integer(self, "when", when, 1, "Give a number of epochs, or 'validation', or 'end'.")
        self.transform: str = choice(self, "transform", transform, ("train", "eval"))
        self.restore: bool = flag(self, "restore", restore)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap validation, outside of the wrappers of averages, which are made earlier."""
        fit, number = self._now, len(set(batchnorms_of(pl_module).values()))
        if fit.begun:  # a tuner trains within the fit
            return
        fit.begun = True
        if not number:
            _warn(f"{type(pl_module).__name__} has no BatchNorm with running statistics. Leave it out.")
            return
        check(self, trainer, pl_module, self.transform)
        self._begin(trainer, pl_module)
        # It precedes on_validation_start of all callbacks, in any order of the list.
        self.wrap(pl_module, "on_validation_model_eval", self._around_validation_start)
        epochs = "" if self.when == "validation" else f" of every {self.when} epochs"
        moments = "" if self.when == "end" else f"before the validations{epochs} and "
        then = "" if self.restore else "; training continues from them"
        self.announce(f"{number} BatchNorm layers, from {self.num_samples} samples, {moments}at the end{then}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the arguments of ``forward`` in the first training step.

        Raises:
            RuntimeError: if there are no inputs in the batch.
        """
        fit = self._now
        if fit.handles and not fit.watched and batch is not None:
            fit.watched, fit.watch = True, Watch(pl_module, inputs_of(batch, "PreciseBN"))
            fit.handles.append(fit.watch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn if ``forward`` got other inputs than the batch, since the statistics would then differ from training."""
        watch, self._now.watch = self._now.watch, None
        if watch:
            watch.finish("PreciseBN", pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how far the statistics have moved."""
        if self._fit and self._fit.shift is not None:
            value, self._fit.shift = self._fit.shift, None
            pl_module.log(_SHIFT, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the statistics of the weights that the fit ends with, if the last validation did not."""
        fit = self._now
        if not fit.override.values or fit.norms != norms(pl_module):
            self._estimate(trainer, pl_module)
            if fit.shift is not None and (self.when == "end" or not trainer.enable_validation):
                for logger in trainer.loggers:
                    logger.log_metrics({_SHIFT: fit.shift}, step=logging_step(trainer))
            if fit.norms is None and batchnorms_of(pl_module):
                _warn(f"all BatchNorm layers of {type(pl_module).__name__} are frozen, in evaluation mode in training.")
        self._show(pl_module)

    def _around_validation_start(self, on_validation_model_eval: Callable[..., Any]) -> Any:
        if not self._fit:  # the module is a copy
            return on_validation_model_eval()
        trainer, pl_module = self._fit.trainer(), self._fit.module()
        trained = {name for name, layer in batchnorms_of(pl_module).items() if layer.training}
        result = on_validation_model_eval()  # it also swaps in an average
        if self.when == "validation" or (self.when != "end" and (trainer.current_epoch + 1) % self.when == 0):
            self._estimate(trainer, pl_module, trained)
            self._show(pl_module)
        return result

    def _estimate(self, trainer: Trainer, pl_module: LightningModule, names: set[str] | None = None) -> None:
        fit = self._now
        fit.override.values = {}
        layers = {k: v for k, v in batchnorms_of(pl_module).items() if (v.training if names is None else k in names)}
        if not layers:
            return
        found = StatisticsPass("PreciseBN", trainer, pl_module, layers, self.num_samples, self.transform).run()
        fit.override.values, fit.shift, fit.norms = found.values, found.shift, norms(pl_module)
        if found.samples < self.num_samples and not fit.warned:
            fit.warned = True
            text = f"num_samples={self.num_samples} is more than there are; all {found.samples} are used, in one pass"
            self.announce(text)


_SHIFT = "precise_bn/shift"


def _warn(why: str) -> None:
    rank_zero_only(warnings.warn)(f"PreciseBN has no effect: {why}", stacklevel=3)
