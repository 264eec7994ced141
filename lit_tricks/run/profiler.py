"""Measure the time of a fit by part. The profiler is cheap, and runs in every fit without another profiler."""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler

__all__ = ["PARTS", "STEP_PARTS", "TimeSplit"]

STEP_PARTS = ("data", "forward", "backward", "optimizer", "callbacks", "other")
PARTS = (*STEP_PARTS, "validation", "checkpoints")

# Actions, as Lightning names them, and the part that their time belongs to, what they call aside. The first match
# counts; actions without a part belong to their caller. EMA and PreciseBN act in on_validation_model_eval.
ACTIONS = {
    r"^\[Callback\]|on_validation_model_(eval|train)$": "callbacks",
    r"train_dataloader_next|val_next|batch_transfer$|batch_to_device": "data",
    r"^\[Strategy\].*\.(training_step|validation_step)$": "forward",
    r"^\[Strategy\].*\.backward$": "backward",
    r"optimizer_step$|optimizer_zero_grad$|configure_gradient_clipping$|lr_scheduler_step$": "optimizer",
    r"^save_checkpoint$": "checkpoints",
}
SAMPLED = 11  # one batch in so many is timed on the device; a prime, so that the loader's workers take turns


class TimeSplit(Profiler):
    """Seconds of the training per part of ``PARTS``, from the first epoch to the end. They add up to the total.

    An action's time excludes the actions that it calls. ``data`` is the wait for the loader, the transfer to the device
    and transforms there (``on_after_batch_transfer``, where MixUp and CutMix act). ``forward`` is the training step.
    ``callbacks`` are the hooks of all callbacks. ``validation`` excludes callbacks and checkpoints. ``other`` is the
    loop itself and its loggers.

    On a CPU, the parts run one after the other and are timed by a clock. A GPU runs behind the host process, so events
    in its stream time every 11th training step, and their shares divide the time of all steps. ``data`` is then the
    time that the GPU waits. The host never waits for an event.

    Args:
        clock: seconds.
        event: makes an event with ``record()``, ``query()`` and ``elapsed_time(later)`` in milliseconds; None for
            CUDA's where the training uses it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, event: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._clock = clock
        self._event = event
        self._parts: dict[str, str] = {}  # of the actions seen so far
        self._stack: list[str] = []
        self._part, self._since = "other", 0.0
        self._running = self._validating = False
        self._batches = 0
        self._device = dict.fromkeys(STEP_PARTS, 0.0)
        self._events: list[tuple[str, Any]] | None = None  # of the step that is timed: what ends, and when
        self._timed: list[tuple[str, Any]] = []  # of the last one

    def start(self, action_name: str) -> None:
        """Go over to the part of an action."""
        if not self._running:
            if action_name != "run_training_epoch":
                return
            self._begin()
        part = self._parts.get(action_name)
        if part is None:
            part = self._parts[action_name] = _part_of(action_name)
        if action_name.endswith("train_dataloader_next"):
            self._next_batch()
        if self._validating and part in ("data", "forward"):
            part = "validation"
        self._stack.append(self._part)
        if part:
            self._switch(part)

    def stop(self, action_name: str) -> None:
        """Go back to the part of the action that called this one."""
        if not self._running or not self._stack:
            return
        self._switch(self._stack.pop())
        if action_name.endswith("on_validation_model_eval"):
            self._validating, self._events = True, None
            self._switch("validation")
        elif action_name.startswith("[Strategy]") and action_name.endswith(".on_validation_end"):
            self._validating = False
            self._switch("other")
        elif action_name.startswith("[LightningModule]") and action_name.endswith(".on_train_end"):
            self._running = False

    def describe(self) -> None:
        """Return an empty summary, since the report of the run has the numbers."""

    def result(self) -> dict[str, Any]:
        """Give ``seconds`` of each part, and the ``clock`` that divided the steps: "host" or "device"."""
        self._read()
        seconds, timed = dict(self.seconds), sum(self._device.values())
        if timed:
            steps = sum(seconds[part] for part in STEP_PARTS)
            seconds |= {part: steps * value / timed for part, value in self._device.items()}
        return {"clock": "device" if timed else "host", "seconds": {k: round(v, 4) for k, v in seconds.items()}}

    def _begin(self) -> None:
        if self._event is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._event = functools.partial(torch.cuda.Event, enable_timing=True)
        self._running, self._stack = True, []
        self._part, self._since = "other", self._clock()

    def _switch(self, part: str) -> None:
        now = self._clock()
        self.seconds[self._part] += now - self._since
        if self._events is not None:
            event = self._event()  # type: ignore[misc]
            event.record()
            self._events.append((self._part, event))
        self._part, self._since = part, now

    def _next_batch(self) -> None:
        """End the timing of a step on the device, and begin another one if it is its turn."""
        if self._event is None:
            return
        if self._events is not None:
            self._switch(self._part)
            self._timed, self._events = self._events, None
        if self._batches % SAMPLED == SAMPLED // 2:  # the first one warms up
            self._read()
            self._events = []
            self._switch(self._part)
        self._batches += 1

    def _read(self) -> None:
        """Add up the step that was timed last, if the device is done with it."""
        timed, self._timed = self._timed, []
        if timed and timed[-1][1].query():
            for (_, before), (part, after) in itertools.pairwise(timed):
                if part in self._device:  # a checkpoint's part is not one of the step
                    self._device[part] += before.elapsed_time(after) / 1000


def _part_of(action: str) -> str:
    return next((part for pattern, part in ACTIONS.items() if re.search(pattern, action)), "")
