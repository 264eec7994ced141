"""Compile: run the layers of a module as compiled graphs, in training and in validation (Ansel et al., 2024).

One caveat: compiling takes minutes, for the first steps and again for each new batch shape. Set ``drop_last=True``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from lit_tricks._compat import COMPILED_CALL, call_of, compiled_call_of, is_compiled_by_lightning, is_optimized_module
from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.arguments import choice, flag, invalid, text, texts

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Compile"]

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(Trick):
    """Compile the network with ``torch.compile``, without changing its parameter names ([Ansel et al., 2024](https://doi.org/10.1145/3620665.3640366)).

    Each network in the module runs through ``torch.compile``, in training and in the validation of the fit. Parameters
    keep their names, so checkpoints load anywhere. After the fit the network runs as before. Losses, metrics and the
    module's own steps are not compiled.

    Cost: one to several minutes at the start. The saving depends on network and device, so measure it. Use it for long
    runs with batches of one shape. Leave it out while you debug.

    Args:
        mode: "default"; "reduce-overhead" for small batches (CUDA graphs); "max-autotune" searches kernels for longer;
            "max-autotune-no-cudagraphs" does the same with less memory.
        layers: patterns of module names to compile, such as ``["model"]`` or ``["backbone.layer?"]``. None compiles
            each child of the module that has parameters.
        backend: backend of ``torch.compile``: "inductor", or another installed one. "eager" traces without compiling.
        dynamic: whether shapes are symbolic from the start. None lets torch find the shapes that change. False never
            uses symbols.
        fullgraph: whether code that cannot be compiled raises an error. False runs such code as it is.

    Raises:
        ValueError: for an unknown mode or backend, or an empty list of layers.
        RuntimeError: when training starts, if no layer matches or one is compiled already; in the first training step,
            if no compiled layer was called.

    Example:
        ``- {class_path: Compile, init_args: {mode: default}}``
    """

    def __init__(
        self,
        mode: Mode = "default",
        layers: Sequence[str] | None = None,
        backend: str = "inductor",
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        self.mode: str = choice(self, "mode", mode, get_args(Mode))
        self.layers: list[str] | None = texts(
            self, "layers", layers, "Name modules by patterns, as ['model'].", or_none="all networks"
        )
        self.backend: str = text(self, "backend", backend, "Name a backend of torch.compile, such as 'inductor'.")
        self.dynamic: bool | None = None if dynamic is None else flag(self, "dynamic", dynamic)
        self.fullgraph: bool = flag(self, "fullgraph", fullgraph)
        self._count = 0
        self._ran = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile, when all others have put around the layers what they put around them.

        Raises:
            RuntimeError: if there is nothing to compile, or it is compiled already.
            ValueError: if the backend is unknown.
        """
        backends = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in backends:  # not in `__init__`: the list takes seconds to import
            raise invalid(self, f"the backend must be one of {', '.join(backends)}.", backend=self.backend)
        who = type(pl_module).__name__
        found = dict(_networks(pl_module)) if self.layers is None else _named(pl_module, self.layers)
        if not found:
            raise RuntimeError(
                f"Compile found no layers like {self.layers or 'networks with weights'} in {who}: name them."
            )
        inside = [part for layer in found.values() for part in layer.modules()]
        if is_compiled_by_lightning(pl_module) or any(map(_is_compiled, inside)):
            raise RuntimeError(f"Compile: {who}, or a part of it, is compiled already. Remove one of the two.")
        for layer in found.values():
            compiled = torch.compile(
                _call_of(layer), mode=self.mode, backend=self.backend, dynamic=self.dynamic, fullgraph=self.fullgraph
            )
            # nn.Module.compile sets the same attribute, and would not restore it.
            self.wrap(layer, COMPILED_CALL, partial(self._run, compiled))
        self._count, self._ran = len(found), False
        self.announce(f"{', '.join(found)} by {self.backend}, mode {self.mode}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the number of compiled layers.

        Raises:
            RuntimeError: if none of them has run.
        """
        if not self._ran:
            raise RuntimeError(
                f"Compile has no effect: in the first training step of {type(pl_module).__name__}, none of the layers "
                "was called. Name those that are, as Compile(layers=['model.backbone'])."
            )
        if self.should_log(trainer):
            pl_module.log("compile/layers", float(self._count))

    def _run(self, compiled: Callable[..., Any], _: None, *args: Any, **kwargs: Any) -> Any:
        self._ran = True
        return compiled(*args, **kwargs)


def _call_of(layer: nn.Module) -> Callable[..., Any]:
    """Return a function that calls the layer: older torch does not compile a call that stays within torch.nn."""
    call_impl = call_of(layer)

    def call(*args: Any, **kwargs: Any) -> Any:
        return call_impl(*args, **kwargs)

    return call


def _networks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that can be called and have weights, by name."""
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:  # a list or a dictionary of modules
            yield from _networks(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name, child


def _named(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    parts = {name: part for name, part in module.named_modules() if name}
    return {name: part for name, part in parts.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def _is_compiled(module: nn.Module) -> bool:
    return is_optimized_module(module) or compiled_call_of(module) is not None
