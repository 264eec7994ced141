"""The layers that scale the logits, by their weights or by buffers, and their scaling in a module and a state dict."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_tricks.callbacks.calibration.scaling import CHUNK, mean_of_views
from lit_tricks.utils.dtensor import is_sharded, part_for, reshard, to_local
from lit_tricks.utils.logit_scaling import LogitScaling
from lit_tricks.utils.modules import find_classifier, has_matrix, own_parameter

__all__ = ["Head", "Scaling", "Written", "head_at", "heads_of", "scaled_state"]


@dataclass(frozen=True)
class Scaling:
    """Factors and offsets of logits: ``factor * logit + offset``.

    Args:
        factors: one number, or one per class.
        offsets: one number per class, or none.
    """

    factors: tuple[float, ...]
    offsets: tuple[float, ...] = ()

    @classmethod
    def of(cls, temperatures: Collection[float], offsets: Collection[float] = ()) -> Scaling:
        """Return the scaling by temperatures."""
        return cls(tuple(1 / temperature for temperature in temperatures), tuple(offsets))

    def applied(self, logits: Tensor) -> Tensor:
        """Return scaled logits (N, K) or (N, K, ...), in float64."""
        shape = (1, -1) + (1,) * (logits.dim() - 2)
        scaled = logits.double() * torch.tensor(self.factors, dtype=torch.float64, device=logits.device).view(shape)
        if self.offsets:
            scaled += torch.tensor(self.offsets, dtype=torch.float64, device=logits.device).view(shape)
        return scaled

    def predicted(self, logits: Tensor) -> Tensor:
        """Return logits (N, K) of the prediction, in float64, with logits (N, K), or (V, N, K) of views to average."""
        if logits.dim() == 2:
            return self.applied(logits)
        parts = torch.split(logits, max(1, CHUNK // (len(logits) * logits.size(2))), dim=1)
        scaled = (self.applied(part.flatten(0, 1)).view(part.shape) for part in parts)
        return torch.cat([mean_of_views(part) for part in scaled])

    def weight(self, value: Tensor) -> Tensor:
        """Return a scaled weight (K, ...), rounded once."""
        factors = torch.tensor(self.factors, dtype=torch.float64)
        return (value.cpu().double() * factors.view(-1, *[1] * (value.dim() - 1))).to(value.dtype).to(value.device)

    def bias(self, value: Tensor) -> Tensor:
        """Return a scaled bias (K,), rounded once."""
        scaled = value.cpu().double() * torch.tensor(self.factors, dtype=torch.float64)
        if self.offsets:
            scaled += torch.tensor(self.offsets, dtype=torch.float64)
        return scaled.to(value.dtype).to(value.device)


@dataclass
class Written:
    """A tensor of a module that was scaled.

    Args:
        name: its name in the ``state_dict``.
        memory: memory of a parameter; None for a buffer, which is replaced.
        before: copy of its value before. None if there was no buffer.
        after: copy of its value after.
    """

    name: str
    memory: Tensor | None
    before: Tensor | None
    after: Tensor

    def current(self, module: nn.Module) -> Tensor | None:
        """Return the current tensor of this name."""
        if self.memory is None:
            layer, _, name = self.name.rpartition(".")
            found: Tensor | None = getattr(module.get_submodule(layer), name)
            return found
        return module.get_parameter(self.name)

    def is_in(self, tensor: Tensor | None) -> bool:
        """Return whether a tensor has the scaled value."""
        return tensor is not None and torch.equal(tensor, self.after.to(tensor.device))

    def restore(self, module: nn.Module) -> None:
        """Restore the value before."""
        if self.memory is None:
            _set_buffer(module, self.name, self.before)
        elif self.before is not None:
            self.memory.copy_(self.before)

    def undo(self, module: nn.Module) -> None:
        """Restore the value before, where the scaled value still is.

        Averaged weights are swapped by exchanging pointers, so the scaled memory may belong to an average by now.
        """
        current = self.current(module)
        if self.memory is None or self.before is None:
            if self.is_in(current):
                self.restore(module)
            return
        for where in (to_local(current.detach()) if current is not None else None, self.memory):
            if where is not None and self.is_in(where):
                where.copy_(self.before)


class Head:
    """The layers that give the logits, in most networks one: linear layers or convolutions, or a LogitScaling.

    Args:
        module: module that contains the layers.
        names: names of the layers.
    """

    is_buffer = False
    """Buffers scale the logits, and not weights."""

    def __init__(self, module: nn.Module, names: Collection[str]) -> None:
        self.module: nn.Module = module
        self.names: list[str] = list(names)
        self._parameters = [
            f"{name}.{kind}".lstrip(".")
            for name in self.names
            for kind in ("weight", "bias")
            if own_parameter(module.get_submodule(name), kind) is not None
        ]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, sharded where they are: FSDP2 shows others after a forward pass."""
        reshard(self.module)
        return {name: self.module.get_parameter(name) for name in self._parameters}

    @property
    def like(self) -> Tensor:
        """Return a weight, with the type and device of inputs."""
        return next(iter(self.parameters.values()))

    @property
    def has_bias(self) -> bool:
        """Return whether all layers have a bias."""
        return len(self._parameters) == 2 * len(self.names)

    @property
    def is_half(self) -> bool:
        """Return whether the weights have 16 bits, which round unless the factor is a power of two."""
        return any(torch.finfo(parameter.dtype).bits < 32 for parameter in self.parameters.values())

    def write(self, scaling: Scaling) -> list[Written]:
        """Scale the layers."""
        written = []
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self.parameters.items():
                memory = to_local(parameter.detach())
                before = memory.clone()
                memory.copy_(self._scaled(name, parameter, scaling))
                written.append(Written(name, memory, before, memory.clone()))
        return written

    @contextlib.contextmanager
    def scaled(self, scaling: Scaling) -> Iterator[None]:
        """Scale the layers for a while."""
        written = self.write(scaling)
        try:
            yield
        finally:
            reshard(self.module)
            with torch.inference_mode(False), torch.no_grad():
                for each in written:
                    each.restore(self.module)

    def _scaled(self, name: str, parameter: nn.Parameter, scaling: Scaling) -> Tensor:
        is_bias = name.endswith("bias")
        if not is_sharded(parameter):
            return (scaling.bias if is_bias else scaling.weight)(parameter.detach())
        local = to_local(parameter.detach())
        ones = torch.ones(parameter.shape, dtype=torch.float64)
        value = local.double() * part_for(parameter, Scaling(scaling.factors).weight(ones))
        if is_bias and scaling.offsets:
            value += part_for(parameter, torch.tensor(scaling.offsets, dtype=torch.float64))
        return value.to(local.dtype)


class _BufferHead(Head):
    """A LogitScaling, which scales the logits by its buffers."""

    is_buffer = True
    has_bias = True
    is_half = False

    @property
    def like(self) -> Tensor:
        """Return a weight of the module."""
        reshard(self.module)
        floats = (parameter for parameter in self.module.parameters() if parameter.is_floating_point())
        return next(floats, torch.zeros(()))

    def write(self, scaling: Scaling) -> list[Written]:
        """Replace the buffers."""
        [layer], written, device = self.names, [], self.like.device
        prefix = f"{layer}." if layer else ""
        state = {f"{prefix}{name}": buffer for name, buffer in self.module.get_submodule(layer).named_buffers()}
        for name, after in _scaled_buffers(state, layer, scaling).items():
            _set_buffer(self.module, name, after.to(device))
            written.append(Written(name, None, state.get(name), after))
        return written


def head_at(module: nn.Module, names: Collection[str]) -> Head:
    """Return the head of these layers."""
    is_buffer = any(isinstance(module.get_submodule(name), LogitScaling) for name in names)
    return (_BufferHead if is_buffer else Head)(module, names)


def _set_buffer(module: nn.Module, path: str, value: Tensor | None) -> None:
    layer, _, name = path.rpartition(".")
    setattr(module.get_submodule(layer), name, value)


def _scaled_buffers(state: Mapping[str, Tensor], layer: str, scaling: Scaling) -> dict[str, Tensor]:
    """Return the buffers of a LogitScaling, scaled further, by their names in the ``state_dict``."""
    factors, offsets = (f"{layer}.{name}".lstrip(".") for name in ("factors", "offsets"))
    old = state.get(factors, torch.ones(1)).cpu().double()
    found = {factors: (old * torch.tensor(scaling.factors, dtype=torch.float64)).float()}
    if scaling.offsets or offsets in state:
        old = state.get(offsets, torch.zeros(1)).cpu().double() * torch.tensor(scaling.factors, dtype=torch.float64)
        found[offsets] = (old + torch.tensor(scaling.offsets or (0.0,), dtype=torch.float64)).float()
    return found


def scaled_state(
    state: Mapping[str, Tensor], layers: Collection[str], scaling: Scaling, is_buffer: bool = False
) -> dict[str, Tensor]:
    """Return a state dict with scaled layers.

    Args:
        state: weights by name.
        layers: names of the layers.
        scaling: factors and offsets of the logits.
        is_buffer: whether the layer is a LogitScaling.

    Raises:
        KeyError: if the state dict lacks a layer.
    """
    scaled = dict(state)
    if is_buffer:
        [layer] = layers
        return scaled | _scaled_buffers(state, layer, scaling)
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        scaled[f"{prefix}weight"] = scaling.weight(state[f"{prefix}weight"])
        if f"{prefix}bias" in state:
            scaled[f"{prefix}bias"] = scaling.bias(state[f"{prefix}bias"])
    return scaled


def heads_of(module: nn.Module, name: str | None, classes: int) -> Iterator[Head]:
    """Yield the layers that may give the logits, the most likely ones first.

    They are the named module's, or those that ``find_classifier`` finds. Then follow other layers with as many outputs
    as there are classes, the last one first, and modules of the class LogitScaling. Layers with shared or parametrized
    weights are left out.

    Args:
        module: module with the layers.
        name: name of the module that gives the logits, if known.
        classes: number of logits.
    """
    if isinstance(dict(module.named_modules()).get(name or ""), LogitScaling):
        yield head_at(module, [name or ""])
        return
    reshard(module)
    owners: dict[int, list[str]] = {}
    for path, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    layers = {path: part for path, part in module.named_modules() if has_matrix(part)}
    usable = []
    for path, part in layers.items():
        own = [own_parameter(part, kind) for kind in ("weight", "bias")]
        is_plain = own[0] is not None and own[0].shape[0] == classes and (own[1] is None) == (part.bias is None)
        if is_plain and all(len(owners[id(each)]) == 1 for each in own if each is not None):
            usable.append(path)
    found: dict[str, nn.Module] = {}
    with contextlib.suppress(RuntimeError):  # nothing is trained, or there is no such layer
        found = find_classifier(module, name)
    names = []
    for path in found:
        inside = [each for each in usable if each == path or each.startswith(f"{path}." if path else "")]
        names += inside[-1:]  # a head of timm may have norm layers and further matrices
    if found and len(names) == len(found):
        yield Head(module, names)
    if name is None:
        for path in reversed(usable):
            if [path] != names:
                yield Head(module, [path])
        for path, part in module.named_modules():
            if isinstance(part, LogitScaling):
                yield head_at(module, [path])
