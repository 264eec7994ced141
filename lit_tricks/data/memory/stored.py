"""Images as one tensor: at most one copy in the memory of a process and one on its device, shared by all users."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, ClassVar, Protocol

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from lit_tricks.utils.transient import Transient

__all__ = ["ImageSet", "MemorySource", "Stored", "stored"]


class ImageSet(Hashable, Protocol):
    """Identifies images, and loads them. It is small, and pickled instead of them. Equal sets load the same images."""

    def load(self) -> tuple[Tensor, Tensor]:
        """Load the images, uint8, shape (N, C, H, W), and the labels, int64, shape (N,)."""

    def to_image(self, pixels: Tensor) -> Image.Image:
        """Turn the pixels of one image, shape (C, H, W), into a PIL image."""


class Stored:
    """Images and labels in memory, and on a device where there is room.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self._on: dict[torch.device, tuple[Tensor, Tensor] | None] = {}

    def on(self, device: torch.device, share: float) -> tuple[Tensor, Tensor] | None:
        """Return images and labels on a device; None if there is no room for them, which is logged once.

        Args:
            device: the device.
            share: of its free memory that they may take, in (0, 1].
        """
        if device not in self._on:
            self._on[device] = self._moved(device, share)
        return self._on[device]

    def release(self) -> None:
        """Free the memory of devices."""
        self._on.clear()

    def _moved(self, device: torch.device, share: float) -> tuple[Tensor, Tensor] | None:
        free = _free_bytes(device)
        if free is None or self.images.nbytes <= share * free:
            try:
                return self.images.to(device), self.labels.to(device)
            except RuntimeError as error:  # torch.OutOfMemoryError is one; so is what some backends raise
                if "memory" not in str(error):
                    raise
        room = "too little" if free is None else f"{free / 1e6:.0f} MB"
        rank_zero_warn(
            f"images stay in the host's memory: they take {self.images.nbytes / 1e6:.0f} MB, and {device} has {room} "
            f"free, of which they may take {share:.0%}. Training is as before, a little slower; images_on='host' "
            "silences this."
        )
        return None


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


_loaded: weakref.WeakValueDictionary[ImageSet, Stored] = weakref.WeakValueDictionary()


def stored(image_set: ImageSet) -> Stored:
    """Return the images of a set, which are loaded unless this process has them."""
    found = _loaded.get(image_set)
    if found is None:
        found = _loaded[image_set] = Stored(*image_set.load())
    return found


class MemorySource(Transient):
    """Pairs of an image and its label, out of images that are in memory.

    Copies share the images. A pickle holds the set, and another process loads the images again.

    Args:
        image_set: identifies the images.
        rows: which of them, sorted; None takes all.
    """

    transient: ClassVar[dict[str, Any]] = {"_stored": None}

    def __init__(self, image_set: ImageSet, rows: list[int] | None = None) -> None:
        self.image_set = image_set
        self._stored: Stored | None = stored(image_set)
        self.rows: Tensor = torch.arange(len(self.stored.labels)) if rows is None else torch.tensor(rows)

    @property
    def stored(self) -> Stored:
        """The images of which these are some."""
        if self._stored is None:
            self._stored = stored(self.image_set)
        return self._stored

    @property
    def labels(self) -> Tensor:
        """Labels of the images, int64, shape (N,)."""
        return self.stored.labels[self.rows]

    def release(self) -> None:
        """Free the memory of devices."""
        if self._stored is not None:
            self._stored.release()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = int(self.rows[index])
        return self.image_set.to_image(self.stored.images[row]), int(self.stored.labels[row])

    def __deepcopy__(self, memo: dict[int, Any]) -> MemorySource:
        return self  # nothing of it changes
