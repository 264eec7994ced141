"""Exponential moving average of the weights, which is validated, saved and kept.

One caveat: BatchNorm statistics are averaged like the weights, and differ from the statistics of the averaged weights.
PreciseBN re-estimates them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from lit_tricks.callbacks.averaging.callback import Averaging
from lit_tricks.utils.arguments import choice, flag, integer, invalid, number
from lit_tricks.utils.training_length import TrainingLength

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["EMA", "ema_decay", "ema_decay_of_half_life"]


def ema_decay(decay: float, updates: int) -> float:
    """Return the decay of an update while the average is young: ``1 - (1 + t) ** (-2/3)``, at most ``decay``.

    The average then covers a growing part of the run, ``t ** (2/3)`` updates, and forgets the first weights.
    On the digits (``benchmarks/ema_warmup.py``, decay 0.9999) it errs less than the exactly debiased average, which
    keeps all of a young run: 5.6 % to 7.0 % after 100 steps, 3.3 % to 3.9 % after 300, 1.9 % to 2.1 % after 3000.

    Args:
        decay: the full decay, in [0, 1).
        updates: number of earlier updates, ``t``. At 0 the average becomes a copy of the weights.

    Example:
        >>> [round(ema_decay(0.99, updates), 4) for updates in (0, 1, 100, 10_000)]
        [0.0, 0.37, 0.9539, 0.99]
    """
    return min(decay, 1 - math.pow(1 + updates, -2 / 3))


def ema_decay_of_half_life(half_life: float, steps_per_epoch: float, every_n_steps: int = 1) -> float:
    """Return the decay with which weights count half as much after ``half_life`` epochs.

    Args:
        half_life: number of epochs, above 0. The larger, the longer the average.
        steps_per_epoch: optimizer steps per epoch.
        every_n_steps: steps between two updates of the average.

    Example:
        >>> round(ema_decay_of_half_life(1.0, steps_per_epoch=100), 6)
        0.993092
    """
    return math.pow(0.5, every_n_steps / (half_life * steps_per_epoch))


class EMA(Averaging):
    """Average the weights exponentially, and validate, save and keep the average ([Tarvainen & Valpola, 2017](https://arxiv.org/abs/1703.01780)).

    After each step ``average = decay * average + (1 - decay) * weights``, in fp32. The first update copies the
    weights. Training itself is not changed. Every checkpoint has the average as its ``state_dict``, so other code also
    loads the average. Full checkpoints also keep the trained weights, from which a run resumes. After the fit the
    model has the average.

    Cost: one read and one write of the weights per update, below 1 % of a training step, and an fp32 copy of the model
    in memory. Checkpoints are up to twice as large (three times for bf16 weights with an optimizer without state). Use
    it for long runs. Leave it out of runs that are shorter than the time span of the average. Expect little gain if the
    learning rate ends at 0, since the last weights then change little. It does not work with CUDA graphs
    (``torch.compile(mode="reduce-overhead")``).

    Args:
        decay: share of the old average that an update keeps, in [0, 1). At 0 the average equals the current weights.
            0.9999 averages over about 10,000 updates. None uses ``half_life``, or 0.9999 without it.
        warmup: whether the decay starts at 0 and increases to its full value: update ``t`` uses at most
            ``1 - (1 + t) ** (-2/3)``. Without warm-up the first weights stay in the average for about
            ``1 / (1 - decay)`` updates.
        every_n_steps: steps between two updates, 1 or more. Only batches in which an optimizer steps are counted.
        start_step: steps before the average begins, 0 or more. Until then the trained weights are validated and saved.
        half_life: epochs after which the share of old weights in the average has halved, at least 0.001. Its meaning
            does not depend on batch size, number of devices or ``every_n_steps``. Give it instead of ``decay``. Near 0
            the average equals the current weights. Above a tenth of the run it contains too many old weights.
        buffers: floating-point buffers to average. "statistics": running statistics of norm layers. "average": all.
            "copy": none. Buffers that are not averaged are copied from the trained module. Integer buffers are never
            averaged, and the vectors of spectral norms are computed for the averaged weights.
        validate: whether the average is validated, saved as ``state_dict`` and left in the model. A run can have only
            one such average. "both": the trained weights are validated first, and their metrics are logged as
            ``raw/...``.
            False: the average is only in checkpoints to resume from, as
            ``checkpoint["callbacks"]["EMA(name)"]["average"]``, and in ``ema.state_dict()["average"]``.
        name: name of the average in checkpoints and logs, if a run has several.
        device: "cpu" keeps the average on the CPU, with a second copy of the weights there. The GPU then holds the
            average in validation only. Training does not wait for the copy, but the averaging takes CPU time: raise
            ``every_n_steps``. None keeps it with the weights.

    Raises:
        ValueError: for an argument out of its range, or both ``decay`` and ``half_life``.
        RuntimeError: when the fit starts, if something else also averages weights, or ``half_life`` is given and the
            length of an epoch is unknown.

    Example:
        ``- {class_path: EMA, init_args: {decay: 0.999}}``
    """

    def __init__(
        self,
        decay: float | None = None,
        warmup: bool = True,
        every_n_steps: int = 1,
        start_step: int = 0,
        half_life: float | None = None,
        buffers: Literal["statistics", "average", "copy"] = "statistics",
        validate: bool | Literal["both"] = True,
        name: str | None = None,
        device: Literal["cpu"] | None = None,
    ) -> None:
        if decay is not None and half_life is not None:
            raise invalid(
                self, "decay and half_life set the same quantity. Give one of them.", decay=decay, half_life=half_life
            )
        self.device: str | None = choice(
            self, "device", device, (None, "cpu"), "None keeps the average where the weights are."
        )
        super().__init__(buffers, validate, name, on_cpu=device == "cpu")
        decay = 0.9999 if decay is None and half_life is None else decay
        self.decay: float | None = number(
            self, "decay", decay, "[0, 1)", "Give the share of the old average, such as 0.9999.", or_none="half_life"
        )
        self.warmup: bool = flag(self, "warmup", warmup)
        self.every_n_steps: int = integer(
            self, "every_n_steps", every_n_steps, 1, "1 updates the average after every step."
        )
        self.start_step: int = integer(self, "start_step", start_step, 0, "0 starts with the first step.")
        self.half_life: float | None = number(
            self, "half_life", half_life, "[0.001, 1e6]", "Give a number of epochs.", or_none="decay"
        )
        self._decay = self.decay

    def share(self, step: int, updates: int) -> float | None:
        """Return the share of the weights in the average: ``1 - decay``, and 1 at the first update."""
        since = step - self.start_step
        if since <= 0 or since % self.every_n_steps:
            return None
        return 1 - self._decay_at(updates) if updates else 1.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the decay: earlier, the loaders are not there."""
        self._decay = self.decay
        if self.half_life is not None:
            length = TrainingLength("EMA(half_life=...)", "EMA(decay=...), or Trainer(limit_train_batches=...)")
            length.measure(trainer, pl_module)
            self._decay = ema_decay_of_half_life(self.half_life, length.epoch, self.every_n_steps)
        what = f"decay {self._decay:.6g}" + (f" (half_life={self.half_life:g} epochs)" if self.half_life else "")
        when = "every step" if self.every_n_steps == 1 else f"every {self.every_n_steps} steps"
        start = f" after step {self.start_step}" if self.start_step else ""
        name = f"{self.name}: " if self.name else ""
        self.announce(f"{name}{what}{' with warm-up' if self.warmup else ''}, {when}{start}; {self._what_for()}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, and log the decay of the last update."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._updates:
            key = f"ema/{self.name}/decay" if self.name else "ema/decay"
            self.log_step(pl_module, {key: self._decay_at(self._updates - 1)})

    def _decay_at(self, updates: int) -> float:
        assert self._decay is not None
        return ema_decay(self._decay, updates) if self.warmup else self._decay

    def _why_nothing(self) -> str:
        return f"Lower start_step={self.start_step} or every_n_steps={self.every_n_steps}."
