"""Distinguish errors of an input (a damaged file, a network of the user) from errors of this package.

Decoders and networks fail with every type of exception, so code that calls them must catch ``Exception``. It catches
the errors of this package and of the machine with them, and these must not be reported as the input's.
"""

from __future__ import annotations

import errno
import sys
import traceback

import torch

__all__ = ["is_about_input"]

# The machine or the network fails, not the file that was opened.
OF_MACHINE = {
    getattr(errno, name, None)
    for name in (
        "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EINTR", "EAGAIN", "EBADF",
    )
}  # fmt: skip
MISTAKES = (NameError, AttributeError, TypeError, AssertionError, ImportError, NotImplementedError)
NETWORKS = ("lit_tricks.models", "lit_tricks.tasks")  # they fail as networks of the user do
WRAPPERS = ("lit_tricks.callbacks.base", "lit_tricks.commands.sizes.subject", "lit_tricks.commands.exporting.")
NEUTRAL = {"torch", *sys.stdlib_module_names}  # they run the code of others


def is_about_input(error: BaseException) -> bool:
    """Return whether an error can be the fault of the input. Call this where the error is caught.

    An error is not about the input if memory ran out, if the machine failed, if code of this package made a mistake
    such as a NameError, or if the innermost code that is not torch's or Python's belongs to this package.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in OF_MACHINE
    frames = [frame.f_globals.get("__name__") or "" for frame, _ in traceback.walk_tb(error.__traceback__)]
    if _is_ours(frames[-1]) and isinstance(error, MISTAKES):
        return False
    for name in reversed(frames[1:]):  # the first one catches the error
        if not name.startswith(WRAPPERS) and name.partition(".")[0] not in NEUTRAL:
            return not _is_ours(name)
    return True


def _is_ours(module: str) -> bool:
    return module.startswith("lit_tricks.") and not module.startswith(NETWORKS)
