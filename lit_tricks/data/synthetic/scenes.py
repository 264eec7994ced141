"""Canvases with several handwritten digits: data for segmentation and detection that needs no download."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lit_tricks.data.datamodule import Split
from lit_tricks.data.digits import INK, split_digits

__all__ = ["DigitScenes", "Placed"]

COUNTS: dict[Split, int] = {"train": 1000, "val": 200, "test": 200}
MOST = 4  # digits of a scene
SCALES = (0.25, 0.45)  # side of a digit over that of the scene
TRIES = 20  # to find room for a digit
NOISE = 24  # of the ground, at most, of 255
EDGE = 0.35  # of full ink: what is darker is ground


class Placed(NamedTuple):
    """A digit in a scene: its label, its box (x0, y0, x1, y1) in pixels, x1 and y1 outside, and where its ink is."""

    label: int
    box: tuple[int, int, int, int]
    mask: npt.NDArray[np.bool_]


class DigitScenes:
    """Grey scenes with one to four digits of a split at random places and sizes, which do not touch.

    1000 scenes of the training digits, 200 of those for validation, and 200 of those for the test. Each is drawn anew
    when it is asked for, the same every time.

    Args:
        split: whose digits.
        split_seed: see ``Digits``.
        size: side of a scene in pixels.
    """

    def __init__(self, split: Split, split_seed: int = 0, size: int = 64) -> None:
        self.images, self.labels = split_digits(split_seed)[split]
        self.key = (split_seed, list(COUNTS).index(split))
        self.count, self.size = COUNTS[split], size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, list[Placed]]:
        """An image of mode L, and the digits in it."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.default_rng((*self.key, index))
        canvas = rng.uniform(0, NOISE, (self.size, self.size))
        placed: list[Placed] = []
        for _ in range(int(rng.integers(1, MOST + 1))):
            which = int(rng.integers(len(self.labels)))
            side = round(rng.uniform(*SCALES) * self.size)
            for _ in range(TRIES):
                x, y = (int(at) for at in rng.integers(0, self.size - side + 1, 2))
                if not any(_touch((x, y, x + side, y + side), other.box) for other in placed):
                    placed.append(self._place(canvas, which, side, x, y))
                    break
        return Image.fromarray(np.rint(canvas).astype(np.uint8)), placed

    def _place(self, canvas: npt.NDArray[np.float64], which: int, side: int, x: int, y: int) -> Placed:
        small = Image.fromarray((self.images[which] * INK).astype(np.float32))
        ink = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), np.float64)
        room = canvas[y : y + side, x : x + side]
        np.maximum(room, ink, out=room)
        mask = np.zeros(canvas.shape, bool)
        mask[y : y + side, x : x + side] = ink > EDGE * 255
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        return Placed(int(self.labels[which]), box, mask)


def _touch(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]
