"""The folder of a run, ``runs/NAME/vN``: made once, never written over."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

__all__ = ["RunFolder"]


class RunFolder:
    """Folder ``root/name/vN`` of one fit, with the first N that is free.

    Attributes:
        name: what the run is called; "run" until it is known better.
        version: "vN".
        path: the folder; None until it is made.
    """

    def __init__(self) -> None:
        self.name: str = "run"
        self.root: str = ""
        self.version: str = ""
        self.path: Path | None = None

    def create(self, root: str, name: str) -> None:
        """Make the folder, on rank zero; the other ranks write nothing.

        Raises:
            ValueError: if the name leads out of the root.
            OSError: if the folder cannot be made.
        """
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or Path(name).drive or ".." in parts or "\0" in name or "\\" in name:
            raise ValueError(f"--name {name!r} must be a name in the folder of runs, {root}, without .. and \\.")
        self.root = root
        self.name = name
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
                    f"the run folder {path} cannot be made ({error.strerror}): choose another folder with "
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


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
