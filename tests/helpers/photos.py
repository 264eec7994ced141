"""Images with the structure of photographs, and their JPEG files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def photo(width: int = 300, height: int = 200, seed: int = 0) -> Image.Image:
    """Blend noise of all scales, with edges."""
    rng = np.random.RandomState(seed)
    total = np.zeros((height, width, 3))
    for scale in (2, 5, 20, 100):
        coarse = Image.fromarray(rng.randint(0, 256, (scale, scale, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    total[height // 3 :, width // 2 :] *= 0.6
    return Image.fromarray((total / 4).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()
