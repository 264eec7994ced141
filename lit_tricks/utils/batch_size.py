"""How many samples make a step of the optimizer, found before the training loader is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["TrueBatch", "true_batch"]


class TrueBatch(NamedTuple):
    """The samples of a step: those of a batch, in each process, in each of the batches that are accumulated."""

    size: int = 1
    processes: int = 1
    accumulated: int = 1

    @property
    def total(self) -> int:
        """Samples in a step."""
        return self.size * self.processes * self.accumulated

    def __str__(self) -> str:
        parts = {"processes": self.processes, "accumulated batches": self.accumulated}
        return " x ".join([str(self.size), *(f"{n} {what}" for what, n in parts.items() if n > 1)])


def true_batch(trainer: Trainer, pl_module: LightningModule, batch_size: int | None, trick: str) -> TrueBatch:
    """Find the batch of a step.

    Args:
        trainer: the Trainer, in or after its ``setup``.
        pl_module: the module.
        batch_size: samples in a batch of one process; None to find it.
        trick: who asks, for the messages.

    Raises:
        RuntimeError: if it is not known, or will change.
    """
    if any(type(c).__name__ == "GradientAccumulationScheduler" for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{trick} needs one batch size for the run, and the GradientAccumulationScheduler changes it: use "
            f"Trainer(accumulate_grad_batches=...), or remove {trick}."
        )
    size = batch_size or _configured(trainer, pl_module)
    if size is None:
        raise RuntimeError(
            f"{trick} cannot tell the batch size: the loader has none, and the module or datamodule that makes it has "
            f"no batch_size. Give {trick}(batch_size=...), the samples in a batch of one process."
        )
    processes = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)  # those that see different data
    return TrueBatch(size, processes, trainer.accumulate_grad_batches)


def _configured(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Batch size of the training loader, without building it: that early, it would not be restored on resume."""
    # where the Trainer takes the loader from: the object itself, or the module or datamodule that will make it
    source = getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)
    if source is trainer.datamodule or source is pl_module:  # type: ignore[attr-defined]  # a connector sets it
        sizes = [getattr(source, "batch_size", None), _hparams(source).get("batch_size")]
    else:
        sizes = [getattr(loader, "batch_size", None) for loader in (source, getattr(source, "batch_sampler", None))]
    return next((size for size in sizes if isinstance(size, int)), None)


def _hparams(owner: Any) -> dict[str, Any]:
    """What ``save_hyperparameters`` saved; asking for ``owner.hparams`` would leave an empty one there."""
    return vars(owner).get("_hparams") or {}
