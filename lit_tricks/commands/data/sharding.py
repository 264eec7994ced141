"""``lit-tricks data shard``: a folder of images as shards, which ``Streaming`` trains from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from lit_tricks.commands.progress import progress
from lit_tricks.data.image_table import images_at
from lit_tricks.data.shards.index import SPLITS, import_litdata
from lit_tricks.data.shards.writer import replaced_whole, write_shards
from lit_tricks.utils.log import log

__all__ = ["shard"]


def shard(
    folder: str,
    out: str,
    short_side: int | None = None,
    num_workers: int | Literal["auto"] = "auto",
    shard_mb: float = 64,
    overwrite: bool = False,
    val_fraction: float | None = None,
) -> Path:
    """Write the images of a folder as shards, large files that stream from a disk or a bucket.

    The shards are litdata's. They hold the bytes of the files as they are, the labels and the names of the classes.
    Training images go in random order, always the same, so that each shard holds all classes; the others in the order
    of their names. ``out`` appears when all is written; an error or Ctrl-C leaves nothing behind. To train from a
    bucket, copy it there as it is: ``aws s3 sync OUT s3://BUCKET/NAME``, or ``gcloud storage rsync -r``.

    Args:
        folder: images as ``ImageFolder`` takes them, FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg; or a table of
            ``ImageTable``, a CSV file or a folder with metadata.
        out: folder to write, with ``train``, ``val`` and, if there is one, ``test``.
        short_side: shrink images whose short side is longer to this many pixels, as JPEG of quality 95; faster to load,
            but other data. By default the files stay as they are.
        num_workers: threads that read and shrink; "auto" is one for each core, 16 at most.
        shard_mb: size of a shard in MiB, above 0. Below 16, buckets get slow.
        overwrite: replace the shards that are in ``out``.
        val_fraction: part of each class that is held out for validation, where there are no validation images.

    Returns:
        The path of the shards.

    Raises:
        ModuleNotFoundError: without litdata.
        FileNotFoundError: if ``folder`` is not what ``ImageFolder`` takes.
        FileExistsError: if ``out`` holds shards, unless they are to be replaced, or other things.
        ValueError: for an argument out of its range.
        RuntimeError: for a file that is no image.
    """
    import_litdata()
    if "://" in out:
        raise ValueError(f"out={out!r} must be a folder: write the shards there, and copy them into the bucket")
    if short_side is not None and short_side < 1:
        raise ValueError(f"short_side must be at least 1 pixel, got {short_side}")
    if num_workers != "auto" and num_workers < 1:
        raise ValueError(f'num_workers must be "auto" or at least 1, got {num_workers}')
    if not shard_mb > 0:
        raise ValueError(f"shard_mb must be above 0, got {shard_mb}: 64 is usual")
    data = images_at(folder, val_fraction)
    workers = data.auto_workers() if num_workers == "auto" else num_workers
    with replaced_whole(out, overwrite) as part:
        for split in SPLITS:
            if split == "test" and not data.has_test:
                continue
            source: Any = data.source(split)
            root = source.paths.root or data.root
            files = list(zip(source.paths, source.labels.tolist(), strict=True))
            if split == "train":
                random.Random(0).shuffle(files)
            with progress(split, len(files)) as advance:
                target, size = str(part / split), round(shard_mb * 2**20)
                write_shards(files, data.classes, root, target, short_side, workers, size, lambda: advance(1))
            log.info("%s: %d images of %d classes", split, len(files), data.num_classes)
    log.info("%s: shards for `--data Streaming --data.root %s`", out, out)
    return Path(out)
