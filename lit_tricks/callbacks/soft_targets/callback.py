"""Base of the tricks that change training batches and their loss. It determines where and in which order they act."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget, carrying
from lit_tricks.utils.batch import Path, find, replace, tensors_in
from lit_tricks.utils.strength import RunStrength

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["LossTrick"]


class LossTrick(Trick):
    """Acts on training batches after their transfer to the device, in the module or the datamodule that owns the hook.

    The first such trick of the Trainer replaces the target of the batch by a soft target, and applies all such tricks
    to it. Their order is fixed, so their order in the list of callbacks has no effect.
    """

    stage = 1  # 0: changes inputs and labels; 1: changes the loss of the labels; 2: uses the changed inputs

    _trainer: Trainer | None = None
    transient: ClassVar[tuple[str, ...]] = ("_trainer", "spec")

    strength: RunStrength | None = None  # of a trick that can vary over the run
    spec: LossSpec | None = None  # of the current batch
    _seen = False  # whether a loss has used the target in this fit

    def chosen(self, tensors: dict[Path, Tensor], inputs: dict[Path, Tensor]) -> dict[Path, Tensor]:
        """Return the tensors of a batch that are passed to ``act``.

        Args:
            tensors: all tensors of the batch except the target, by their path.
            inputs: the tensors that are inputs, from ``find``.
        """
        return inputs

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Change inputs, target or its loss spec. The inputs that were given are not changed in place."""
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the quantities to log for a batch."""
        return {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the hook with the tricks.

        Raises:
            RuntimeError: if there is a second trick of the same class, or the batches cannot be reached.
        """
        name, team = type(self).__name__, _team(trainer)
        if [type(trick) for trick in team].count(type(self)) > 1:
            raise RuntimeError(f"{name} was passed twice. Keep only one.")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise RuntimeError(
                f"{name} cannot reach the batches that {type(pl_module).__name__}.training_step takes from "
                "`dataloader_iter`: let it take `batch`."
            )
        self._trainer, self._seen = trainer, False
        if team[0] is self:
            self.change_training_batches(trainer, partial(self._with_soft_target, team))

    def _with_soft_target(self, team: list[LossTrick], batch: Any) -> Any:
        names = tuple(sorted(type(trick).__name__ for trick in team))
        inputs, where, labels = find(batch, names[0])
        target = carrying(labels, LossSpec(names))
        if target.kind == "binary" and not self._seen:  # in the first batch only: the GPU waits for the answer
            _require_shares(labels, names)
        tensors = {path: tensor for path, tensor in tensors_in(batch) if path != where}
        now = dict(tensors)
        for trick in sorted(team, key=lambda trick: (trick.stage, type(trick).__name__)):
            changed, target = trick.act({path: now[path] for path in trick.chosen(tensors, inputs)}, target)
            now |= changed
            trick.spec = target.spec
        for path, value in now.items():
            if value is not tensors[path]:
                batch = replace(batch, path, value)
        return replace(batch, where, target)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the run in steps, if the strength varies.

        Raises:
            RuntimeError: if the length of the run is unknown, or no step would have a strength.
        """
        if self.strength is not None:
            self.strength.measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and check in the first batch that a loss used the target, and the number of steps.

        Raises:
            RuntimeError: if no loss used the target, or a batch makes another number of steps than assumed.
        """
        if self.strength is not None:
            self.strength.check(trainer)
        spec, self.spec = self.spec, None
        if spec is None:
            return
        if not self._seen and (outputs or not pl_module.automatic_optimization):  # not a batch that the module skipped
            self._seen = spec.used
            if not self._seen:
                raise RuntimeError(
                    f"{type(self).__name__} has no effect: in the first training step of {type(pl_module).__name__}, "
                    "no supported loss used the target of the batch. Let training_step pass it, as it is in the "
                    "batch, to F.cross_entropy, nn.CrossEntropyLoss or F.nll_loss, or as F.one_hot(target, "
                    "num_classes).float() to a binary or soft-target loss; several labels per item to a binary one."
                )
        if self.should_log(trainer) and (quantities := self.quantities(spec)):
            self.log_step(pl_module, quantities)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hook."""
        super().teardown(trainer, pl_module, stage)
        self._trainer = self.spec = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the hook."""
        super().on_exception(trainer, pl_module, exception)
        self._trainer = self.spec = None


def _require_shares(labels: Tensor, names: tuple[str, ...]) -> None:
    """Raise if several labels per item are no values from 0 to 1, whose mixture would have no meaning.

    Raises:
        RuntimeError: if they are not.
    """
    low, high = (float(end) for end in labels.aminmax())
    if low < 0 or high > 1:
        raise RuntimeError(
            f"{' and '.join(names)}: several labels of an item must be values from 0 to 1, and the training batch has "
            f"values from {low:g} to {high:g}. Encode classes as 0 and 1, and pass unknown labels as a mask, in a "
            "tensor of their own."
        )


def _team(trainer: Trainer) -> list[LossTrick]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, LossTrick)]
