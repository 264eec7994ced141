"""Set up Weights & Biases for a run: folder, name and axes, and offline mode without a login."""

from __future__ import annotations

import contextlib
import netrc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning_utilities.core.rank_zero import rank_zero_info

from lit_tricks import callbacks
from lit_tricks.run.folder import RunFolder
from lit_tricks.run.reading.scores import SCORES
from lit_tricks.tasks.base import Task

__all__ = ["is_wandb", "log_summary", "own_wandb_run", "prepare_wandb", "tell_wandb", "tracking_mode"]


@contextlib.contextmanager
def own_wandb_run() -> Iterator[None]:
    """End the W&B run that starts in this context. Otherwise the next fit of the process would continue it."""
    before, code = _wandb_run(), 1
    try:
        yield
        code = 0
    finally:
        started = _wandb_run()
        if started is not None and started is not before:
            started.finish(exit_code=code)


def is_wandb(logger: Any) -> bool:
    """Return whether the configuration of a logger belongs to W&B."""
    return str(getattr(logger, "class_path", "")).endswith(".WandbLogger")


def prepare_wandb(loggers: Any, run: RunFolder, checkpoint: str | None, watch: str | None) -> None:
    """Set the folder and name of the W&B run, offline mode without a login, and the id of a resumed run.

    Args:
        loggers: configuration of ``trainer.logger``, changed in place; its own settings stay.
        run: the run folder.
        checkpoint: the checkpoint to resume; if its folder belongs to a tracked run, this run continues.
        watch: kind of histograms: "gradients", "parameters" or "all"; or None.

    Raises:
        ValueError: if ``watch`` is set, and there is no W&B logger.
    """
    found = [logger for logger in (loggers if isinstance(loggers, list) else [loggers]) if is_wandb(logger)]
    if watch and not found:
        raise ValueError(f"--watch {watch} is for Weights & Biases: add --config loggers/wandb, or leave it out.")
    for logger in found:
        settings = logger.init_args
        settings.name = settings.name or f"{run.name}-{run.version}"
        if settings.save_dir in (None, "."):  # absolute, for W&B's process, which does not follow ours to other folders
            settings.save_dir = str(Path(run.root, run.name, run.version).resolve())
        if checkpoint and not (settings.id or settings.version):
            settings.id = _last_id(Path(checkpoint).resolve().parent.parent)
        if not settings.offline and tracking_mode() == "offline":
            settings.mode = "offline"  # Lightning's own `offline` would reject checkpoints as artifacts


def tell_wandb(logger: Any, config: dict[str, Any], module: Any) -> None:
    """Log the settings once, and draw the metrics of an epoch against the epoch.

    The summary has the best value of each metric of an epoch. The other metrics stay where Lightning has them, on the
    optimizer step. A constant quantity of a trick is in the summary only (see ``VaryingOnly``).

    Args:
        logger: a ``WandbLogger``.
        config: the resolved configuration. Lightning's hyperparameters, which repeat it, are not logged.
        module: that is trained. Of another one than ours it is not known which metrics are of an epoch.
    """
    run = logger.experiment
    run.config.update({"config": config}, allow_val_change=True)
    logger.log_hyperparams = _ignore
    if isinstance(module, Task):
        # by their full names: of two patterns that match, W&B takes one at random, and Lightning has set "*"
        for name in module.epoch_metrics():
            best = "max" if name.rpartition("/")[2] in SCORES else "min"
            run.define_metric(name, step_metric="epoch", summary=best)
    logger.log_metrics = VaryingOnly(logger.log_metrics, run.summary)


class VaryingOnly:
    """Log metrics. A quantity of a trick that has had one value so far is in the summary, not in a flat curve.

    The curve starts with the last constant value.

    Args:
        log: takes metrics by name, and the step.
        summary: of the W&B run.
    """

    def __init__(self, log: Callable[..., None], summary: Any) -> None:
        self._log = log
        self._summary = summary
        self._constant: dict[str, tuple[float, int | None]] = {}  # value and last step
        self._varying: set[str] = set()

    def __call__(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics of a step."""
        for name in [name for name in metrics if _is_quantity(name) and name not in self._varying]:
            value, last = self._constant.get(name, (metrics[name], step))
            if name not in self._constant:
                self._summary[name] = value
            if metrics[name] == value:
                self._constant[name] = (value, step)
            else:
                self._varying.add(name)
                del self._constant[name]
                self._log({name: value}, last)
        shown = {name: value for name, value in metrics.items() if name not in self._constant}
        if shown.keys() - {"epoch"}:
            self._log(shown, step)


def _is_quantity(name: str) -> bool:
    """Return whether a name is a learning rate, or what a trick logs, such as "ema/decay"."""
    trick, slash, _ = name.partition("/")
    is_of_trick = bool(slash) and trick.replace("_", "") in {each.lower() for each in callbacks.__all__}
    return name.startswith("lr-") or is_of_trick


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def log_summary(
    kind: str,
    folder: Path,
    settings: Mapping[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    plot: Path,
) -> None:
    """Track the table of several runs in a separate W&B run of their group.

    Args:
        kind: "ablation" or "race": type of the run, and name of the table.
        folder: folder of the runs, also for W&B's files. An existing summary is replaced.
        settings: of the runs' ``WandbLogger``.
        columns: headers of the table.
        rows: of the table.
        plot: a picture to go with it.
    """
    import wandb

    mode = "offline" if settings.get("offline") else tracking_mode()
    with own_wandb_run():
        run = wandb.run or wandb.init(
            project=settings.get("project"),
            entity=settings.get("entity"),
            group=settings.get("group") or os.environ.get("WANDB_RUN_GROUP") or folder.name,
            name=folder.name,
            job_type=kind,
            dir=str(folder.resolve()),
            id=_last_id(folder),
            resume="allow",
            mode=mode,
        )
        run.log({kind: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})
        run.log({"plot": wandb.Image(str(plot))})


def tracking_mode() -> Literal["offline"] | None:
    """Return offline mode without a login, unless another mode is set."""
    if os.environ.get("WANDB_MODE") or _logged_in():
        return None
    rank_zero_info("wandb: no login found, so the run is tracked offline; `wandb sync` uploads it later.")
    return "offline"


def _last_id(folder: Path) -> str | None:
    """Return the id of the W&B run with files in a folder."""
    found = sorted(folder.glob("wandb/*run-*-*"), key=os.path.getmtime)
    return found[-1].name.rpartition("-")[2] if found else None


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


def _logged_in() -> bool:
    """Return whether W&B would find a key. Calling W&B would already choose between online and offline."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL", "")).hostname
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if any(host == server or "wandb" in host for host in netrc.netrc(os.path.expanduser(path)).hosts):
                return True
    return False
