"""Record logits and labels in a validation, and the inputs of the images that are nearest to a tie of two classes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_tricks._compat import (
    callbacks_of,
    compiled_call_of,
    is_compiled_by_lightning,
    is_optimized_module,
    leaves,
)
from lit_tricks.callbacks.base import unwrapped
from lit_tricks.utils.batch import describe, find
from lit_tricks.utils.logit_scaling import LogitScaling
from lit_tricks.utils.modules import batchnorms_of, find_classifier
from lit_tricks.utils.processes import world_size

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Recorder", "labels_for", "record"]

KEPT = 16  # images whose inputs are kept
PIXELS = 256  # of a dense target that are recorded, at most
SUMS = 1e-3  # distance of the sum of probabilities from 1


class Recorder:
    """Records what a module outputs for the images of a validation in this process.

    The logits are the output of ``forward`` of the LightningModule, or of the outermost module around the classifier
    that is called and outputs logits. Log-probabilities and probabilities (N, K) are recognized too.

    Args:
        pl_module: the LightningModule.
        classifier: name of the layer that likely gives the logits, or "".
        who: class with its argument, for messages.
        dataset: data set of the first loader.
        rank: number of the process.
        replicas: number of processes.
        averaging: the callback that averages predictions over views of an image, if there is one.
    """

    def __init__(
        self,
        pl_module: nn.Module,
        classifier: str,
        who: str,
        dataset: Any,
        rank: int,
        replicas: int,
        averaging: Any = None,
    ) -> None:
        self.pl_module: nn.Module = pl_module
        self.who: str = who
        self.dataset: Any = dataset
        self.rank: int = rank
        self.replicas: int = replicas
        self.source: nn.Module | None = None  # the module that outputs the logits
        self.are_probabilities: bool = False
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.views: list[Tensor] = []  # logits (V, N, K) of the views, if predictions are means over views
        self.averaging: Any = averaging
        if averaging is not None:
            averaging.recorded = []
        self._seen = 0
        self._calls: dict[int, tuple[Any, Any, Tensor]] = {}  # first call of each module in this step
        self._ties: list[tuple[float, list[Any], dict[str, Any]]] = []
        parts = classifier.split(".") if classifier else []
        paths = [".".join(parts[:i]) for i in range(len(parts) + 1)]
        # a hook on a compiled module would be compiled too
        self._modules = [part for part in map(pl_module.get_submodule, paths) if compiled_call_of(part) is None]
        if pl_module not in self._modules:
            self._modules.insert(0, pl_module)
        # a mode would compile modules again
        whole: Any = pl_module
        parts_compiled = [compiled_call_of(part) or is_optimized_module(part) for part in pl_module.modules()]
        is_compiled = is_compiled_by_lightning(whole) or any(parts_compiled)
        self._losses: _LossInputs | None = None if is_compiled else _LossInputs()
        self._own_statistics = _statistics_of_first(pl_module) if world_size() > 1 else []
        self._handles = [
            part.register_forward_hook(self._note_of(place), with_kwargs=True)
            for place, part in enumerate(self._modules)
        ]

    def _note_of(self, place: int) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() >= 2 and output.is_floating_point():
                self._calls.setdefault(place, (args, kwargs, output.detach()))

        return note

    def begin(self) -> None:
        """Note what the losses of the first batch get, before its step."""
        if self._losses is not None and not self._seen:
            self._losses.start()

    def close(self) -> None:
        """Remove the hooks, and drop all but the inputs nearest to a tie."""
        if self._losses is not None:
            self._losses.stop()
        self.logits, self.labels, self.views = [], [], []
        if self.averaging is not None:
            self.averaging.recorded = None
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], {}
        with torch.inference_mode(False), torch.no_grad():
            for buffer, value in self._own_statistics:
                buffer.copy_(value)
        self._own_statistics = []

    def add(self, batch: Any) -> None:
        """Record the outputs for a batch, after its step.

        Raises:
            RuntimeError: if the batch has no single label per image or pixel, or no output fits the labels.
        """
        calls, self._calls = self._calls, {}
        if self._losses is not None:
            self._losses.stop()
        views: list[Tensor] = []
        if self.averaging is not None:
            views, self.averaging.recorded = self.averaging.recorded[:1], []
        _, _, labels = find(batch, self.who)
        if labels.is_floating_point() or (labels.dim() == 2 and labels.size(1) > 1):
            raise RuntimeError(
                f"{self.who} fits a softmax to one label per image, and the batch has several labels per image, "
                f"{describe(labels)}. Leave it out: sigmoids need a temperature of another kind."
            )
        others: list[str] = []
        for place in sorted(calls):
            args, kwargs, output = calls[place]
            target = labels_for(labels, output)
            if target is not None and self._losses is not None and not self._losses.may_get(output):
                others.append(describe(output))
            elif target is not None:
                self._add(self._modules[place], args, kwargs, output, target, views[0] if views else None)
                return
        if others:
            raise RuntimeError(
                f"{self.who}: validation_step of {type(self.pl_module).__name__} computes its loss from other outputs "
                f"than {', '.join(others)}, with another number of classes. Let `forward` return the logits, and call "
                'it in validation_step; or name the layer that gives them, as classifier="model.fc".'
            )
        shapes = ", ".join(describe(output) for _, _, output in calls.values()) or "no output"
        one = any(output.size(-1) == 1 for _, _, output in calls.values())
        remedy = (
            "A single logit has no softmax: output two."
            if one
            else "Let `forward` return logits (N, K), and call it in validation_step; or name the layer that gives "
            'them, as classifier="model.fc".'
        )
        raise RuntimeError(
            f"{self.who} found no logits for the labels {describe(labels)} in validation_step of "
            f"{type(self.pl_module).__name__}, but {shapes}. {remedy}"
        )

    def _add(
        self, source: nn.Module, args: Any, kwargs: Any, output: Tensor, labels: Tensor, views: Tensor | None
    ) -> None:
        places = torch.arange(self._seen, self._seen + len(labels)) * self.replicas + self.rank
        self._seen += len(labels)
        if self.source is None:
            self.source = source
            sums = output.float().sum(1)
            self.are_probabilities = bool(((output >= 0).all() & ((sums - 1).abs() < SUMS).all()).item())
        logits = self.logs(output)
        # a sampler repeats some images, so that all processes have as many
        known = len(self.dataset) if self.replicas > 1 and hasattr(self.dataset, "__len__") else math.inf
        once = (places < known).to(output.device)
        self._keep_ties(args, kwargs, logits if views is None else views[0].float())
        targets = _samples(labels[:, None], once)[:, 0]
        rows = _samples(logits, once)
        valid = (targets >= 0) & (targets < rows.size(1))  # an ignored label is no class
        self.logits.append(rows[valid].cpu())
        self.labels.append(targets[valid].long().cpu())
        if views is not None:
            self.views.append(torch.stack([_samples(view.float(), once)[valid].cpu() for view in views]))

    def logs(self, output: Tensor) -> Tensor:
        """Return an output as logits in float32: logarithms of probabilities, and other outputs as they are."""
        output = output.float()
        return output.clamp_min(1e-38).log() if self.are_probabilities else output

    def _keep_ties(self, args: Any, kwargs: Any, logits: Tensor) -> None:
        """Keep the inputs of the images whose first two classes are closest."""
        top = logits.topk(2, 1).values
        number = len(logits)
        gaps = (top[:, 0] - top[:, 1]) / logits.abs().amax(1).clamp_min(1e-30)
        gaps = gaps.reshape(number, -1).amin(1)
        least, where = gaps.topk(min(KEPT, number), largest=False)
        for gap, i in zip(least.tolist(), where.tolist(), strict=True):
            if len(self._ties) < KEPT or gap < self._ties[-1][0]:
                row = [_row(arg, i, number) for arg in args], {k: _row(arg, i, number) for k, arg in kwargs.items()}
                self._ties.append((gap, *row))
        self._ties = sorted(self._ties, key=lambda tie: tie[0])[:KEPT]

    def rerun(self, like: Tensor) -> Tensor:
        """Return the outputs for the kept images, from the module's current weights, in their precision.

        Args:
            like: a weight. Floating-point inputs get its type and device.
        """
        assert self.source is not None
        first = _shapes(self._ties[0][1:])
        ties = [tie[1:] for tie in self._ties if _shapes(tie[1:]) == first]
        args = [_joined(values, like) for values in zip(*(tie[0] for tie in ties), strict=True)]
        kwargs = {key: _joined([tie[1][key] for tie in ties], like) for key in ties[0][1]}
        autocast = torch.autocast(like.device.type, enabled=False)
        eager = torch.compiler.set_stance("force_eager")  # other sizes would compile again
        with torch.no_grad(), autocast, eager, self._single_views():
            output: Tensor = self.source(*args, **kwargs)
        self._calls = {}
        return output

    def _single_views(self) -> contextlib.AbstractContextManager[None]:
        """Evaluate images by themselves for a while, and not the mean over their views."""
        if self.averaging is None:
            return contextlib.nullcontext()
        return unwrapped(self.pl_module.get_submodule(self.averaging.layer or ""), "forward")


class _LossInputs(TorchFunctionMode):
    """Keeps the shapes of what cross entropies get."""

    def __init__(self) -> None:
        super().__init__()
        self._entered = contextlib.ExitStack()
        self._shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.cross_entropy, F.nll_loss):
            self._shapes.append((args[0] if args else kwargs["input"]).shape)
        return func(*args, **kwargs)

    def start(self) -> None:
        self.stop()
        self._entered.enter_context(self)

    def stop(self) -> None:
        self._entered.close()

    def may_get(self, output: Tensor) -> bool:
        """Return whether a loss for as many images got as many classes, or no loss got as many images."""
        classes = {shape[1] for shape in self._shapes if len(shape) > 1 and shape[0] == len(output)}
        return not classes or output.size(1) in classes


def record(trainer: Trainer, pl_module: LightningModule, classifier: str | None, who: str) -> Recorder:
    """Return a recorder of the validation that starts now.

    Args:
        trainer: the Trainer, with its validation loaders.
        pl_module: its module.
        classifier: name of the layer that gives the logits, if known.
        who: class or command, for messages.

    Raises:
        RuntimeError: if there is no module of this name.
    """
    parts = dict(pl_module.named_modules())
    if classifier is not None and classifier not in parts:
        children = ", ".join(child for child, _ in pl_module.named_children())
        name = type(pl_module).__name__
        raise RuntimeError(f"{who}: classifier={classifier!r}: {name} has no such module. Its parts are {children}.")
    found: list[str] = [classifier] if classifier else []
    if classifier is None:
        with contextlib.suppress(RuntimeError):  # there is no such layer
            found = list(find_classifier(pl_module))
        found = found or [path for path, part in parts.items() if isinstance(part, LogitScaling)]
    loaders = leaves(trainer.val_dataloaders)
    dataset = getattr(loaders[0], "dataset", None) if loaders else None
    averaging: Any = next((each for each in callbacks_of(trainer) if getattr(each, "averages_views", False)), None)
    if getattr(averaging, "activation", "softmax") != "softmax":
        raise RuntimeError(
            f"{who} fits a softmax, and {type(averaging).__name__}(activation='{averaging.activation}') averages "
            "sigmoids, which need a temperature of another kind: leave one of the two out."
        )
    classifier, rank, number = found[0] if found else "", trainer.global_rank, trainer.world_size
    return Recorder(pl_module, classifier, who, dataset, rank, number, averaging)


def _statistics_of_first(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy the BatchNorm statistics of the first process, which are saved, to the others. Return buffers and values."""
    layers: dict[int, Any] = {id(layer): layer for layer in batchnorms_of(module).values()}
    buffers = [buffer for layer in layers.values() for buffer in (layer.running_mean, layer.running_var)]
    with torch.inference_mode(False), torch.no_grad():
        own = [(buffer, buffer.clone()) for buffer in buffers]
        for buffer in buffers:
            torch.distributed.broadcast(buffer, 0)
    return own


def labels_for(labels: Tensor, output: Tensor) -> Tensor | None:
    """Return the labels in the form (N,) or (N, H, W) of an output (N, K) or (N, K, H, W), or None if they differ."""
    if labels.dim() in (2, 4) and labels.size(1) == 1:
        labels = labels[:, 0]
    fits = output.dim() in (2, 4) and output.size(1) > 1 and labels.shape == (output.size(0), *output.shape[2:])
    return labels if fits else None


def _samples(values: Tensor, once: Tensor) -> Tensor:
    """Return values (N, K) or (N, K, H, W) of some images as rows (n, K), of some of their pixels."""
    rows = values[once]
    if rows.dim() > 2:
        chosen = spread(math.prod(rows.shape[2:]), rows.size(-1)).to(rows.device)
        rows = rows.flatten(2)[..., chosen].transpose(1, 2).flatten(0, 1)
    return rows


def spread(number: int, width: int) -> Tensor:
    """Return up to 256 places that are spread over a map, and over its columns."""
    step = max(1, math.ceil(number / PIXELS))
    while step > 1 and math.gcd(step, width) > 1:
        step += 1
    return torch.arange(0, number, step)


def _row(value: Any, place: int, number: int) -> Any:
    is_row = isinstance(value, Tensor) and value.dim() > 0 and len(value) == number
    return _Row(value[place : place + 1].detach().clone()) if is_row else value


class _Row:
    """The part of an input that belongs to one image."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _shapes(tie: Any) -> list[Any]:
    values: Iterable[Any] = [*tie[0], *tie[1].values()]
    return [value.value.shape if isinstance(value, _Row) else None for value in values]


def _joined(values: Any, like: Tensor) -> Any:
    if not all(isinstance(value, _Row) for value in values):
        return values[0]
    joined = torch.cat([value.value for value in values]).to(like.device)
    return joined.to(like.dtype) if joined.is_floating_point() else joined
