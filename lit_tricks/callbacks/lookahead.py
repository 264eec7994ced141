"""Lookahead: slow weights follow the trained weights, which start again from the slow weights every k steps.

One caveat: only the weights and statistics go back. The optimizer's own state, such as momentum, is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from lit_tricks.callbacks.averaging.callback import Averaging
from lit_tricks.utils.arguments import choice, integer, number
from lit_tricks.utils.training_length import TrainingLength, steps_done

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Lookahead", "lookahead_alpha"]


def lookahead_alpha(alpha: float, progress: float) -> float:
    """Return the share of the way that the slow weights take: from 1 at the start of a run to ``alpha`` at its end.

    The slow weights keep the share ``(1 - alpha) * progress ** 3`` of their old value.

    Args:
        alpha: share at the end of the run, in (0, 1].
        progress: finished part of the run, in [0, 1].

    Example:
        >>> [lookahead_alpha(0.2, progress) for progress in (0.0, 0.5, 1.0)]
        [1.0, 0.9, 0.19999999999999996]
    """
    return 1 - (1 - alpha) * progress**3


class Lookahead(Averaging):
    """Let slow weights follow the trained ones, and restart training from them every k steps ([Zhang et al., 2019](https://arxiv.org/abs/1907.08610)).

    Every ``k`` steps ``slow = slow + alpha * (weights - slow)``, in fp32, and then ``weights = slow``. The slow weights
    are at first the initial weights. Any optimizer takes the steps, and keeps its state. Running statistics of norm
    layers follow the same rule as weights. The slow weights are validated, saved as ``state_dict`` of every checkpoint,
    and left in the model after the fit: the last steps after a multiple of ``k`` are dropped. Full checkpoints also
    have the trained weights, from which a run resumes.

    Cost: one read and two writes of the weights every ``k`` steps, and an fp32 copy of the model in memory. Checkpoints
    are up to twice as large. Use it where the learning rate does not end near 0. Leave it out with a schedule that ends
    at 0, which already averages out the noise of the steps. It does not work with CUDA graphs
    (``torch.compile(mode="reduce-overhead")``), nor with other averages that are validated.

    Args:
        k: optimizer steps between two updates of the slow weights, 1 or more. At 1 each step is shortened by ``alpha``.
            A large value gives noisy weights more time to diverge. Only batches in which an optimizer steps count.
        alpha: share of the way to the trained weights that the slow weights take, in (0, 1]. At 1 training is not
            changed. Near 0 the model hardly moves.
        schedule: "constant" uses ``alpha`` in the whole run. "cubic" starts at 1, and reaches ``alpha`` at the end of
            the run: ``1 - (1 - alpha) * progress ** 3``, as in [Jordan, 2024](https://arxiv.org/abs/2404.00498), with
            ``alpha=0.23``.
        buffers: floating-point buffers that follow the same rule. "statistics": running statistics of norm layers.
            "average": all. "copy": none, as in implementations as an optimizer.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if another average is also validated, the strategy or an optimizer hides
            weights or steps, or "cubic" is used in a run of unknown length.

    Example:
        ``- {class_path: Lookahead, init_args: {k: 5, alpha: 0.5}}``
    """

    _run_steps: int | None

    def __init__(
        self,
        k: int = 5,
        alpha: float = 0.5,
        schedule: Literal["constant", "cubic"] = "constant",
        buffers: Literal["statistics", "average", "copy"] = "statistics",
    ) -> None:
        super().__init__(buffers, validate=True, name=None)
        self.k: int = integer(self, "k", k, 1, "5 is usual.")
        self.alpha: float = number(self, "alpha", alpha, "(0, 1]", "0.5 is usual, and 1 changes nothing.")
        self.schedule: str = choice(self, "schedule", schedule, ("constant", "cubic"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the end of a step, before all callbacks' ``on_train_batch_end``."""
        super().on_fit_start(trainer, pl_module)
        # Other callbacks' on_train_batch_end, such as of EMA(validate=False), then find the new weights, in any order.
        self.wrap(trainer.fit_loop.epoch_loop, "update_lr_schedulers", self._around_schedulers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the slow weights, when the weights are initialized and a checkpoint is restored.

        Raises:
            RuntimeError: if the length of the run is needed and unknown.
        """
        self._run_steps = None
        if self.schedule == "cubic":
            self._length.measure(trainer, pl_module)
            self._run_steps = self._length.run
        if not self._updates and self._weights:
            self._weights.update(1.0)
            self._updates = 1
        alpha = f"{self.alpha:g}" if self.schedule == "constant" else f"1 to {self.alpha:g} (cubic)"
        self.announce(f"slow weights take {alpha} of the way, every {self.k} steps; {self._what_for()}")

    def share(self, step: int, updates: int) -> float | None:
        """Return the share of the way that the slow weights take after a step, or None between updates."""
        return None if step % self.k else self._alpha()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the share."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._length.check(trainer)
        if self.should_log(trainer):
            self.log_step(pl_module, {"lookahead/alpha": self._alpha()})

    def _alpha(self) -> float:
        trainer = self._trainer
        if self._run_steps is None or trainer is None:
            return self.alpha
        return lookahead_alpha(self.alpha, min(1.0, steps_done(trainer, trainer.lightning_module) / self._run_steps))

    def _averaged(self) -> None:
        assert self._weights is not None
        self._weights.copy_to_module()

    def _continues_other_averages(self) -> bool:
        return False  # an average of the whole run is no slow weight to return to

    def _around_schedulers(self, update_lr_schedulers: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._catch_up()
        return update_lr_schedulers(*args, **kwargs)

    def _forget(self) -> None:
        super()._forget()
        remedy = 'Lookahead(schedule="constant"), Trainer(max_steps=...) or Trainer(max_epochs=...)'
        self._length = TrainingLength("Lookahead", remedy, remedy)
        self._run_steps = None
