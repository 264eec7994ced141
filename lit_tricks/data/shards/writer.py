"""Write image folders as litdata's shards: files of 64 MB that are read at once, from a disk or a bucket.

A sample is (bytes of a file, label, path below the folder). A sample is no dict: if pyarrow is installed, litdata packs
dicts into tables, whose rows are slow to read one by one and need pyarrow. The index of the shards is written last, and
also has the names of the classes.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from lit_tricks._compat import merge_shards
from lit_tricks.data.shards.index import SPLITS, import_litdata
from lit_tricks.data.shards.index_format import INDEX
from lit_tricks.data.transforms import to_rgb
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.files import abandoned, printable, read_regular, write_whole

log: logging.Logger = logging.getLogger("lit_tricks")

__all__ = ["CHUNK_BYTES", "image_bytes", "replaced_whole", "write_shards"]

CHUNK_BYTES = 1 << 26  # litdata's own default; objects of this size load from a bucket at full speed
QUALITY = {"quality": 95, "subsampling": 0}  # no color is averaged, as in most files of ImageNet


def image_bytes(path: str, short_side: int | None) -> bytes:
    """Read the bytes of an image file, as they are unless its short side is longer than ``short_side`` pixels.

    A longer one becomes a JPEG of quality 95 with this short side (Lanczos), in RGB; its EXIF is lost.

    Raises:
        RuntimeError: if the file is no image, or must be shrunk and is damaged; the message names it.
    """
    try:
        content = read_regular(path)
        with Image.open(io.BytesIO(content)) as image:  # reads the header only
            shortest = min(image.size)
            if short_side is None or shortest <= short_side:
                return content
            size = tuple(max(1, round(side * short_side / shortest)) for side in image.size)
            small = to_rgb(image).resize((size[0], size[1]), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", **QUALITY)
        return buffer.getvalue()
    except Exception as error:  # PIL's decoders fail with any type
        if not is_about_input(error) and not isinstance(error, ValueError):  # to_rgb rejects some modes
            raise
        raise RuntimeError(f"cannot read the image {path!r} ({error}): replace the file or remove it") from error


def write_shards(
    files: Sequence[tuple[str, int]],
    classes: Sequence[str],
    root: str,
    folder: str,
    short_side: int | None = None,
    num_workers: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write images as shards, in the order given. The result is the same for any number of workers.

    Args:
        files: path and label of each image.
        classes: their names, in the order of the labels.
        root: what the names of the samples are relative to.
        folder: empty or not there; the shards and their index go into it.
        short_side: shrink larger images to this short side in pixels (see ``image_bytes``).
        num_workers: threads that read and shrink, at least 1.
        chunk_bytes: size of a shard; one with a larger image is as large as that.
        advance: called after each image.
    """
    import_litdata()
    from litdata.streaming.writer import BinaryWriter

    # Not litdata.optimize, which by default deletes `$TMPDIR/data` and `$TMPDIR/chunks`: this touches `folder` only.
    writer = BinaryWriter(folder, chunk_bytes=chunk_bytes)
    contents = _in_order(lambda path: image_bytes(path, short_side), (path for path, _ in files), num_workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "An item was larger than the target chunk size")
        for index, ((path, label), content) in enumerate(zip(files, contents, strict=True)):
            name = printable(Path(os.path.relpath(path, root)).as_posix())
            writer.add_item(index, (content, label, name))
            advance()
        writer.done()
    merge_shards(writer)
    _add_to_index(Path(folder, INDEX), {"classes": list(classes)})


@contextmanager
def replaced_whole(folder: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` at the end. After an error or Ctrl-C nothing has changed.

    Remains of killed processes next to the folder are removed first, with a log line.

    Raises:
        FileExistsError: if the folder is there and not to be replaced, or holds other things than shards.
    """
    target = Path(os.path.realpath(folder))
    _clean_up(target)
    if target.exists():
        _check_replaceable(target, overwrite)
    part, old = (target.with_name(f"{target.name}.{what}-{os.getpid()}") for what in ("incomplete", "replaced"))
    part.mkdir(parents=True)
    try:
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)


def _clean_up(target: Path) -> None:
    """Remove what killed processes left; if one of them was about to replace the shards, they get their name again."""
    if not target.exists() and (replaced := abandoned(target, "replaced")):
        replaced[-1].rename(target)
        log.info("%s was restored: its replacement was interrupted", target)
    for each in abandoned(target, "incomplete") + abandoned(target, "replaced"):
        shutil.rmtree(each, ignore_errors=True)
        log.info("%s was removed: an interrupted process left it", each)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file: name a folder that does not exist yet")
    foreign = [path.name for path in target.iterdir() if path.name not in SPLITS or not Path(path, INDEX).is_file()]
    foreign += [
        f"{path.parent.name}/{path.name}"
        for path in target.glob("*/*")
        if path.name != INDEX and not path.match("chunk-*.bin")
    ]
    if foreign:
        raise FileExistsError(f"{str(target)!r} has content other than shards ({foreign[0]}): name another folder")
    if any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} holds shards already: name another folder, or replace them: --overwrite"
        )


def _in_order(function: Callable[[str], bytes], paths: Iterable[str], num_workers: int) -> Iterator[bytes]:
    """Map in threads, a few items ahead of the requested item."""
    rest = iter(paths)
    with ThreadPoolExecutor(num_workers) as pool:
        ahead: deque[Future[bytes]] = deque(pool.submit(function, path) for path in islice(rest, 4 * num_workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(function, path) for path in islice(rest, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _add_to_index(path: Path, more: dict[str, Any]) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    write_whole(path, json.dumps(index | more, sort_keys=True))
