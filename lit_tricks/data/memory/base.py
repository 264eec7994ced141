"""Base of the data modules whose images are in memory."""

from __future__ import annotations

from abc import ABC
from typing import Any, Literal, get_args

from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.data.memory.batch_transforms import BatchTransform
from lit_tricks.data.memory.loader import CPU, MemoryEvalLoader, MemorySamples, MemoryTrainLoader
from lit_tricks.data.memory.stored import MemorySource
from lit_tricks.data.samples import Samples, Source
from lit_tricks.data.transforms import Transform
from lit_tricks.utils.arguments import choice

__all__ = ["ImagesOn", "MemoryDataModule"]

ImagesOn = Literal["auto", "device", "host"]
SHARES: dict[str, float] = {"auto": 0.5, "device": 0.95, "host": 0.0}  # of the free memory of the device


class MemoryDataModule(ImageDataModule, ABC):
    """Base: a subclass gives a ``MemorySource`` for each split in ``_load``, and has transforms of whole batches.

    Without workers the loaders give [images, labels] on the device of the Trainer. Other transforms, image by image,
    may take the place of ours at any time; their batches are on the CPU.

    Args:
        batch_size: see the base class.
        num_workers: see the base class; "auto" is 0 for transforms of whole batches.
        predict_dir: see the base class.
        images_on: "device" keeps the images on the device that trains, "host" in the host's memory; "auto" is "device"
            if they take at most half of the device's free memory, and ``num_workers`` is "auto" or 0. Where there is no
            room on the device, they stay in the host's memory.
    """

    sample_type: type[Samples] = MemorySamples
    train_loader_type = MemoryTrainLoader
    eval_loader_type = MemoryEvalLoader

    def __init__(
        self,
        batch_size: int,
        num_workers: int | Literal["auto"],
        predict_dir: str | None,
        images_on: ImagesOn,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        images_on = choice(self, "images_on", images_on, get_args(ImagesOn))
        if images_on == "device" and num_workers not in ("auto", 0):
            raise ValueError(
                f'images_on="device" makes the batches in the process that trains, and num_workers={num_workers}: '
                'use num_workers=0, or images_on="host"'
            )
        self.images_on = images_on

    def teardown(self, stage: str | None = None) -> None:
        """Free the memory that the images take on the device."""
        super().teardown(stage)
        for source in self._sources.values():
            if isinstance(source, MemorySource):
                source.release()

    def _samples(self, name: str, source: Source, transform: Transform) -> Samples:
        samples = super()._samples(name, source, transform)
        if isinstance(samples, MemorySamples) and self._is_made_here(samples):
            samples.device = CPU if self.trainer is None else self.trainer.strategy.root_device
            samples.share = SHARES[self.images_on]
        return samples

    def _loader_args(self, samples: Samples) -> dict[str, Any]:
        args = super()._loader_args(samples)
        if self._is_made_here(samples):
            args |= {"num_workers": 0, "persistent_workers": False, "pin_memory": False}
        return args

    def _is_made_here(self, samples: Samples) -> bool:
        """Return whether batches are made at once, in this process."""
        at_once = isinstance(samples, MemorySamples) and isinstance(samples.transform, BatchTransform)
        return at_once and self.num_workers in ("auto", 0)
