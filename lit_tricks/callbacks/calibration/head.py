"""The layers whose weights scale the logits, and their scaling in a module and in a state dict."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_tricks.utils.dtensor import is_sharded, part_for, reshard, to_local
from lit_tricks.utils.modules import find_classifier, has_matrix, own_parameter

__all__ = ["Head", "Scaling", "heads_of", "scaled_state"]


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


class Head:
    """The linear layers or convolutions that give the logits, in most networks one.

    Args:
        module: module that contains the layers.
        names: names of the layers.
    """

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
    def has_bias(self) -> bool:
        """Return whether all layers have a bias."""
        return len(self._parameters) == 2 * len(self.names)

    @property
    def is_half(self) -> bool:
        """Return whether the weights have 16 bits, which round unless the factor is a power of two."""
        return any(torch.finfo(parameter.dtype).bits < 32 for parameter in self.parameters.values())

    def write(self, scaling: Scaling) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """Scale the layers.

        Returns:
            Per parameter its name, its memory, and copies of its value before and after.
        """
        written = []
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self.parameters.items():
                memory = to_local(parameter.detach())
                before = memory.clone()
                memory.copy_(self._scaled(name, parameter, scaling))
                written.append((name, memory, before, memory.clone()))
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
                for _, memory, before, _ in written:
                    memory.copy_(before)

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


def scaled_state(state: Mapping[str, Tensor], layers: Collection[str], scaling: Scaling) -> dict[str, Tensor]:
    """Return a state dict with scaled layers.

    Args:
        state: weights by name.
        layers: names of the layers.
        scaling: factors and offsets of the logits.

    Raises:
        KeyError: if the state dict lacks a layer.
    """
    scaled = dict(state)
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        scaled[f"{prefix}weight"] = scaling.weight(state[f"{prefix}weight"])
        if f"{prefix}bias" in state:
            scaled[f"{prefix}bias"] = scaling.bias(state[f"{prefix}bias"])
    return scaled


def heads_of(module: nn.Module, name: str | None, classes: int) -> Iterator[Head]:
    """Yield the layers that may give the logits, the most likely ones first.

    They are the named module's, or those that ``find_classifier`` finds. Then follow other layers with as many outputs
    as there are classes, the last one first. Layers with shared or parametrized weights are left out.

    Args:
        module: module with the layers.
        name: name of the module that gives the logits, if known.
        classes: number of logits.
    """
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
