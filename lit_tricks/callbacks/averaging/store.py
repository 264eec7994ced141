"""The store of averaged weights of EMA and SWA: a running average, and its swap with the weights.

One caveat: the swap exchanges the tensors' memory. A captured CUDA graph would still read the old memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_tricks._compat import foreach_copy_, foreach_lerp_
from lit_tricks.callbacks.averaging.bf16_split import join, remainder_of, round_to
from lit_tricks.utils.dtensor import full_tensor, is_sharded, part_for, reshard, shard_like, to_local
from lit_tricks.utils.modes import Modes
from lit_tricks.utils.modules import is_statistic, some_of
from lit_tricks.utils.processes import world_size
from lit_tricks.utils.spectral_norm import spectral_norms

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """A running average of the weights of a module, in fp32 (fp64 for fp64).

    The average covers parameters and running statistics of norm layers. Shared tensors are averaged once. All other
    buffers are copied from the module. The vectors of spectral norms are computed for the averaged weights. Sharded
    parameters (DTensor) are averaged shard by shard.

    Args:
        module: the module, on its final device, in its final precision, after sharding.
        buffers: which floating-point buffers are averaged: "statistics" of norm layers, all ("average"), or none
            ("copy").
        on_cpu: store the average on the CPU. An update copies the weights asynchronously, and averages them when the
            copy is complete, at the latest before the next update.

    Attributes:
        names: names of the averaged tensors.
        swapped: whether the average is swapped into the module.
    """

    def __init__(self, module: nn.Module, buffers: str = "statistics", on_cpu: bool = False) -> None:
        self._module = module
        self._on_cpu = on_cpu
        reshard(self._module)
        self._params = {name: param for name, param in module.named_parameters() if _is_averaged(param)}
        floating = {  # by owner, since modules replace their buffers by new tensors
            f"{path}.{name}" if path else name: (owner, name)
            for path, owner in module.named_modules()
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False)
            if _is_averaged(buffer)
        }
        self._norms = spectral_norms(module)
        vectors = {vector for norm in self._norms for vector in (norm.u, norm.v)}
        is_statistics = {name: is_statistic(*buffer) for name, buffer in floating.items() if buffer not in vectors}
        averaged = [
            name for name, is_one in is_statistics.items() if buffers == "average" or (is_one and buffers != "copy")
        ]
        averaged = _each_once(averaged, floating)
        self._buffers = {name: floating[name] for name in averaged}
        computed = [name for name, buffer in floating.items() if buffer in vectors]
        self._buffers |= {name: floating[name] for name in _each_once(computed, floating)}
        self.names: list[str] = [*self._params, *self._buffers]
        self._others = [self.names.index(name) for name in averaged if not is_statistics[name]]
        self._first_vector = len(self._params) + len(averaged)
        self._copied = [name for name in is_statistics if name not in self._buffers]
        self._modes = Modes(module)
        mergeable = set(self._modes.params)
        self._mergeable = {i for i, param in enumerate(self._params.values()) if param in mergeable}
        self.swapped: bool = False
        self._stale = True  # the vectors do not belong to the average
        self._sharded = any(map(is_sharded, self._params.values()))
        self._raw: list[Tensor] = []  # the trained weights, while the average is in the module
        self._left: tuple[list[int], list[int]] | None = None
        self._average = [_precise(to_local(tensor), on_cpu) for tensor in self._live()]
        self._arriving: list[Tensor] = []  # the weights of the last update, while they are copied to the CPU
        self._arrival: torch.cuda.Event | None = None
        self._share: float | None = None  # the share of these weights, until they are averaged
        if on_cpu:
            self._arriving = [_on_cpu(to_local(tensor.detach())) for tensor in self._live()]
        self._group()

    def describe_buffers(self) -> str:
        """Return which floating-point buffers are averaged, copied and computed, in words."""
        averaged, computed = self._first_vector - len(self._params), len(self.names) - self._first_vector
        parts = [f"{averaged} averaged"] if averaged else []
        parts += [f"{len(self._copied)} copied ({some_of(self._copied)})"] if self._copied else []
        parts += [f"{computed} computed (spectral norm)"] if computed else []
        return f"buffers: {', '.join(parts)}" if parts else ""

    def belongs_to(self, module: nn.Module) -> bool:
        """Return whether this is the average of the module in its current form."""
        params = [param for param in module.parameters() if _is_averaged(param)]
        return (
            module is self._module
            and len(params) == len(self._params)
            and all(map(lambda p, q: p is q, params, self._params.values()))
        )

    @torch.no_grad()
    def update(self, share: float) -> None:
        """Move the average: ``average += share * (weights - average)``. A share of 1 copies."""
        live = self._live() if not self._sharded else [to_local(tensor) for tensor in self._live()]
        self._modes.note()
        self._stale = True
        if not self._on_cpu:
            self._average_in(live, share)
            return
        self.finish()
        foreach_copy_(self._arriving, live, non_blocking=True)
        if any(tensor.is_cuda for tensor in live):
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()
        self._share = share

    @torch.no_grad()
    def finish(self) -> None:
        """Add the weights to the average that are still being copied to the CPU."""
        if self._share is None:
            return
        if self._arrival is not None:
            self._arrival.synchronize()
        share, self._share, self._arrival = self._share, None, None
        self._average_in(self._arriving, share)

    def _average_in(self, live: list[Tensor], share: float) -> None:
        for indices, averages in self._groups:
            tensors = [live[i] for i in indices]
            if share == 1:
                foreach_copy_(averages, tensors)
            else:
                foreach_lerp_(averages, tensors, share)
        for i in self._imprecise:
            average = self._average[i]
            average.lerp_(live[i].to(average.dtype), share)
        for i in self._others:  # a mask may hold an infinity, which has no mean with itself
            average, own = self._average[i], live[i].to(self._average[i].dtype)
            average.copy_(torch.where(own.isfinite() & average.isfinite(), average.lerp(own, share), own))

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Copy the average into the module, which has its trained weights. The average is not changed."""
        for i, tensor in enumerate(self._live()[: self._first_vector]):
            to_local(tensor).copy_(self._average[i])
        reshard(self._module)

    def sync(self, own: bool = False) -> None:
        """Copy the averaged buffers of the first process to all processes, as DDP does with a module's buffers.

        Args:
            own: whether to also copy the module's own buffers.
        """
        if not self._buffers or world_size() == 1:
            return
        self.finish()
        first = len(self._params)
        live = self._live()[first:]
        buffers = [*self._average[first:], *(live if own else [])]
        for dtype in {buffer.dtype for buffer in buffers}:
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1).to(live[0].device) for buffer in same])
            torch.distributed.broadcast(flat, 0)
            parts = torch.split(flat, [buffer.numel() for buffer in same])
            for buffer, part in zip(same, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def swap(self, to_average: bool) -> None:
        """Swap the average into the module, or swap it out, by exchanging pointers. Shards are copied.

        The swap needs the train/eval modes of training. Merged adapters are unmerged first, and stay unmerged.
        """
        if to_average == self.swapped:
            return
        self.finish()
        with torch.inference_mode(False), torch.no_grad():
            self._modes.restore()
            live, raw = self._live(), self._raw
            self._raw = []
            for i, tensor in enumerate(live):
                if self._sharded and is_sharded(tensor):
                    local = to_local(tensor)
                    self._raw += [local.clone()] if to_average else []
                    local.copy_(self._average[i] if to_average else raw[i])
                elif to_average:
                    self._raw.append(tensor.data)
                    self._show_average(i, tensor)
                else:
                    tensor.data = raw[i].to(tensor.device)
            self.swapped = to_average
            reshard(self._module)
            if to_average and self._stale:
                self._iterate(live)

    @contextlib.contextmanager
    def showing(self, average: bool) -> Iterator[None]:
        """Swap the average in, or out, for a while, in the modes of training and without merged adapters."""
        before, modes = self.swapped, None
        if not self._modes.are_current():
            modes = Modes(self._module)
            self._modes.restore()
            self._show_unmerged()  # merged and unmerged, they have been rounded
        self.swap(average)
        try:
            yield
        finally:
            self.swap(before)
            if modes:
                self._show_unmerged()  # for a state_dict refers to what was shown, and this is to be merged
                modes.restore()

    def _show_unmerged(self) -> None:
        for i, param in enumerate(self._params.values()):
            if self.swapped and i in self._mergeable and not is_sharded(param):
                self._show_average(i, param)

    def _show_average(self, i: int, tensor: Tensor) -> None:
        shown = round_to(self._average[i], tensor.dtype).to(tensor.device)  # itself, if nothing has to change
        tensor.data = shown.clone() if i in self._mergeable else shown

    def _iterate(self, live: list[Any]) -> None:
        """Compute the vectors of spectral norms for the weights that are in the module."""
        self._stale = False
        places = {vector: i for i, vector in enumerate(self._buffers.values(), start=len(self._params))}
        for norm in self._norms:
            for vector, value in zip((norm.u, norm.v), norm.vectors() or (), strict=False):
                if (i := places.get(vector)) is None:
                    continue  # another spectral norm has the same tensor
                self._average[i].copy_(value)
                live[i].copy_(round_to(self._average[i], live[i].dtype))

    @torch.no_grad()
    def state(self, shown: bool, saved: Collection[str], whole: bool = True) -> dict[str, dict[str, Tensor]]:
        """Return the parts of the trained weights (``raw``) and of the ``average`` that the module's state_dict lacks.

        | the state_dict contains | ``raw`` contains | ``average`` contains |
        |---|---|---|
        | own weights | - | all averages that differ from the own weights |
        | the average (``shown``) | own weights that differ from their average | averages that the state_dict rounds: of
          bf16 weights, the remainder in 16 bits; averages that it lacks |

        Args:
            shown: whether the state_dict contains the average.
            saved: names in the state_dict.
            whole: gather shards into the first process; the other processes return nothing.
        """
        self.finish()
        self._update_vectors()
        with self.showing(False):
            pairs = {
                name: (own, mean)
                for name, own, mean in zip(self.names, self._live(), self._average, strict=True)
                if is_sharded(own) or not torch.equal(own.to(mean), mean)
            }
            # the swap copies shards, so a view of a shard would change with it
            raw = {
                n: own.detach().clone() if is_sharded(own) else own.detach() for n, (own, _) in pairs.items() if shown
            }
            average = {
                name: shard_like(own, mean.to(own.device)) if is_sharded(own) else mean
                for name, (own, mean) in pairs.items()
                if not shown or own.dtype != mean.dtype or name not in saved
            }
            if self._sharded:
                return (
                    {"raw": _gathered(raw), "average": _gathered(average)}
                    if whole
                    else {"raw": raw, "average": average}
                )
            if shown:
                average = {n: _unsaved(mean, pairs[n][0].dtype) if n in saved else mean for n, mean in average.items()}
        return {"raw": raw, "average": average}

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """Return the averaged tensors by name, without vectors of spectral norms, which belong to the weights.

        Shards are gathered into the first process. The other processes return nothing.
        """
        self.finish()
        found = {
            name: shard_like(own, mean.to(own.device)) if is_sharded(own) else mean
            for name, own, mean in zip(self.names, self._live(), self._average, strict=True)
        }
        found = dict(list(found.items())[: self._first_vector])
        return _gathered(found) if self._sharded else found

    def _update_vectors(self) -> None:
        """Compute the vectors of spectral norms for the average, unless they are up to date."""
        if self._norms and self._stale:
            with self.showing(True):
                pass  # the swap computes them

    @torch.no_grad()
    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Load the result of ``state``, after the module has loaded the state_dict of the same checkpoint.

        Raises:
            RuntimeError: if the state belongs to another module.
        """
        if self.swapped:  # a tuner ran to the end of a fit within the fit, and then restored the module
            given = [to_local(tensor).clone() for tensor in self._live()]
            self.swap(False)
            for tensor, value in zip(self._live(), given, strict=True):
                to_local(tensor).copy_(value)
        self._share = self._arrival = None
        self._stale = True
        live: dict[str, Tensor] = dict(zip(self.names, self._live(), strict=True))
        averages = dict(zip(self.names, self._average, strict=True))
        others = {name: buffer for name, buffer in self._module.named_buffers() if name not in live}
        for name in [*state["average"], *state["raw"]]:
            if name not in live and name not in others:
                raise RuntimeError(
                    f"The checkpoint has an average of {name!r}, and the module has no such weights. Resume with the "
                    "network of that run, or load only the weights of the checkpoint."
                )
        for name, tensor in live.items():
            value = part_for(tensor, state["average"].get(name, tensor))
            averages[name].copy_(join(tensor, value.to(tensor.device)) if value.dtype == torch.int16 else value)
        live |= others  # a run with another choice of buffers has averaged them
        for name, value in state["raw"].items():
            to_local(live[name]).copy_(part_for(live[name], value))
        reshard(self._module)

    def like_state(self, names: dict[str, list[str]]) -> dict[str, dict[str, Tensor]]:
        """Return empty tensors in the form of ``state`` to read into, with these names, sharded like the weights."""
        live, averages = (dict(zip(self.names, tensors, strict=True)) for tensors in (self._live(), self._average))
        return {
            "raw": {name: torch.empty_like(live[name]) for name in names["raw"]},
            "average": {
                n: shard_like(live[n], torch.empty_like(averages[n], device=live[n].device)) for n in names["average"]
            },
        }

    def leave(self) -> None:
        """Store a fingerprint of the weights that the module has now."""
        self._left = self._fingerprints(), self._places()

    def is_as_left(self) -> bool:
        """Return whether the module still has the weights of the last ``leave``.

        Adapters may have merged and unmerged since. Running statistics may have changed in place, as by PreciseBN.
        """
        if self._left is None or not self.belongs_to(self._module):
            return False
        left, places = self._left
        now = self._fingerprints()
        changed = {i for i, (a, b) in enumerate(zip(left, now, strict=True)) if a != b}
        for i, place in enumerate(self._places(), start=len(self._params)):
            buffer = self._live()[i]
            is_moved = self.swapped and place != places[i - len(self._params)]
            if is_moved and _fingerprint(round_to(self._average[i], buffer.dtype)) != _fingerprint(buffer):
                return False
        return not changed or (self.swapped and changed <= self._mergeable and self._are_only_rounded())

    def _are_only_rounded(self) -> bool:
        """Return whether weights differ only because adapters merged and unmerged. If so, undo the difference."""
        params = [param for i, param in enumerate(self._params.values()) if i in self._mergeable]
        if any(map(is_sharded, params)):
            return False
        modes, given = Modes(self._module), [(param.data, param.detach().clone()) for param in params]
        with torch.no_grad():
            self._modes.restore()
            now = [param.detach().clone() for param in params]
            self._show_unmerged()
            own = [param.detach().clone() for param in params]
            for part in self._modes.parts:
                part.eval()
            rounded = all(map(_is_rounded, now, own, params))
            self._modes.restore()
            self._show_unmerged()
            modes.restore()
            if not rounded:
                for param, (memory, value) in zip(params, given, strict=True):
                    param.data = memory.copy_(value)  # a state_dict may refer to it by now
        return rounded

    def _fingerprints(self) -> list[int]:
        return [_fingerprint(param) for param in self._params.values()]

    def _places(self) -> list[int]:
        return [buffer.data_ptr() for buffer in self._live()[len(self._params) :]]

    def follow(self) -> None:
        """Move to the devices that the module has moved to."""
        self.finish()
        live = self._live()
        self._raw = [raw.to(tensor.device) for raw, tensor in zip(self._raw, live, strict=False)]
        for i, (average, tensor) in enumerate(zip(self._average, live, strict=True)):
            if average.device != tensor.device and not self._on_cpu:
                shown = self.swapped and average.dtype == tensor.dtype and not is_sharded(tensor)
                shown = shown and i not in self._mergeable
                self._average[i] = tensor.data if shown else average.to(tensor.device)
        self._group()

    def _live(self) -> list[Any]:
        return [*self._params.values(), *(getattr(owner, name) for owner, name in self._buffers.values())]

    def _group(self) -> None:
        """Sort the tensors into lists of one device and type: one kernel updates each of them."""
        groups: dict[Any, list[int]] = {}
        self._imprecise = []
        for i, (tensor, average) in enumerate(zip(self._live(), self._average, strict=True)):
            if i >= self._first_vector or i in self._others:
                continue
            if tensor.dtype == average.dtype:
                groups.setdefault((average.device, average.dtype), []).append(i)
            else:
                self._imprecise.append(i)
        self._groups = [(indices, [self._average[i] for i in indices]) for indices in groups.values()]


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _each_once(names: list[str], buffers: dict[str, tuple[nn.Module, str]]) -> list[str]:
    """Return the names without names of buffers that an earlier layer shares.

    A second swap of the same tensor would keep the average as the module's own value.
    """
    tensors = {id(getattr(*buffers[name])): name for name in reversed(names)}
    return [name for name in names if tensors[id(getattr(*buffers[name]))] == name]


def _precise(tensor: Tensor, on_cpu: bool) -> Tensor:
    """Return a copy in fp32, or in the tensor's own type if that is better."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return _on_cpu(tensor.detach(), dtype) if on_cpu else tensor.detach().to(dtype, copy=True)


def _unsaved(average: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the part of an average that rounding to the weights' type loses: a 16-bit remainder, or the average."""
    is_split = (average.dtype, dtype) == (torch.float32, torch.bfloat16) and bool(average.isfinite().all())
    return remainder_of(average) if is_split else average


def _gathered(shards: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors in the first process, and nothing in the other ones."""
    whole = {name: full_tensor(shard) for name, shard in shards.items()}  # all processes take part
    return {} if torch.distributed.get_rank() else whole


def _on_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy on the CPU, in pinned memory if the tensor is on a GPU."""
    return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def _is_rounded(now: Tensor, own: Tensor, merged: Tensor) -> bool:
    """Return whether weights differ only by the rounding of merging and unmerging adapters."""
    if torch.equal(own, merged):
        return torch.equal(now, own)
    bound = 8 * torch.finfo(own.dtype).eps * (own.abs() + merged.abs())
    return bool(((now - own).abs() <= bound).all())


def _fingerprint(tensor: Tensor) -> int:
    """Return a sum over the bits of all values that differs if one value differs."""
    local = to_local(tensor.detach())
    local = torch.view_as_real(local) if local.is_complex() else local
    words = local.reshape(-1).view(_WORDS[local.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for i, chunk in enumerate(torch.split(words, _CHUNK)):
        first = 2 * i * _CHUNK + 1
        odd = torch.arange(first, first + 2 * len(chunk), 2, device=words.device)  # invertible modulo 2 ** 64
        total += (chunk.long() * odd).sum()
    return int(total)


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**22
