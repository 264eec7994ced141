"""Files that are read and written with care: only regular files, up to a size; and whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lit_tricks.utils.log import log

__all__ = [
    "MOST_RESULTS",
    "abandoned",
    "locked",
    "open_regular",
    "printable",
    "read_regular",
    "read_text",
    "text_cell",
    "write_whole",
    "written_whole",
]

LIMIT = 2**31  # bytes of a file that is read at once
MOST_RESULTS = 2**28  # bytes of a table, or of a file of results


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading. A pipe, device or socket would block, or never end.

    Args:
        path: of the file.
        limit: bytes that the file may have; None is no limit.

    Raises:
        OSError: if the path is not a regular file, or the file is too large; the message names it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file, but a pipe, device or socket", os.fspath(path))
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"the file has {found.st_size:,} bytes, more than {limit:,}", os.fspath(path))
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], limit: int = LIMIT) -> bytes:
    """Return the content of a regular file.

    Args:
        path: of the file.
        limit: bytes that the file may have.

    Raises:
        OSError: if the path is not a regular file, or the file is too large; the message names it.
    """
    with open_regular(path, limit) as stream:
        return stream.read()


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a regular file in UTF-8, without the mark that some editors put at its start.

    Raises:
        OSError: if the path is not a regular file, or the file is too large.
        ValueError: if the file has another encoding; the message names the file.
    """
    try:
        return read_regular(path, MOST_RESULTS).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it anew."
        ) from error


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], timeout: float = -1) -> Iterator[None]:
    """Hold the lock of a file, which ends with the process. Without locks of the file system, log a warning.

    Raises:
        TimeoutError: if another process holds the lock, after ``timeout`` seconds. A negative number waits.
        OSError: if the file cannot be made.
    """
    from filelock import FileLock

    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except NotImplementedError:  # some file systems of clusters
        log.warning("%s: this file system has no locks. Let one process use the folder at a time.", path)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yield a new file next to a path, which gets the path's name when it is complete.

    Until then a file at the path stays unchanged, also if the disk is full or the process is killed. A link at the path
    is replaced, and the target of the link is not changed.

    Args:
        path: of the file to write.
        durable: whether the content must be on the disk before it takes the name; False is for many small files.

    Raises:
        OSError: if the file cannot be written; the message names the path.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "there is something that is not a regular file", str(target))
        part.unlink(missing_ok=True)
        # a new file: a link of this name, which someone else may have left there, would be followed
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
        yield part
        if durable:
            _sync(part)
        os.replace(part, target)
        if durable:
            _sync(target.parent)
    except Exception as error:
        cause = _os_error(error)
        if cause is None or cause.errno is None or cause.filename not in (None, str(part), os.fspath(part)):
            raise
        raise OSError(cause.errno, cause.strerror, str(target)) from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes, durable: bool = True) -> None:
    """Write a file atomically (see ``written_whole``). Text is written as UTF-8."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with written_whole(path, durable) as part:
        part.write_bytes(data)


def abandoned(path: str | os.PathLike[str], infix: str = "") -> list[Path]:
    """List the files that killed processes of this machine left next to a path, the oldest first.

    Args:
        path: of the file or folder that was to be written.
        infix: "" for the parts of files that ``written_whole`` makes, or the ``X`` in names such as ``NAME.X-PID``.
    """
    target = Path(path)
    before, after = (f"{target.name}.{infix}-", "") if infix else (f".{target.name}.", ".part")
    name = re.compile(f"{re.escape(before)}(\\d+){re.escape(after)}", re.ASCII)
    found = [
        entry
        for entry in (target.parent.iterdir() if target.parent.is_dir() else ())
        if (match := name.fullmatch(entry.name)) and not _is_running(int(match[1]))
    ]
    return sorted(found, key=lambda entry: entry.lstat().st_mtime)


def printable(name: str) -> str:
    r"""Return a file name as valid Unicode: bytes that are not UTF-8 become ``\xNN``."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # text that was no file name
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def text_cell(text: object) -> str:
    """Return text as a cell of a CSV file that no spreadsheet runs: a formula gets an apostrophe in front."""
    shown = str(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@", "\t", "\r")) else shown


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the list of files of a folder."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the error of the system behind another one; torch, for one, hides it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _is_running(pid: int) -> bool:
    """Return whether a process lives; True where that cannot be known."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of someone else, or no number of a process
        return True
    return True
