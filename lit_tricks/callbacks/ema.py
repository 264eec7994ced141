"""Exponential moving average of the weights, which is validated, saved and kept.

``power`` keeps two power-law averages instead, and snapshots of both, from which ``lit-tricks average`` mixes averages
of other lengths after the run.

One caveat: BatchNorm statistics are averaged like the weights, and differ from the statistics of the averaged weights.
PreciseBN re-estimates them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_tricks.callbacks.averaging.callback import Averaging
from lit_tricks.callbacks.averaging.power_law import power_ema_decay
from lit_tricks.callbacks.averaging.snapshots import (
    FOLDER,
    Snapshot,
    copy_snapshots,
    free_folder,
    snapshot_interval,
    snapshots_in,
    thin_snapshots,
    write_snapshot,
)
from lit_tricks.callbacks.averaging.store import AveragedWeights
from lit_tricks.utils.arguments import choice, flag, integer, invalid, number, numbers
from lit_tricks.utils.dtensor import read, write
from lit_tricks.utils.log import log
from lit_tricks.utils.training_length import TrainingLength, is_fast_dev_run

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
    loads the average. Checkpoints also keep the trained weights, from which a run resumes, unless they are written with
    ``save_weights_only``. After the fit the model has the average.

    Cost: one read and one write of the weights per update, below 1 % of a training step, and an fp32 copy of the model
    in memory. Checkpoints are up to twice as large (three times for bf16 weights with an optimizer without state). Use
    it for long runs. Leave it out of runs that are shorter than the average, which covers about ``1 / (1 - decay)``
    updates. Expect little gain if the learning rate ends at 0, since the last weights then change little. EMA does not
    work with CUDA graphs (``torch.compile(mode="reduce-overhead")``).

    ``power=[0.05, 0.2]`` lets you choose the length of the average after the run. It keeps two power-law averages
    ([Karras et al., 2024](https://arxiv.org/abs/2312.02696)) instead of the exponential one. The length of a power-law
    average is a constant share of the run so far. Snapshots of both averages are written during the run. Afterwards
    ``lit-tricks average RUN --ema-length 0.05:0.25 -o best.ckpt`` computes averages of several lengths from the
    snapshots, validates them, and writes the best one. A snapshot takes 4 bytes per weight. A run has at most
    ``snapshots`` of them, and one at the end: 1.7 GB for a ResNet-50 by default. The second average takes another fp32
    copy of the model in memory and in checkpoints, and as much time as the first. Writing one snapshot takes 1 % of the
    time of one training step of a ResNet-50 on a CPU (``benchmarks/post_hoc_ema.py``). After an interrupted run, only
    the part up to its last snapshot can be averaged.

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
        power: lengths of two power-law averages, each in [0.01, 0.28] and not equal. The length is the standard
            deviation of the average's profile as a share of the run, ``sigma_rel`` of EDM2. The first average is
            validated and saved. Near 0 it equals the current weights, and at 0.28 nearly the mean of the whole run.
            Lengths between the two, and a little beyond, can be mixed afterwards. Give it instead of ``decay`` and
            ``half_life``, and without changing ``warmup``. None keeps one exponential average.
        snapshots: largest number of snapshots of ``power`` during the run, from 2 to 1000, in the folder
            ``ema_snapshots`` next to the checkpoints. The end of the run gets one more. If there would be more of them,
            because the length of the run was unknown or has changed, every second one is removed. Below 8 few lengths
            can be mixed. 16 allow lengths from 0.03 to 0.265, and 64 from 0.015 to 0.28.

    Raises:
        ValueError: for an argument out of its range, or several of ``decay``, ``half_life`` and ``power``.
        RuntimeError: when the fit starts, if something else also averages weights, ``half_life`` is given and the
            length of an epoch is unknown, or ``power`` is given and a resumed checkpoint has an average of another
            kind, or the checkpoints are not in a local folder.

    Example:
        ``- {class_path: EMA, init_args: {decay: 0.999}}``
    """

    _second: AveragedWeights | None  # the power-law average that is not validated
    _folder: Path | None  # of the snapshots, in the first process
    _found: str  # the same, of the checkpoint that the run resumes
    _every: int  # updates between snapshots at the start of the run
    _written: int  # updates of the last snapshot
    _recording: bool  # whether snapshots are written
    _writes: bool  # whether this process writes them

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
        power: list[float] | None = None,
        snapshots: int = 16,
    ) -> None:
        if decay is not None and half_life is not None:
            raise invalid(
                self, "decay and half_life set the same quantity. Give one of them.", decay=decay, half_life=half_life
            )
        fix = "Give two relative lengths, such as [0.05, 0.2]."
        self.power: list[float] | None = numbers(
            self, "power", power, "[0.01, 0.28]", fix, length=2, or_none="one exponential average"
        )
        if self.power and self.power[0] == self.power[1]:
            raise invalid(self, f"the lengths must differ, to mix other lengths. {fix}", power=power)
        for name_of, value in {"decay": decay, "half_life": half_life}.items():
            if self.power and value is not None:
                raise invalid(self, f"power sets the decay. Leave out {name_of}.", power=power, **{name_of: value})
        self.snapshots: int = integer(
            self, "snapshots", snapshots, 2, "16 are usual; more give lengths below 0.03.", most=1000
        )
        if not self.power and self.snapshots != 16:
            raise invalid(
                self, "snapshots are of power-law averages. Give power, such as [0.05, 0.2].", snapshots=snapshots
            )
        if self.power and not warmup:
            message = "a power-law average cannot do without its warm-up. Leave out warmup."
            raise invalid(self, message, power=power, warmup=warmup)
        self.device: str | None = choice(
            self, "device", device, (None, "cpu"), "None keeps the average where the weights are."
        )
        super().__init__(buffers, validate, name, on_cpu=device == "cpu")
        if decay is None and half_life is None and not self.power:
            decay = 0.9999
        other = "power" if self.power else "half_life"
        self.decay: float | None = number(
            self, "decay", decay, "[0, 1)", "Give the share of the old average, such as 0.9999.", or_none=other
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or resume the averages.

        Raises:
            RuntimeError: see ``Averaging``, and if snapshots cannot be written to the folder of checkpoints.
        """
        if self.power and "://" in _checkpoint_folder(trainer):
            raise RuntimeError(
                f"EMA(power={self.power}): snapshots need a local folder, and checkpoints are written to "
                f"{_checkpoint_folder(trainer)}. Set ModelCheckpoint(dirpath=...) to a local folder."
            )
        super().on_fit_start(trainer, pl_module)
        if self.power:
            if self._second is None or not self._second.belongs_to(pl_module):
                self._second = AveragedWeights(pl_module, self.buffers, self._on_cpu)
            self._second.follow()
            # The last snapshot precedes other tricks that change the average at the end, such as PreciseBN.
            self.wrap(trainer.fit_loop, "on_run_end", self._around_last_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the decay and the interval of snapshots: earlier, the loaders are not there."""
        self._decay = self.decay
        if self.half_life is not None:
            length = TrainingLength("EMA(half_life=...)", "EMA(decay=...), or Trainer(limit_train_batches=...)")
            length.measure(trainer, pl_module)
            self._decay = ema_decay_of_half_life(self.half_life, length.epoch, self.every_n_steps)
        what = f"decay {self._decay:.6g}" if self._decay is not None else ""
        what += f" (half_life={self.half_life:g} epochs)" if self.half_life else ""
        what += " with warm-up" if self.warmup and not self.power else ""
        if self.power:
            what = f"power-law averages of lengths {self.power[0]:g} and {self.power[1]:g}"
        when = "every step" if self.every_n_steps == 1 else f"every {self.every_n_steps} steps"
        start = f" after step {self.start_step}" if self.start_step else ""
        name = f"{self.name}: " if self.name else ""
        stored = self._start_snapshots(trainer, pl_module) if self.power and not is_fast_dev_run(trainer) else ""
        self.announce(f"{name}{what}, {when}{start}; {self._what_for()}{stored}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average, and log the decay of the last update."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._updates and self.should_log(trainer):
            key = f"ema/{self.name}/decay" if self.name else "ema/decay"
            self.log_step(pl_module, {key: self._decay_at(self._updates - 1)})
        if self._updates % self._interval() == 0:
            self._write_snapshot()

    # Power-law averages: the second average, and the snapshots of both

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the weights that the checkpoint's ``state_dict`` lacks."""
        state = super().state_dict()
        if not state or not self.power or self._second is None:
            return state
        state |= {"power": self.power, "every": self._every, "snapshots": str(self._folder or "")}
        if self._updates and not state.get("shards") and self._weights:
            with self._weights.showing(False):
                state["second"] = self._second.state(False, self._saved_names)["average"]
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        if self.power and state["updates"] and state.get("power") != self.power:
            found = f"power={state['power']}" if state.get("power") else "one exponential average"
            raise RuntimeError(
                f"EMA(power={self.power}) cannot continue the average of the checkpoint, which has {found}. Resume "
                "with the arguments of that run, or give a new name=... to start other averages here."
            )
        super()._restore(state)
        if not self.power or self._weights is None or self._trainer is None:
            return
        self._every, self._found, self._written = state.get("every", 0), state.get("snapshots", ""), 0
        self._second = AveragedWeights(self._trainer.lightning_module, self.buffers, self._on_cpu)
        if state["updates"]:
            second = {"raw": {}, "average": state.get("second", {})}
            if "shards" in state:
                second = read(Path(state["shards"]) / f"{self.state_key}-second", self._second.like_state)
            self._second.restore(second)

    def _continues_other_averages(self) -> bool:
        return not self.power  # an exponential average covers another part of the run

    def _averaged(self) -> None:
        if self.power and self._second:
            self._second.update(1 - power_ema_decay(self.power[1], self._updates))

    def _around_writing(self, save_checkpoint: Callable[..., Any], checkpoint: Any, filepath: Any, **how: Any) -> Any:
        result = super()._around_writing(save_checkpoint, checkpoint, filepath, **how)
        resumable = self.state_key in checkpoint.get("callbacks", {})
        if resumable and self._updates and self._second and self._weights and self._trainer:
            with self._weights.showing(False):
                state = self._second.state(False, self._saved_names, whole=False)
            write(state, Path(self._trainer.strategy.broadcast(filepath)) / f"{self.state_key}-second")
        return result

    def _around_last_step(self, on_run_end: Callable[..., Any]) -> Any:
        self._catch_up()
        if self._updates:
            self._write_snapshot()
        return on_run_end()

    def _start_snapshots(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """Find the folder of snapshots and their interval, and restore the snapshots of a resumed run."""
        if not self._every:
            length = TrainingLength("EMA(power=...)", "EMA(decay=...)")
            length.measure(trainer, pl_module)
            updates = (length.run - self.start_step) // self.every_n_steps if length.knows_run else 1
            self._every = max(1, math.ceil(updates / self.snapshots))
        parent = Path(_checkpoint_folder(trainer))
        self._writes = trainer.is_global_zero
        if self._writes:
            name = f"{FOLDER}-{re.sub(r'[^0-9A-Za-z.-]', '_', self.name)}" if self.name else FOLDER
            found = _found_folder(self._folder or self._found, trainer) if self._updates else None
            if found is not None and found.resolve().parent == parent.resolve():
                self._folder = found
            else:
                self._folder = free_folder(parent, name)
                if found is not None:
                    copy_snapshots(found, self._folder, self._updates)
            thin_snapshots(self._folder, self._updates, self._interval())
            if self._updates >= self._interval() and not snapshots_in(self._folder):
                log.warning(
                    "EMA(power=...): the snapshots of the first %d updates are gone (%s). Averages that cover them "
                    "cannot be mixed.", self._updates, self._folder or self._found,
                )  # fmt: skip
        # A checkpoint may be written before the snapshot of its step.
        self._recording = True
        if self._updates and self._updates % self._interval() == 0:
            self._write_snapshot()
        size = 4 * sum(parameter.numel() for parameter in pl_module.parameters()) * (self.snapshots + 1) / 1e6
        return f"; up to {self.snapshots + 1} snapshots, {size:.3g} MB, in {self._folder}" if self._writes else ""

    def _interval(self) -> int:
        return snapshot_interval(self._updates, max(1, self._every), self.snapshots)

    def _write_snapshot(self) -> None:
        """Write the averages to a file, in the first process, and remove files to keep their number bounded."""
        if not self._recording or self._updates == self._written or not (self._weights and self._second and self.power):
            return
        averages = [self._weights.whole(), self._second.whole()]
        if self._writes and self._folder:
            write_snapshot(self._folder, Snapshot(self._updates, self.power, averages))
            thin_snapshots(self._folder, self._updates, self._interval())
        self._written = self._updates

    def _end_fit(self) -> None:
        if self._second and self._wrappers:
            self._second.follow()
        self._recording = False
        super()._end_fit()

    def _forget(self) -> None:
        super()._forget()
        self._second = None
        self._folder = None
        self._found = ""
        self._every = self._written = 0
        self._recording = self._writes = False

    def _decay_at(self, updates: int) -> float:
        if self.power:
            return power_ema_decay(self.power[0], updates)
        assert self._decay is not None
        return ema_decay(self._decay, updates) if self.warmup else self._decay

    def _why_nothing(self) -> str:
        return f"Lower start_step={self.start_step} or every_n_steps={self.every_n_steps}."


def _checkpoint_folder(trainer: Trainer) -> str:
    """Return the folder of the run's checkpoints, or of its logs if it saves none."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return str(folder or trainer.log_dir or trainer.default_root_dir)


def _found_folder(folder: str | Path, trainer: Trainer) -> Path | None:
    """Return the folder with the snapshots of the resumed run: next to the checkpoint, since runs may be moved."""
    if not str(folder):
        return None
    places = [Path(folder)]
    if trainer.ckpt_path:
        places.insert(0, Path(trainer.ckpt_path).parent / Path(folder).name)
    return next((place for place in places if snapshots_in(place)), None)
