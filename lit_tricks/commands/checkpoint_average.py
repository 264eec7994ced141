"""``lit-tricks average``: one model out of several checkpoints, without a step of training.

One caveat: a uniform average is good where the checkpoints lie in one basin: of one run, or of runs that started from
the same weights. The average of runs from different random weights is worthless.

``--ema_length`` averages within one run instead, from the snapshots of ``EMA(power=...)``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

import lit_tricks.data  # noqa: F401  # the parser finds the short names of the classes that are imported
from lit_tricks._compat import PRUNED_WEIGHT
from lit_tricks.callbacks.batchnorm.statistics import estimate
from lit_tricks.commands.batch_transfer import transfer
from lit_tricks.commands.checkpoints import (
    RUN,
    checkpoint_at,
    class_path_in,
    data_of,
    module_of,
    read_checkpoint,
    require_finite,
)
from lit_tricks.commands.ema_lengths import lengths_of, mixed, mixtures_of, snapshots_of, write_lengths
from lit_tricks.commands.progress import progress
from lit_tricks.utils.batch import arguments_of
from lit_tricks.utils.checkpoint_files import write_checkpoint
from lit_tricks.utils.class_names import require_same_classes
from lit_tricks.utils.log import log
from lit_tricks.utils.modules import batchnorms_of, is_statistic, some_of
from lit_tricks.utils.rng import isolated_random_state
from lit_tricks.utils.spectral_norm import iterate_in, spectral_norms

__all__ = ["CHOSEN_BY", "average", "mean_of"]

CHOSEN_BY = "chosen_by"  # in a checkpoint, the metric of the validation that has chosen its average


State = dict[str, Tensor]


def mean_of(states: Iterable[State], copied: Collection[str] = ()) -> State:
    """Average state dicts in float64. Vectors of spectral norms are computed for the averaged weights.

    The masks of pruned weights are taken from the first one.

    Args:
        states: one or more, of one module.
        copied: names of tensors to take from the first one, as integers and booleans always are.
    """
    sums: State = {}
    first: State = {}
    differ: set[str] = set()
    count = 0
    for state in states:
        first = first or state
        for name, tensor in state.items():
            if _is_averaged(first[name]) and name not in copied and not _is_mask(name, first):
                precise = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
                sums[name] = sums[name].add_(precise) if name in sums else precise.clone()
                if name not in differ and not torch.equal(tensor, first[name]):
                    differ.add(name)
        count += 1
    mean = {name: (sums[name] / count).to(value.dtype) if name in differ else value for name, value in first.items()}
    for name in iterate_in(mean, first):
        mean[name] = first[name]
    return mean


def average(
    checkpoints: list[str],
    output: str,
    greedy: bool = False,
    metric: str = "val/top1",
    mode: Literal["max", "min"] = "max",
    data: LightningDataModule | None = None,
    module: LightningModule | None = None,
    num_samples: int = 8192,
    overwrite: bool = False,
    ema_length: str | None = None,
) -> Path:
    """Average finished checkpoints into one that loads like any other.

    These are the soups of [Wortsman et al., 2022](https://arxiv.org/abs/2203.05482), uniform or greedy. The weights
    come from ``state_dict``, which has the averaged weights for a run with EMA. The state of a run, such as its
    optimizer, is left out. With ``data`` the statistics of BatchNorm are re-estimated for the new weights. Without
    ``data`` the statistics are averaged too, and a network with BatchNorm may lose most of its accuracy.

    ``ema_length`` gives averages within one run instead, which are mixed from the snapshots of
    ``EMA(power=[0.05, 0.2])`` ([Karras et al., 2024](https://arxiv.org/abs/2312.02696)). The average of each length is
    validated, and the best one is written. A .csv file of the same name as ``output`` has the metric of each length.
    The test split is not used.

    Args:
        checkpoints: two or more checkpoints of the same model, each a file or a run folder (its best checkpoint). With
            ``ema_length``: one run folder (its last checkpoint), or one checkpoint of the run.
        output: file to write.
        greedy: start from the checkpoint with the best ``metric``, and add the others in the order of their metric,
            each only if the average does not get worse. Needs ``data``.
        metric: metric to compare, which the model logs in validation.
        mode: whether higher ("max") or lower ("min") is better.
        data: training data to re-estimate BatchNorm from, and validation data for ``greedy`` and ``ema_length``; for
            ``ema_length`` by default the data of the run.
        module: module that the weights belong to; by default from the checkpoints.
        num_samples: training samples to re-estimate BatchNorm from, 1 or more.
        overwrite: replace ``output`` if it exists.
        ema_length: length of the average, as the standard deviation of its profile in the run: "0.1" for one length,
            "0.05:0.25" for five lengths in this range, "0.05:0.25:9" for nine. Lengths between the two of ``power``,
            and a little beyond, can be mixed: the error of the profile must be below 5 %.

    Returns:
        The path of the new checkpoint.

    Raises:
        FileNotFoundError: if a checkpoint, or the folder of ``output``, does not exist; or a run without snapshots.
        FileExistsError: if ``output`` exists, without ``overwrite``.
        ValueError: if a file is no checkpoint, or belongs to another model; for arguments that exclude each other; or
            for a length that cannot be mixed from the snapshots.
    """
    if ema_length is not None:
        lengths = lengths_of(ema_length)
        path = _check_run(checkpoints, output, greedy, num_samples, overwrite)
        return _choose_length(path, lengths, output, metric, mode, data, module, num_samples)
    paths = _check(checkpoints, output, greedy, data, num_samples, overwrite)
    first = read_checkpoint(paths[0])
    for path in paths:
        content = read_checkpoint(path)
        require_finite(path, content["state_dict"], module)
        _check_same(first, content, paths[0], path)
    has_statistics = any(name.endswith(".running_var") for name in first["state_dict"])
    if data is None and has_statistics:
        log.warning("the statistics of BatchNorm are averaged, not re-estimated: give --data to do that")
    module = module or _module(paths[0], first, needed=data is not None)
    workshop = _Workshop(module, data, num_samples)
    if greedy:
        chosen, state = _greedy(paths, workshop, metric, mode)
    else:
        chosen, state = paths, _soup(paths, workshop)
    known = module.state_dict() if module else ()
    if guessed := [name for name in _guessed(state, first["state_dict"]) if name not in known]:
        log.warning("averaged as parameters, and may be buffers: %s. Set --module to find out", some_of(guessed))
    kept = {key: value for key, value in first.items() if key not in RUN}
    origin: dict[str, Any] = {"averaged_from": [str(path) for path in chosen]} | ({CHOSEN_BY: metric} if greedy else {})
    write_checkpoint(kept | {"state_dict": state} | origin, output)
    log.info("%s: the average of %s", output, ", ".join(map(str, chosen)))
    return Path(output)


class _Workshop:
    """The model, to fill weights into, and data, to see what they are worth; each may be unknown."""

    def __init__(self, model: LightningModule | None, data: LightningDataModule | None, num_samples: int) -> None:
        self.model: Any = model
        self.data: Any = data
        self.num_samples = num_samples
        self.copied = _not_averaged(model) if model else []
        if data is not None:
            self.trainer = Trainer(
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            assert model is not None  # data needs one
            model.trainer = self.trainer  # hooks may depend on it
            data.prepare_data()
            require_same_classes(model, data, "the checkpoint", "the data")
        if self.copied:
            log.info("copied from the first checkpoint, as buffers that are no statistics: %s", some_of(self.copied))

    def fill(self, state: State) -> None:
        """Load weights into the model, in the mode in which they were saved."""
        self.model.train()  # adapters that have merged for a validation unmerge
        self.model.load_state_dict(state, strict=self.model.strict_loading)

    def score(self, state: State, metric: str) -> float:
        """Return the metric of weights."""
        self.fill(state)
        found = self.trainer.validate(self.model, datamodule=self.data, verbose=False)
        metrics = {name: value for of_loader in found for name, value in of_loader.items()}
        if metric not in metrics:
            raise ValueError(f"metric={metric!r} is not logged in validation; there are {', '.join(sorted(metrics))}.")
        return float(metrics[metric])

    def complete(self, state: State) -> State:
        """Return the weights with what belongs to them: vectors of spectral norms, statistics of BatchNorm."""
        if self.model is None:
            return state
        new = dict(state)
        if norms := spectral_norms(self.model):
            self.fill(state)
            paths = {part: f"{path}." if path else "" for path, part in self.model.named_modules()}
            for norm in norms:
                for (owner, name), value in zip((norm.u, norm.v), norm.vectors() or (), strict=False):
                    new[paths[owner] + name] = value.to("cpu", state[paths[owner] + name].dtype)
        return new if self.data is None else self._with_statistics(new)

    def _with_statistics(self, state: State) -> State:
        self.fill(state)
        layers = batchnorms_of(self.model)
        if not layers:
            return state
        self.data.setup("fit")
        loader = CombinedLoader(self.data.train_dataloader(), "max_size_cycle")
        device = self.trainer.strategy.root_device
        self.model.to(device)
        with isolated_random_state(device, loader.flattened), progress("BatchNorm", self.num_samples) as advance:
            batches = self._batches(loader, device, advance)
            statistics = estimate(self.model, layers, batches, lambda inputs: self.model(*inputs))
        self.model.cpu()
        new = dict(state)
        for name, values in statistics.items():
            for kind, value in zip(("running_mean", "running_var"), values, strict=True):
                new[f"{name}.{kind}"] = value.to("cpu", state[f"{name}.{kind}"].dtype)
        return new

    def _batches(self, loader: Any, device: torch.device, advance: Callable[[int], None]) -> Iterator[list[Any]]:
        seen = 0
        for given, *_ in loader:
            inputs = arguments_of(transfer(given, device, self.model, self.data), "average")
            yield inputs
            seen += len(inputs[0])
            advance(len(inputs[0]))
            if seen >= self.num_samples:
                return


def _choose_length(
    path: Path,
    lengths: list[float],
    output: str,
    metric: str,
    mode: str,
    data: LightningDataModule | None,
    module: LightningModule | None,
    num_samples: int,
) -> Path:
    """Write the average of a run that is best on validation, and the table of all lengths."""
    first = read_checkpoint(path)
    snapshots = snapshots_of(path, first)
    mixtures = mixtures_of(snapshots, lengths)
    data = data_of(path) if data is None else data
    if data is None and len(lengths) > 1:
        raise ValueError(
            f"--ema_length with a range compares metrics of validation data, and {path} does not name its data: give "
            "--data, such as --data Digits."
        )
    module = module or _module(path, first, needed=True)
    assert module is not None
    workshop = _Workshop(module, data, num_samples)
    if data is None and batchnorms_of(module):
        log.warning("the statistics of BatchNorm are averaged, not re-estimated: give --data to do that")
    sign, scores, chosen, best = 1 if mode == "max" else -1, dict[float, float](), lengths[0], State()
    with progress("averages", len(lengths)) as advance:
        for length, (shares, error) in mixtures.items():
            state = workshop.complete(mixed(snapshots, shares, first["state_dict"], module))
            require_finite(path, state, module)
            if data is not None:
                scores[length] = workshop.score(state, metric)
                log.info("length %g: %s %.6g (profile error %.1f %%)", length, metric, scores[length], 100 * error)
            if not best or sign * scores[length] > sign * scores[chosen]:
                chosen, best = length, state
            advance(1)
    kept = {key: value for key, value in first.items() if key not in RUN}
    origin: dict[str, Any] = {"averaged_from": [str(file) for file in snapshots.files.values()], "ema_length": chosen}
    origin |= {CHOSEN_BY: metric} if len(lengths) > 1 else {}
    write_checkpoint(kept | {"state_dict": best} | origin, output)
    write_lengths(Path(output).with_suffix(".csv"), {n: error for n, (_, error) in mixtures.items()}, scores, metric)
    why = f", the best of {len(lengths)} on validation" if len(lengths) > 1 else ""
    log.info("%s: the average of length %g of %s%s", output, chosen, path, why)
    return Path(output)


def _soup(paths: Sequence[Path], workshop: _Workshop) -> State:
    return workshop.complete(mean_of((read_checkpoint(path)["state_dict"] for path in paths), workshop.copied))


def _greedy(paths: list[Path], workshop: _Workshop, metric: str, mode: str) -> tuple[list[Path], State]:
    """Return the checkpoints of the greedy soup, and its scored weights. A single checkpoint is not changed."""
    sign = 1 if mode == "max" else -1
    with progress("greedy soup", 2 * len(paths) - 1) as advance:
        scores = {}
        for path in paths:
            scores[path] = sign * workshop.score(read_checkpoint(path)["state_dict"], metric)
            advance(1)
        best, *others = sorted(paths, key=lambda path: -scores[path])
        chosen, highest, state = [best], scores[best], dict(read_checkpoint(best)["state_dict"])
        log.info("%s: %s %.6g, by itself", best, metric, sign * highest)
        for path in others:
            candidate = _soup([*chosen, path], workshop)
            score = sign * workshop.score(candidate, metric)
            verdict = "left out"
            if score >= highest:
                chosen, highest, state, verdict = [*chosen, path], score, candidate, "taken"
            log.info("%s: %s %.6g, by itself %.6g: %s", path, metric, sign * score, sign * scores[path], verdict)
            advance(1)
    return chosen, state


def _check_run(checkpoints: list[str], output: str, greedy: bool, num_samples: int, overwrite: bool) -> Path:
    if len(checkpoints) != 1:
        raise ValueError(f"--ema_length averages within one run, got {len(checkpoints)} checkpoints. Give one.")
    if greedy:
        raise ValueError("--ema_length and --greedy exclude each other: leave out one of them.")
    _check_output(Path(output), overwrite, num_samples)
    table = Path(output).with_suffix(".csv")
    if table == Path(output):
        raise ValueError(f"--output {output} is a checkpoint: end its name with .ckpt.")
    if table.exists() and not overwrite:
        raise FileExistsError(f"--output {output}: {table} exists. Choose another name, or give --overwrite.")
    return checkpoint_at(checkpoints[0], prefer="last")


def _check(
    checkpoints: list[str], output: str, greedy: bool, data: object, num_samples: int, overwrite: bool
) -> list[Path]:
    if len(checkpoints) < 2:
        raise ValueError("average needs two checkpoints or more, got one.")
    paths = [checkpoint_at(checkpoint) for checkpoint in checkpoints]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a checkpoint is given twice: it would count double. Give each once.")
    _check_output(Path(output), overwrite, num_samples)
    if greedy and data is None:
        raise ValueError("--greedy compares metrics of validation data: give --data, such as --data Digits.")
    return paths


def _check_output(output: Path, overwrite: bool, num_samples: int) -> None:
    if output.exists() and not overwrite:
        raise FileExistsError(f"--output {output} exists: choose another name, or give --overwrite to replace it.")
    if not output.resolve().parent.is_dir():
        raise FileNotFoundError(f"--output {output} lies in a folder that does not exist: make it first.")
    if num_samples < 1:
        raise ValueError(f"--num_samples={num_samples} is below 1; 1,000 to 10,000 do.")


def _check_same(first: dict[str, Any], other: dict[str, Any], first_path: Path, path: Path) -> None:
    """Raise if two checkpoints belong to different models, also if their layers have the same shapes."""
    ours, theirs = first["state_dict"], other["state_dict"]
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            has, lacks = (path, first_path) if name in theirs else (first_path, path)
            raise ValueError(f"{path} is of another model than {first_path}: {has} has {name!r}, and {lacks} has not.")
        for file, value in ((first_path, ours[name]), (path, theirs[name])):
            if not isinstance(value, Tensor):
                raise ValueError(f"{file}: {name!r} is of type {type(value).__name__}. Only tensors can be averaged.")
        shapes = tuple(theirs[name].shape), tuple(ours[name].shape)
        if shapes[0] != shapes[1] or _is_averaged(theirs[name]) != _is_averaged(ours[name]):
            raise ValueError(
                f"{path} is of another model than {first_path}: {name!r} is {theirs[name].dtype} of shape {shapes[0]} "
                f"there, and {ours[name].dtype} of shape {shapes[1]} here."
            )
    require_same_classes(first, other, str(first_path), str(path))
    for key in ("model", "model_args"):
        settings = [content.get("hyper_parameters", {}).get(key) for content in (first, other)]
        if settings[0] != settings[1]:
            raise ValueError(
                f"{path} is of another model than {first_path}: {key} is {settings[1]}, not {settings[0]}."
            )


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_mask(name: str, state: State) -> bool:
    """Return whether a tensor is the mask of a weight that ``torch.nn.utils.prune`` has pruned."""
    original, mask = PRUNED_WEIGHT
    return name.endswith(mask) and f"{name.removesuffix(mask)}{original}" in state


def _not_averaged(module: nn.Module) -> list[str]:
    """Return the names of the floating-point buffers that are no running statistics of a norm layer."""
    return [
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules(remove_duplicate=False)
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
        if _is_averaged(buffer) and not is_statistic(owner, name)
    ]


def _module(path: Path, content: dict[str, Any], needed: bool) -> LightningModule | None:
    """Return the module of a checkpoint, to find its buffers. Classes are imported only if needed for more."""
    imported = class_path_in(content.get("hyper_parameters", {})).rpartition(".")[0] in sys.modules
    try:
        return module_of(path) if needed or imported else None
    except Exception as error:  # classes that are built differently raise any exception
        if needed:
            raise
        log.info("%s cannot be rebuilt (%s): set --module to distinguish its buffers from its parameters", path, error)
        return None


def _guessed(state: State, first: State) -> list[str]:
    """Return the names of changed tensors whose names belong to neither parameters nor statistics."""
    known = re.compile(r"(weight|bias|running_(mean|var)|original\d?|_orig|_[uvg])$")
    return [name for name, value in state.items() if not known.search(name) and not torch.equal(value, first[name])]
