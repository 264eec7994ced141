"""The folder of a run, ``runs/NAME/vN``: made once, never written over; and what W&B is told of it."""

from __future__ import annotations

import contextlib
import netrc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only

__all__ = ["RunFolder", "own_wandb_run", "prepare_wandb"]


class RunFolder:
    """Folder ``root/name/vN`` of one fit, with the first N that is free.

    Attributes:
        name: what the run is called; "run" until it is known better.
        version: "vN".
        path: the folder; None until it is made.
    """

    def __init__(self) -> None:
        self.name = "run"
        self.root = self.version = ""
        self.path: Path | None = None

    def create(self, root: str, name: str) -> None:
        """Make the folder, on rank zero; the other ranks write nothing.

        Raises:
            OSError: if it can not be written.
        """
        self.root, self.name = root, name
        taken = [int(p.name[1:]) for p in Path(root, name).glob("v*") if p.name[1:].isdecimal()]
        number = max(taken, default=-1) + 1
        while True:
            self.version = f"v{number}"
            path = Path(root, name, self.version)
            if not _is_rank_zero():
                break
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:  # another run was faster
                if not path.is_dir():
                    raise
                number += 1
            except OSError as error:
                raise type(error)(
                    f"the folder of the run, {path}, can not be made ({error.strerror}): choose another place with "
                    "--trainer.default_root_dir."
                ) from error
        self.path = path

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that failed before it had anything to show, the configuration aside."""
        if self.path and _is_rank_zero() and self.path.is_dir():
            files = {p.name for p in self.path.rglob("*") if p.is_file()}
            if files <= {"config.yaml", "hparams.yaml", "tricks.json"}:
                shutil.rmtree(self.path)
                with contextlib.suppress(OSError):  # not empty
                    self.path.parent.rmdir()
                    self.path.parent.parent.rmdir()


@contextlib.contextmanager
def own_wandb_run() -> Iterator[None]:
    """End the W&B run that is started meanwhile, or the next fit of the same process would go on in it."""
    before, code = _wandb_run(), 1
    try:
        yield
        code = 0
    finally:
        started = _wandb_run()
        if started is not None and started is not before:
            started.finish(exit_code=code)


def prepare_wandb(loggers: Any, run: RunFolder, checkpoint: str | None) -> None:
    """Tell W&B where the run lies and what it is called; offline where nobody is logged in; resume where it stopped.

    Args:
        loggers: configuration of ``trainer.logger``, changed in place: what it sets itself stays.
        run: the folder of the run.
        checkpoint: the checkpoint that is resumed; if it lies in the folder of a tracked run, that run goes on.
    """
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not str(getattr(logger, "class_path", "")).endswith(".WandbLogger"):
            continue
        settings = logger.init_args
        settings.name = settings.name or f"{run.name}-{run.version}"
        if settings.save_dir in (None, "."):  # absolute, for W&B's process, which does not follow ours to other folders
            settings.save_dir = str(Path(run.root, run.name, run.version).resolve())
        if checkpoint and not (settings.id or settings.version):
            stopped = sorted(Path(checkpoint).resolve().parent.parent.glob("wandb/*run-*-*"), key=os.path.getmtime)
            if stopped:
                settings.id = stopped[-1].name.rpartition("-")[2]
        if not (settings.offline or os.environ.get("WANDB_MODE") or _logged_in()):
            settings.offline = True
            rank_zero_info("wandb: no login found, so the run is tracked offline; `wandb sync` uploads it later.")


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _logged_in() -> bool:
    """Whether W&B would find a key. W&B itself can not be asked: it settles on online or offline when it is."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if any(host == server or "wandb" in host for host in netrc.netrc(os.path.expanduser(path)).hosts):
                return True
    return False
