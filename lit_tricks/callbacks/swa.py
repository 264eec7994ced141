"""Stochastic weight averaging: a high constant learning rate at the end, and the mean of the weights that it visits.

One caveat: BatchNorm statistics are averaged like the weights, and differ from the statistics of the averaged weights.
PreciseBN re-estimates them.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_only

from lit_tricks._compat import callbacks_of, lightning_classes
from lit_tricks.callbacks.averaging.callback import Averaging
from lit_tricks.callbacks.batchnorm.callback import Estimating
from lit_tricks.callbacks.optim.lr_override import TemporaryLRs, configured_rates
from lit_tricks.utils.arguments import choice, integer, invalid, number
from lit_tricks.utils.modules import batchnorms_of
from lit_tricks.utils.training_length import TrainingLength, is_fast_dev_run, steps_done

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["SWA", "swa_ends_cycle", "swa_lr_share"]


def swa_lr_share(step: int, start: int, length: int, shape: Literal["cos", "linear"] = "cos") -> float:
    """Return how far the learning rate has moved from the scheduled to the constant one: 1 from ``start`` on.

    Args:
        step: number of earlier steps.
        start: step from which the rate is constant.
        length: steps of the transition, the last ones before ``start``. 0 jumps.
        shape: along half a cosine ("cos"), or a line ("linear").

    Example:
        >>> [swa_lr_share(step, start=30, length=10, shape="linear") for step in (20, 25, 30)]
        [0.0, 0.5, 1.0]
    """
    if step >= start:
        return 1.0
    progress = max(0.0, 1 - (start - step) / length) if length else 0.0
    return progress if shape == "linear" else (1 - math.cos(math.pi * progress)) / 2


def swa_ends_cycle(step: int, start: int, end: int, every: int, epoch: float = 1) -> bool:
    """Return whether the weights after a step are averaged, as the step ends a cycle or the run.

    Args:
        step: number of steps, this one included.
        start: step after which the first cycle begins.
        end: steps of the run.
        every: length of a cycle in epochs.
        epoch: steps of an epoch. 1 counts cycles in steps, from ``start`` on.

    Example:
        >>> [step for step in range(21) if swa_ends_cycle(step, start=10, end=20, every=4)]
        [14, 18, 20]
    """
    if step <= start:
        return False
    return step == end or (step % epoch == 0 and (step // epoch - start // epoch) % every == 0)


class SWA(Averaging):
    """Average the weights of a last phase with a constant learning rate, and keep the average ([Izmailov et al., 2018](https://arxiv.org/abs/1803.05407)).

    Until ``start`` the learning rate follows the run's own schedule, of any kind. Afterwards it is ``lr``. The weights
    at the end of each cycle, and of the run, are averaged with equal weights, in fp32. From the first cycle on the
    average is validated, saved and, after the fit, left in the model. There is no extra epoch. A run that stops early
    has the average of the cycles that ended. Parameter groups keep the ratio of their configured rates, and the
    highest rate becomes ``lr``.

    Cost: an fp32 copy of the model in memory. Checkpoints are up to twice as large. Use it where a schedule would end
    near 0, with ``lr`` at a tenth to a half of the highest learning rate. With BatchNorm, add PreciseBN. Leave it out
    of short runs, and do not combine it with EMA. It does not work with CUDA graphs
    (``torch.compile(mode="reduce-overhead")``).

    Args:
        lr: learning rate from ``start`` on, above 0. Near 0 the averaged weights hardly differ. If the learning rate
            is far too high, the weights are too far apart, and their average is worse than each of them.
        start: share of the run's steps before the constant learning rate, in [0, 1). At 0 the averaging begins with
            the first cycle. Near 1 only the last weights are averaged.
        anneal_epochs: epochs before ``start`` in which the learning rate changes gradually from the scheduled rate to
            ``lr``, from 0 to the number of epochs before ``start``. 0 jumps.
        anneal: shape of this change, "cos" or "linear".
        every_n_epochs: epochs of a cycle, 1 or more.
        every_n_steps: steps of a cycle, 1 or more, instead of ``every_n_epochs``.
        buffers: floating-point buffers to average. "statistics": running statistics of norm layers. "average": all.
            "copy": none. Buffers that are not averaged are copied from the trained module. Integer buffers are never
            averaged, and the vectors of spectral norms are computed for the averaged weights.
        validate: whether the average is validated, saved as ``state_dict`` and left in the model. A run can have only
            one such average. "both": the trained weights are validated first, and their metrics are logged as
            ``raw/...``.
            False: the average is only in checkpoints to resume from and in ``swa.state_dict()["average"]``.
        name: name of the average in checkpoints and logs, if a run has several.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if something else also averages weights, the length of the run or of an
            epoch is unknown, ``anneal_epochs`` is longer than the part before ``start``, or there is no learning rate.

    Example:
        ``- {class_path: SWA, init_args: {lr: 0.05}}``
    """

    _plan: tuple[int, int, int] | None  # start, end and length of the glide, in steps
    _rates: TemporaryLRs | None

    def __init__(
        self,
        lr: float,
        start: float = 0.75,
        anneal_epochs: float = 0,
        anneal: Literal["cos", "linear"] = "cos",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        buffers: Literal["statistics", "average", "copy"] = "statistics",
        validate: bool | Literal["both"] = True,
        name: str | None = None,
    ) -> None:
        super().__init__(buffers, validate, name)
        self.lr: float = number(self, "lr", lr, "(0, 1e6]", "Give the learning rate from `start` on, such as 0.05.")
        self.start: float = number(self, "start", start, "[0, 1)", "Give a share of the run: for 75 % write 0.75.")
        self.anneal_epochs: float = number(
            self, "anneal_epochs", anneal_epochs, "[0, 1e6]", "0 changes to `lr` in a single step."
        )
        self.anneal: Literal["cos", "linear"] = choice(self, "anneal", anneal, ("cos", "linear"))
        fix = "Give the length of a cycle."
        self.every_n_epochs: int = integer(self, "every_n_epochs", every_n_epochs, 1, fix)
        self.every_n_steps: int | None = integer(self, "every_n_steps", every_n_steps, 1, fix, or_none="every_n_epochs")
        if self.every_n_steps is not None and self.every_n_epochs != 1:
            both = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps}
            raise invalid(self, "both set the length of a cycle. Give one of them.", **both)

    def share(self, step: int, updates: int) -> float | None:
        """Return the share of the weights in the mean: 1 of all that are averaged so far."""
        if self._plan is None:
            return None
        start, end, _ = self._plan
        every = (self.every_n_epochs, self._length.epoch) if self.every_n_steps is None else (self.every_n_steps, 1)
        return 1 / (updates + 1) if swa_ends_cycle(step, start, end, *every) else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the steps of optimizers, and the monitoring of their learning rates.

        Raises:
            RuntimeError: if there is no learning rate.
        """
        super().on_fit_start(trainer, pl_module)
        configured = configured_rates("SWA", trainer, pl_module)
        self._rates = TemporaryLRs(trainer.optimizers, configured, self.lr, partial(self._way, trainer))
        self._handles += self._rates.hook()
        for callback in callbacks_of(trainer):
            if isinstance(callback, lightning_classes("callbacks.LearningRateMonitor")):
                # Callbacks' hooks read the scheduled learning rate, and the order of the list decides what they log.
                self.wrap(callback, "on_train_epoch_start", self._rates.around)
                self.wrap(callback, "on_train_batch_start", self._rates.around)
        re_estimated = any(isinstance(callback, Estimating) for callback in callbacks_of(trainer))
        if self.validate and not re_estimated and any(layer.training for layer in batchnorms_of(pl_module).values()):
            rank_zero_only(warnings.warn)(
                f"SWA averages the statistics of the BatchNorm layers in {type(pl_module).__name__}, "
                "which do not fit the averaged weights. Add the callback PreciseBN, which re-estimates them.",
                stacklevel=2,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find start and end in steps. Earlier, there are no loaders.

        Raises:
            RuntimeError: if the length is unknown, or the annealing would begin before the run.
        """
        self._length.measure(trainer, pl_module)
        end = self._length.run
        start = min(round(self.start * end), end - 1)
        every = self.every_n_steps or self.every_n_epochs * self._length.epoch
        length = round(self.anneal_epochs * self._length.epoch) if self.anneal_epochs else 0
        if length > start and not is_fast_dev_run(trainer):
            raise RuntimeError(
                f"SWA(anneal_epochs={self.anneal_epochs}) anneals the learning rate for {length} steps, and the run "
                f"has {start} before start={self.start}. Lower anneal_epochs, or raise start."
            )
        self._plan = start, end, length
        if self._rates:
            self._rates.start()
        self._steps = steps_done(trainer, pl_module)
        if self._steps <= start:
            self._updates = 0  # they belong to a shorter run, which this run resumes
        name, way = f"{self.name}: " if self.name else "", f" after a glide of {length} steps" if length else ""
        plan = f"learning rate {self.lr:g} from step {start} of {end}{way}, averaged every {every:g} steps"
        self.announce(f"{name}{plan}; {self._what_for()}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the learning rates of the step, under the names that LearningRateMonitor gives them."""
        if self._rates and self.should_log(trainer):
            self.log_step(pl_module, self._rates.used())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average at the end of a cycle, and log how many weights are in it."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._length.check(trainer)
        if self._updates and self.should_log(trainer):
            key = f"swa/{self.name}/averaged" if self.name else "swa/averaged"
            self.log_step(pl_module, {key: float(self._updates)})

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average. The state of the optimizers in the checkpoint has the scheduled rates."""
        if self._rates:
            self._rates.give_back()
        return super().state_dict()

    def _steps_done(self) -> int:
        trainer = self._trainer
        return steps_done(trainer, trainer.lightning_module) if trainer and self._plan else self._steps

    def _way(self, trainer: Trainer) -> float:
        if self._plan is None or self not in callbacks_of(trainer):  # a tuner fits without the callbacks
            return 0.0
        start, _, length = self._plan
        return swa_lr_share(steps_done(trainer, trainer.lightning_module), start, length, self.anneal)

    def _forget(self) -> None:
        super()._forget()
        run_remedy = "Trainer(max_steps=...), or Trainer(max_epochs=...) with limit_train_batches=..."
        epoch_remedy = "SWA(every_n_steps=...) without anneal_epochs, or Trainer(limit_train_batches=...)"
        self._length = TrainingLength("SWA", epoch_remedy, run_remedy)
        self._plan = None
        self._rates = None

    def _why_nothing(self) -> str:
        return f"It ended before the first cycle after start={self.start} did."
