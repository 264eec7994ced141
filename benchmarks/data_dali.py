"""NVIDIA DALI on the CPU, as a peer of data.py where it is installed: `pip install nvidia-dali-cuda120`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)


def steps(paths: list[str], size: int, batch_size: int) -> dict[str, Callable[[list[int]], object]]:
    """Return functions that turn indices into a batch, by name. Empty without DALI."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError:
        return {}

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1,
        exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    def pipeline(colored: bool) -> Any:
        files = fn.external_source(name="files", device="cpu")
        images = fn.decoders.image_random_crop(files, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, resize_x=size, resize_y=size, interp_type=types.INTERP_LINEAR, antialias=True)
        flip = fn.random.coin_flip()
        if not colored:
            return fn.flip(images, horizontal=flip)
        brightness, saturation = (fn.random.uniform(range=[0.6, 1.4]) for _ in range(2))
        images = fn.color_twist(
            images, brightness=brightness, saturation=saturation, hue=fn.random.uniform(range=[-72.0, 72.0])
        )
        return fn.crop_mirror_normalize(images, mirror=flip, mean=MEAN, std=STD, output_layout="CHW")

    def step(colored: bool) -> Callable[[list[int]], object]:
        built = pipeline(colored)
        built.build()

        def run(indices: list[int]) -> object:
            built.feed_input("files", [np.fromfile(paths[index], np.uint8) for index in indices])
            return built.run()

        return run

    return {
        "train: DALI on the CPU, jitter with hue, no PCA noise": step(True),
        "train: DALI on the CPU, uint8 out": step(False),
    }
